//! The running server: puts the doors together, accepts clients until a signal says stop, lets what
//! runs come to its end. Knows no endpoint.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};

use crate::api::Api;
use crate::config::{self, Config, Mode};
use crate::error::StartError;
use crate::http::Listener;
use crate::pool::Pool;
use crate::store::Store;
use crate::upstream::{Line, Upstream};

/// A connection's thread parses JSON 128 levels deep, which takes this much in a debug build. Only what is
/// used of it takes memory.
const CONNECTION_STACK: usize = 512 * 1024;
/// How long the accept loop waits when descriptors or threads ran out.
const EXHAUSTED: Duration = Duration::from_millis(50);

/// Serves until SIGTERM or SIGINT, then drains. Errs with one line where it cannot start.
pub fn serve(config: Config) -> Result<(), StartError> {
    let upstream = Arc::new(Upstream::new(&config)?);
    let listener = Listener::bind(&config)?;
    let store = Arc::new(Store::open(&config)?);
    let stop = on_signals().map_err(|e| StartError::machine(format!("signals cannot be watched: {e}")))?;
    raise_descriptor_limit();

    let mode = match config.mode {
        Mode::Upstream => format!("asks {} for {}", config.upstream.base, config.model),
        Mode::MockAsked => "mocks the LLM (MOCK_MODE)".to_string(),
        Mode::MockNoKey => "mocks the LLM (no OPENAI_API_KEY)".to_string(),
    };
    log::info!("listening on http://{}", listener.local_addr());
    log::info!("mode: {mode}");
    log::info!("history: {}", config.database_path.display());
    let keys: Vec<&str> = config.api_keys.iter().map(|key| &*key.name).collect();
    log::info!("keys: {}", if keys.is_empty() { "none, everybody is served".to_string() } else { keys.join(", ") });

    let pool =
        Pool::new(config.workers, config.queue_size, move || Line::new(&upstream), (config::UPSTREAM_KEEP_ALIVE, Line::hang_up));
    let grace = config.shutdown_grace;
    let api = Arc::new(Api::new(config, Arc::clone(&store), pool, listener.connections()));
    accept(&listener, &api, &stop);

    api.drain();
    drop(listener);
    drain(&api, grace);
    store.close();
    log::info!("stopped");
    Ok(())
}

fn accept(listener: &Listener, api: &Arc<Api>, stop: &Stop) {
    let mut number = 0_u64;
    while !stop.asked.load(Ordering::SeqCst) {
        let connection = match listener.accept(&stop.signals) {
            Ok(Some(connection)) => connection,
            Ok(None) => continue,
            Err(e) => {
                log::warn!("a client cannot be accepted: {e}");
                thread::sleep(EXHAUSTED);
                continue;
            }
        };
        number += 1;
        let api = Arc::clone(api);
        let thread = thread::Builder::new().name(format!("conn-{number}")).stack_size(CONNECTION_STACK);
        if let Err(e) = thread.spawn(move || connection.serve(&*api)) {
            log::warn!("no thread for a connection, which is dropped: {e}");
            thread::sleep(EXHAUSTED);
        }
    }
}

fn drain(api: &Api, grace: Duration) {
    let until = Instant::now() + grace;
    log::info!("draining: {} requests in flight, up to {} s", api.in_flight(), grace.as_secs());
    while api.in_flight() > 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    let left = api.in_flight();
    if left > 0 {
        log::warn!("{left} requests were not finished in time");
    }
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

/// A connection takes three descriptors and a call one, so the soft limit goes up to the hard one.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
}
