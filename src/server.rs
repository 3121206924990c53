//! The running server: puts the doors together, accepts clients until a signal says stop, lets what
//! runs come to its end. Knows no endpoint.

use std::collections::BTreeSet;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};

use crate::api::{Admitted, Api, Errand, Parting};
use crate::config::{self, Config, Mode};
use crate::error::StartError;
use crate::http::{self, Call, Connection, Listener, Turn};
use crate::kernel;
use crate::pool::{IsVain, Job, Pool};
use crate::store::Store;
use crate::upstream::{Line, Upstream};

/// A worker that is done with a question waits so long for the connection's next, before it gives the
/// connection back: a client that asks again at once, as one under load does, costs no change of threads.
const STAY: Duration = Duration::from_millis(20);
/// The same where there is no other worker for who comes meanwhile.
const SHORT_STAY: Duration = Duration::from_millis(2);
/// While the last answer still waits for its commit, its worker stays with the connection, and looks this often whether
/// another question needs it.
const SLOW_COMMIT: Duration = Duration::from_millis(100);
/// A reader without a connection ends after this: it keeps nothing that is worth more.
const READER_PATIENCE: Duration = Duration::from_secs(1);
/// How long requests that a shutdown ends have for storing their pair and telling the client; then as long again for
/// storing alone, with the sockets shut.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How long the accept loop waits when descriptors or threads ran out.
const EXHAUSTED: Duration = Duration::from_millis(50);
/// And is told so often.
const A_MINUTE: Duration = Duration::from_secs(60);

/// Serves until SIGTERM or SIGINT, then drains. Errs with one line where it cannot start.
pub fn serve(mut config: Config) -> Result<(), StartError> {
    kernel::give_back_what_is_large();
    let limited = limit_threads(&mut config, kernel::most_threads());
    let config = Arc::new(config);
    let metrics = Arc::new(Api::metrics(&config));
    let upstream = Arc::new(Upstream::new(Arc::clone(&config), Arc::clone(&metrics))?);
    let stop = on_signals().map_err(|e| StartError::machine(format!("signals cannot be watched: {e}")))?;
    let listener = Listener::bind(&config)?;
    let store = Arc::new(Store::open(&config, Arc::clone(&metrics))?);
    kernel::raise_descriptor_limit();

    let make_line = move || {
        kernel::touch_stack();
        Line::new(&upstream)
    };
    let workers = Pool::new("worker", config.workers, config.queue_size, config::UPSTREAM_KEEP_ALIVE, make_line);
    let readers = Pool::new("reader", config.max_connections, config.max_connections, READER_PATIENCE, || ());
    let connections = Arc::clone(&listener.connections);
    let api = Api::new(Arc::clone(&config), Arc::clone(&store), Arc::clone(&workers), Arc::clone(&connections), metrics)?;

    let mode = match config.mode {
        Mode::Upstream => format!("asks {} for {}", config.upstream.base, config.model),
        Mode::Mock(why) => format!("mocks the LLM ({why})"),
    };
    log::info!("listening on http://{}", listener.local);
    log::info!("mode: {mode}");
    let kept = [(config.history_max_rows, "pairs"), (config.history_max_days, "days")].into_iter().filter(|(most, _)| *most > 0);
    let kept: String = kept.map(|(most, what)| format!(", at most {most} {what}")).collect();
    log::info!("history: {}{kept}", config.database_path.display());
    // One that is being changed is there twice.
    let keys: BTreeSet<&str> = config.api_keys.iter().map(|key| &*key.name).collect();
    let keys: Vec<&str> = keys.into_iter().collect();
    log::info!("keys: {}", if keys.is_empty() { "none, everybody is served".to_string() } else { keys.join(", ") });
    limited.iter().for_each(|text| log::warn!("{text}"));

    let staff = Arc::new(Staff { api, readers, workers });
    accept(&listener, &staff, &stop);

    staff.api.drain();
    drop(listener);
    log::info!("draining: {} requests in flight, up to {} s", staff.api.in_flight(), config.shutdown_grace.as_secs());
    if !waited(config.shutdown_grace, || staff.api.in_flight() == 0) {
        log::warn!("{} requests were not finished in time and are ended", staff.api.in_flight());
    }
    // Whoever goes on asking on an open connection has its answer, and that its line in the log, before the end.
    let is_over = || staff.api.in_flight() == 0 && connections.count() == 0;
    connections.shut(Shutdown::Read);
    if !waited(LAST_WORDS, is_over) {
        // Who does not read cannot be told, but what was said is kept.
        connections.shut(Shutdown::Both);
        waited(LAST_WORDS, is_over);
    }
    store.close();
    log::info!("stopped");
    Ok(())
}

/// Of workers and connections, each of which may have a thread, allows no more than the system does. Returns what it says
/// where that are fewer than were asked for.
fn limit_threads(config: &mut Config, most: usize) -> Option<String> {
    let (workers, connections) = within(most, config.workers, config.max_connections);
    let is_limited = (workers, connections) != (config.workers, config.max_connections);
    (config.workers, config.max_connections) = (workers, connections);
    is_limited.then(|| {
        format!(
            "WORKERS is {workers} here and MAX_CONNECTIONS {connections}: the system has memory mappings (vm.max_map_count) \
             for {most} threads"
        )
    })
}

/// As many of both as fit into `most`; workers have up to half of it where not all do.
fn within(most: usize, workers: usize, connections: usize) -> (usize, usize) {
    if workers.saturating_add(connections) <= most {
        return (workers, connections);
    }
    let workers = workers.min(most / 2).max(1);
    (workers, connections.min(most.saturating_sub(workers)).max(1))
}

/// Who does what: readers wait for requests and answer what needs no LLM, workers ask the LLM.
struct Staff {
    api: Api,
    readers: Arc<Pool<()>>,
    workers: Arc<Pool<Line>>,
}

/// What a reader does with a connection before it waits for requests.
enum Begin {
    Wait,
    /// Looks at a request that was read from it.
    Call(Box<Call<Admitted>>),
    /// Sends what is left of an answer, which its client may be slow to take.
    Part(Box<Parting>),
}

impl Staff {
    /// Sees to a connection that was just accepted. Most bring their first question along: where it waits for nothing
    /// it goes to a worker at once, which saves a change of threads.
    fn welcome(self: &Arc<Staff>, mut connection: Box<Connection>) {
        if self.workers.is_exhausted() || self.api.is_in_trouble() {
            return self.receive(connection, Begin::Wait);
        }
        match connection.next_call(|head| self.api.admit(head), Some(Duration::ZERO)) {
            Turn::Call(call) if Api::suits_worker(&call) => {
                let left = match self.api.prepare(*call) {
                    Some(errand) => self.hand_over(connection, errand),
                    None => Some(connection),
                };
                if let Some(connection) = left {
                    self.receive(connection, Begin::Wait);
                }
            }
            Turn::Call(call) => self.receive(connection, Begin::Call(call)),
            Turn::Quiet | Turn::Over => self.receive(connection, Begin::Wait),
        }
    }

    /// Gives an errand to a worker, and the connection along with it, so that no two threads wait for one answer.
    /// Returns the connection where there is no worker for it, which is answered then.
    fn hand_over(self: &Arc<Staff>, connection: Box<Connection>, errand: Errand) -> Option<Box<Connection>> {
        let staff = Arc::clone(self);
        let work = |(connection, errand)| -> Job<Line> { Box::new(move |line| staff.work(connection, errand, line)) };
        let is_vain = |(_, errand): &(Box<Connection>, Errand)| -> IsVain {
            let client = Arc::clone(&errand.client);
            Box::new(move || http::is_gone(&client))
        };
        let (connection, errand) = self.workers.give((connection, errand), is_vain, work).err()?;
        self.api.overloaded(errand);
        Some(connection)
    }

    /// Gives a connection to a reader.
    fn receive(self: &Arc<Staff>, connection: Box<Connection>, begin: Begin) {
        let staff = Arc::clone(self);
        let read = |(connection, begin)| -> Job<()> { Box::new(move |()| staff.read(connection, begin)) };
        // There are as many readers as connections may be open, so only a lack of threads refuses.
        if let Err((connection, begin)) = self.readers.give((connection, begin), |_| Box::new(|| false), read) {
            connection.cut();
            if let Begin::Part(parting) = begin {
                parting.drop_unsent();
            }
            log::warn!("no reader for a connection, which is dropped");
        }
    }

    /// A reader's job: requests of one connection, until one is for a worker.
    fn read(self: Arc<Staff>, mut connection: Box<Connection>, begin: Begin) {
        let mut next = match begin {
            Begin::Wait => None,
            Begin::Call(call) => Some(call),
            Begin::Part(parting) => {
                parting.send();
                None
            }
        };
        loop {
            let call = match next.take() {
                Some(call) => call,
                None => match connection.next_call(|head| self.api.admit(head), None) {
                    Turn::Call(call) => call,
                    Turn::Quiet | Turn::Over => return,
                },
            };
            let Some(errand) = self.api.prepare(*call) else { continue };
            match self.hand_over(connection, errand) {
                Some(same) => connection = same,
                None => return,
            }
        }
    }

    /// A worker's job: an errand, and what the connection asks right after it.
    fn work(self: &Arc<Staff>, connection: Box<Connection>, errand: Errand, line: &mut Line) {
        let mut next = Some((connection, errand));
        while let Some((connection, errand)) = next {
            let parting = self.api.run(errand, line);
            next = self.go_on(connection, parting);
        }
    }

    /// After an errand: the next one of the same connection, where it comes at once; else the connection, with what is
    /// left of the answer, is a reader's.
    // Not inlined: each stream waits with every page of stack that was used.
    #[inline(never)]
    fn go_on(self: &Arc<Staff>, mut connection: Box<Connection>, parting: Option<Parting>) -> Option<(Box<Connection>, Errand)> {
        if let Some(parting) = parting {
            self.receive(connection, Begin::Part(Box::new(parting)));
            return None;
        }
        while !self.workers.is_wanted() && !self.api.is_in_trouble() {
            let answered = connection.is_answered();
            let stay = if self.workers.is_exhausted() { SHORT_STAY } else { STAY };
            match connection.next_call(|head| self.api.admit(head), Some(stay)) {
                Turn::Call(call) if Api::suits_worker(&call) => {
                    if let Some(errand) = self.api.prepare(*call) {
                        return Some((connection, errand));
                    }
                }
                Turn::Call(call) => {
                    self.receive(connection, Begin::Call(call));
                    return None;
                }
                // The client does not ask again before it has its answer, and the disk may be slow.
                Turn::Quiet if !answered => connection.await_answer(SLOW_COMMIT),
                Turn::Over if !connection.lingers() => return None,
                Turn::Quiet | Turn::Over => break,
            }
        }
        self.receive(connection, Begin::Wait);
        None
    }
}

fn accept(listener: &Listener, staff: &Arc<Staff>, stop: &Stop) {
    let mut told: Option<Instant> = None;
    while !stop.asked.load(Ordering::SeqCst) {
        match listener.accept(&stop.signals) {
            // A panic there is logged by the hook and costs this connection only, as one in a job does.
            Ok(Some(connection)) => drop(catch_unwind(AssertUnwindSafe(|| staff.welcome(connection)))),
            Ok(None) => {}
            Err(e) => {
                if told.is_none_or(|at| at.elapsed() >= A_MINUTE) {
                    log::warn!("clients cannot be accepted: {e}");
                    told = Some(Instant::now());
                }
                thread::sleep(EXHAUSTED);
            }
        }
    }
}

/// Waits until something is so, at most for a time; whether it is.
fn waited(time: Duration, is_so: impl Fn() -> bool) -> bool {
    let until = Instant::now() + time;
    while !is_so() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    is_so()
}

/// What a signal says to the accept loop.
struct Stop {
    /// Readable from the first signal on.
    signals: UnixStream,
    asked: Arc<AtomicBool>,
}

/// The first SIGTERM or SIGINT asks to stop, a second one ends the process at once.
fn on_signals() -> std::io::Result<Stop> {
    let asked = Arc::new(AtomicBool::new(false));
    let (signals, written) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&asked))?;
        signal_hook::flag::register(signal, Arc::clone(&asked))?;
        signal_hook::low_level::pipe::register(signal, written.try_clone()?)?;
    }
    // A file-size limit is a full disk to us, not a reason to die.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    Ok(Stop { signals, asked })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_limited_only_where_not_all_fit() {
        assert_eq!(within(15_132, 10_000, 1000), (10_000, 1000));
        assert_eq!(within(15_132, 2048, 100_000), (2048, 13_084));
        assert_eq!(within(15_132, 32_768, 100_000), (7566, 7566));
        assert_eq!(within(15_132, 32_768, 5), (7566, 5));
        assert_eq!(within(usize::MAX, 32_768, 100_000), (32_768, 100_000));
        assert_eq!((within(0, 5, 5), within(1, 5, 5)), ((1, 1), (1, 1)));
    }
}
