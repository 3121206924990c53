//! The writer of the history: commits together what waits together, and sees to the housekeeping. Knows rows, not who asks
//! for them; the files are its rooms'.

mod index;
mod journal;
mod opening;
mod retention;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use oneshot::Sender;
use rusqlite::{Connection, params};

use self::index::INDEXING_REST;
use self::journal::disk_full;
use self::opening::Open;
use super::schema::{Trouble, advice};
use super::{Arrival, Order, PROBE_WAIT, State, Then, Unique, unavailable};
use crate::config::{DATABASE_BUSY, Durability};
use crate::error::ApiError;
use crate::exchange::{Pair, Usage};
use crate::kernel::{self, Room};
use crate::logging;
use crate::metrics::Metrics;

const PROBE: &str = include_str!("../../sql/queries/probe.sql");
/// At most so many pairs in one transaction.
const BATCH: usize = 1000;
/// The writer does its housekeeping when nothing came for this long.
pub const QUIET: Duration = Duration::from_millis(100);
/// How often retention looks at the clock, and how long the index rests at most where it failed.
const RETENTION_TICK: Duration = Duration::from_secs(60);
/// Bytes that a row takes beside its texts, at most, in the journal and in the database.
const ROW: u64 = 1 << 10;

/// A panic in what follows costs this one request, not the history.
fn tell(then: Then, result: Result<Pair, ApiError>) {
    let _ = catch_unwind(AssertUnwindSafe(|| then(result)));
}

fn refuse(batch: Vec<Arrival>) {
    batch.into_iter().for_each(|arrival| tell(arrival.then, Err(unavailable())));
}

impl Arrival {
    fn texts(&self) -> usize {
        self.pair.question.len() + self.pair.answer.len()
    }

    /// Bytes of what is noted of its request.
    fn noted(&self) -> usize {
        self.unique.as_ref().map_or(0, |unique| unique.request.len() + unique.response.as_ref().map_or(0, Vec::len))
    }

    /// Bytes that it takes, once in the journal and once in the database.
    fn room(&self) -> u64 {
        2 * (self.texts() + self.noted()) as u64 + ROW
    }
}

/// The one connection that writes.
pub struct Writer {
    /// The database; its journal and the index of that, which all who use it share, when it is open.
    path: PathBuf,
    journal: PathBuf,
    journal_index: PathBuf,
    sync: Durability,
    /// What retention leaves; 0: all.
    pub max_rows: u64,
    pub max_days: u64,
    state: Arc<State>,
    metrics: Arc<Metrics>,
    /// `None` after a failure: what comes next opens the database anew.
    open: Option<Open>,
    last_write: Instant,
    last_append: Instant,
    pub is_clerk_asleep: bool,
    is_closed: bool,
    /// About how many pages the journal has grown by since it was last moved over.
    pages: usize,
    checkpoint: Option<JoinHandle<()>>,
    /// Rows in the table; kept only where their number is limited.
    rows: u64,
    /// Of the database when they were counted.
    data_version: i64,
    /// The last id that was given, and the last one whose words are indexed.
    last_id: i64,
    indexed: i64,
    /// What was appended since the start and is not indexed, in bytes of text.
    unindexed_bytes: i64,
    /// Searches that wait until the words up to a row are indexed.
    searches: Vec<(i64, Sender<()>)>,
    next_retention: Instant,
    /// Retention rests after a failure.
    next_pruning: Instant,
    next_forgetting: Instant,
    /// The index rests after a failure, for how long after the next.
    next_indexing: Instant,
    indexing_rest: Duration,
    /// Bytes that the largest of the pairs takes that could not be written last; 0: they could. The next may come alone.
    wanted_room: u64,
    /// Another process's lock is waited for so long.
    patience: Duration,
    /// How full the disk is, and whether a file fits there; tests have disks of their own.
    room: fn(&Path) -> Option<Room>,
    fits: fn(&Path, u64) -> bool,
}

impl Writer {
    /// A writer that keeps everything and has not opened its database yet.
    pub fn new(path: PathBuf, sync: Durability, state: Arc<State>, metrics: Arc<Metrics>) -> Writer {
        Writer {
            journal: PathBuf::new(),
            journal_index: PathBuf::new(),
            path,
            sync,
            max_rows: 0,
            max_days: 0,
            state,
            metrics,
            open: None,
            last_write: Instant::now(),
            last_append: Instant::now(),
            is_clerk_asleep: false,
            is_closed: false,
            pages: 0,
            checkpoint: None,
            rows: 0,
            data_version: 0,
            last_id: 0,
            indexed: 0,
            unindexed_bytes: 0,
            searches: Vec::new(),
            next_retention: Instant::now(),
            next_pruning: Instant::now(),
            next_forgetting: Instant::now(),
            next_indexing: Instant::now(),
            indexing_rest: INDEXING_REST,
            wanted_room: 0,
            patience: DATABASE_BUSY,
            room: kernel::room,
            fits: kernel::fits_in_blocks,
        }
    }

    /// Opens and migrates the database, and shows that it can be written. Errs with what to do.
    pub fn prove(&mut self) -> Result<(), String> {
        self.ready().map_err(|e| advice(&e))?;
        self.write(|connection| connection.execute_batch(PROBE)).map_err(|e| advice(&Trouble::Sql(e)))
    }

    /// Does what waits, at most a batch of pairs and one other order; false: nothing did.
    pub fn work(&mut self, inbox: &Receiver<Order>) -> bool {
        let mut batch = Vec::new();
        let mut other = None;
        while batch.len() < BATCH && other.is_none() {
            match inbox.try_recv() {
                Ok(Order::Append(arrival)) => batch.push(*arrival),
                Ok(order) => other = Some(order),
                Err(_) => break,
            }
        }
        if batch.is_empty() && other.is_none() {
            return false;
        }
        if !batch.is_empty() {
            self.last_append = Instant::now();
            self.append(batch);
        }
        match other {
            Some(Order::Probe(done)) => self.probe(done),
            Some(Order::Index(done)) => {
                self.look_again();
                self.searches.push((self.last_id, done));
            }
            Some(Order::Close(done)) => {
                self.close();
                let _ = done.send(());
            }
            Some(Order::Append(_)) | None => {}
        }
        self.let_searches_go();
        true
    }

    /// What waits for a quiet moment. Says how long the clerk may rest then; `None`: for ever.
    pub fn housekeep(&mut self) -> Option<Duration> {
        if self.is_closed {
            return None;
        }
        let is_quiet = self.last_append.elapsed() >= QUIET;
        let forgets = self.forget_remembered();
        let more = match is_quiet || !self.searches.is_empty() {
            true => {
                self.look_again();
                forgets | self.retain() | self.index()
            }
            false => {
                self.catch_up();
                false
            }
        };
        self.let_searches_go();
        // Who writes meanwhile wakes a clerk who would sleep for long.
        self.is_clerk_asleep = is_quiet && !more;
        Some(match (more, is_quiet) {
            (true, _) => Duration::ZERO,
            (false, true) => RETENTION_TICK,
            (false, false) => QUIET,
        })
    }

    fn probe(&mut self, done: Sender<bool>) {
        // Who asked has given up, and said so. Behind a lock that is held for long they come faster than they are tried.
        if done.is_closed() {
            return;
        }
        let fresh = !self.state.failing.load(Ordering::Relaxed) && self.last_write.elapsed() < PROBE_WAIT && self.is_in_place();
        // A trial write is small: it works where the next answer, already paid for, would not fit.
        let fits = !self.is_closed && (self.wanted_room == 0 || self.has_room(self.wanted_room, self.quarters()));
        let mut probe = || self.attempt("probed", |connection, _| connection.execute_batch(PROBE)).is_some();
        let fine = fits && (fresh || probe());
        self.state.probed();
        // Who asked may have given up.
        let _ = done.send(fine);
    }

    /// Commits the pairs together, those that there is room for, then does what follows for each.
    fn append(&mut self, mut batch: Vec<Arrival>) {
        let began = Instant::now();
        // Those that come make room for themselves, and for as many again where there are too many already.
        let (surplus, most) = (self.surplus(batch.len()), 2 * batch.len() as u64);
        let has_room = self.has_room(batch.iter().map(Arrival::room).sum(), self.quarters());
        if !has_room && batch.len() > 1 {
            // What does not fit together may fit in parts, each of which may make room for the next; the smallest go first, since
            // nothing is tried any more after one that does not fit.
            batch.sort_by_key(Arrival::room);
            let later = batch.split_off(batch.len() / 2);
            self.append(batch);
            return if self.state.failing.load(Ordering::Relaxed) { refuse(later) } else { self.append(later) };
        }
        let bytes: usize = batch.iter().map(Arrival::texts).sum();
        let noted: usize = batch.iter().map(Arrival::noted).sum();
        // Who has waited behind others for a lock need not wait for it as long once more.
        let waited = batch.iter().map(|arrival| arrival.since).max().map_or(Duration::ZERO, |newest| newest.elapsed());
        // A moment is left: what they waited for may have been the disk, and a lock that is just taken is soon given back.
        self.patience = DATABASE_BUSY.saturating_sub(waited).max(DATABASE_BUSY / 10);
        let mut deletes = false;
        let written = self.attempt("written", |connection, last_id| {
            if !has_room {
                return Err(disk_full());
            }
            let mut append = connection.prepare_cached(include_str!("../../sql/queries/append.sql"))?;
            let mut ids: Vec<i64> = Vec::with_capacity(batch.len());
            for Arrival { pair, unique, .. } in &batch {
                let tokens = |count: fn(&Usage) -> u64| pair.usage.as_ref().map(|usage| count(usage).min(i64::MAX as u64) as i64);
                let id = append.insert(params![
                    pair.created_at,
                    &*pair.key,
                    pair.question,
                    pair.answer,
                    pair.model,
                    pair.finish_reason,
                    tokens(|u| u.prompt_tokens),
                    tokens(|u| u.completion_tokens),
                    tokens(|u| u.total_tokens),
                    pair.latency_ms as i64,
                    ids.last().unwrap_or(&last_id),
                ])?;
                if let Some(Unique { key, path, request, response }) = unique {
                    let mut remember = connection.prepare_cached(include_str!("../../sql/queries/remember.sql"))?;
                    remember.execute(params![&*pair.key, key, path, request, response, id])?;
                }
                ids.push(id);
            }
            deletes = !surplus.is_none();
            Ok((ids, if deletes { surplus.delete(connection, most)? } else { 0 }))
        });
        self.patience = DATABASE_BUSY;
        match written {
            Some((ids, deleted)) => {
                self.metrics.history_commits.inc();
                self.metrics.history_rows.add(ids.len() as u64);
                self.metrics.history_batch_size.observe_value(ids.len() as f64);
                self.metrics.history_commit.observe(began.elapsed());
                self.rows += ids.len() as u64;
                self.shrank(&surplus, deleted, most);
                self.unindexed_bytes += bytes as i64;
                self.last_id = ids.last().copied().unwrap_or(self.last_id);
                self.wanted_room = 0;
                let rows = ids.len();
                logging::together(|| {
                    for (arrival, id) in batch.into_iter().zip(ids) {
                        tell(arrival.then, Ok(Pair { id, ..arrival.pair }));
                    }
                });
                self.grew(rows, bytes + noted);
            }
            // What is damaged, such as an old row or the index of words, is to keep nobody from asking.
            None if deletes => {
                self.next_pruning = Instant::now() + RETENTION_TICK;
                self.append(batch);
                if self.state.failing.load(Ordering::Relaxed) {
                    // It was not that, and what is deleted makes room.
                    self.next_pruning = Instant::now();
                } else {
                    log::error!("history cannot be pruned, and is written without that");
                }
            }
            None => {
                self.wanted_room = batch.iter().map(Arrival::room).max().unwrap_or(0);
                refuse(batch);
            }
        }
    }

    /// `transact` for pairs and trial writes, whose result also sets `failing`: whether pairs can be kept at present.
    fn attempt<T>(&mut self, what: &str, work: impl FnOnce(&Connection, i64) -> rusqlite::Result<T>) -> Option<T> {
        let result = self.transact(what, work);
        let failing = result.is_none();
        if self.state.failing.swap(failing, Ordering::Relaxed) && !failing {
            log::info!("history can be written again");
            self.next_indexing = Instant::now();
        }
        result
    }

    /// Does `work` in one transaction, with the last id that was given in the database that is there now. `None` where it
    /// failed, which is logged; the database is then opened anew for the next. Trouble with the index alone keeps nobody
    /// from asking.
    fn transact<T>(&mut self, what: &str, work: impl FnOnce(&Connection, i64) -> rusqlite::Result<T>) -> Option<T> {
        let result = self.ready().and_then(|()| {
            let last_id = self.last_id;
            self.write(|connection| work(connection, last_id)).map_err(Trouble::Sql)
        });
        if let Err(trouble) = &result {
            log::error!("history cannot be {what}: {}", advice(trouble));
            self.open = None;
        }
        result.ok()
    }

    fn write<T>(&mut self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let Some(open) = &mut self.open else { return Err(rusqlite::Error::InvalidQuery) };
        let connection = &open.connection;
        connection.busy_timeout(self.patience)?;
        // As cached statements: rusqlite's transactions parse their SQL anew each time.
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let result = work(connection).and_then(|result| {
            connection.prepare_cached("COMMIT")?.execute([])?;
            Ok(result)
        });
        match result {
            Ok(_) => self.last_write = Instant::now(),
            // Some errors have rolled back already; then this says so.
            Err(_) => drop(connection.execute_batch("ROLLBACK")),
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::thread;

    use oneshot::channel;
    use rusqlite::types::FromSql;

    use super::super::desk::Desk;
    use super::*;

    pub(super) fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("ai-proxy-{}-{name}.db", std::process::id()))
    }

    /// A writer whose history is a file of its own.
    pub(super) fn writer(name: &str) -> Writer {
        reopened(path(name))
    }

    pub(super) fn reopened(path: PathBuf) -> Writer {
        let mut writer = Writer::new(path, Durability::Normal, Arc::default(), Arc::new(Metrics::new(&[], &[])));
        assert!(writer.ready().is_ok());
        writer
    }

    pub(super) fn remove(mut writer: Writer) {
        let path = writer.path.clone();
        writer.close();
        fs::remove_file(path).expect("the file is there");
    }

    /// What the query says of the writer's database.
    pub(super) fn told<T: FromSql>(writer: &mut Writer, query: &str) -> T {
        writer.write(|connection| connection.query_row(query, [], |row| row.get(0))).expect("it is told")
    }

    pub(super) fn change(writer: &mut Writer, sql: &str) {
        writer.write(|connection| connection.execute_batch(sql)).expect("it is changed");
    }

    /// The answer to who asks whether a write works.
    pub(super) fn works(writer: &mut Writer) -> bool {
        let (done, answer) = channel();
        writer.probe(done);
        answer.recv().expect("an answer")
    }

    pub(super) fn is_kept(writer: &mut Writer, pair: Pair, unique: Option<Unique>) -> bool {
        let (done, answer) = channel();
        writer.append(vec![Arrival::new(pair, unique, move |result| drop(done.send(result.is_ok())))]);
        answer.recv().expect("an answer")
    }

    pub(super) fn append(writer: &mut Writer, pairs: usize, bytes: usize) {
        let pair = || Pair { key: "anonymous".into(), question: "w ".repeat(bytes / 2), ..Pair::default() };
        let arrival = |_| Arrival::new(pair(), None, |result| assert!(result.is_ok()));
        writer.append((0..pairs).map(arrival).collect());
    }

    /// Another process has the lock of the database at this path for so long.
    pub(super) fn locked_for(path: &Path, time: Duration) -> JoinHandle<()> {
        let other = Connection::open(path).expect("a file");
        other.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
        thread::spawn(move || {
            thread::sleep(time);
            drop(other);
        })
    }

    fn come(since: Instant) -> Arrival {
        Arrival { since, ..Arrival::new(Pair::default(), None, |result| assert!(result.is_ok())) }
    }

    /// Pairs and the order to close would wait behind each of them.
    #[test]
    fn nothing_is_tried_for_who_has_given_up() {
        let mut writer = writer("given-up");
        let other = Connection::open(&writer.path).expect("a file");
        other.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
        writer.state.failing.store(true, Ordering::Relaxed);
        let (done, answer) = channel();
        drop(answer);
        writer.probe(done);
        assert!(writer.open.is_some(), "a try that fails has the database opened anew");
        drop(other);
        remove(writer);
    }

    /// Anybody may ask that, as often as they like.
    #[test]
    fn who_asks_whether_a_write_works_does_not_keep_the_house_from_its_quiet() {
        let mut writer = writer("quiet");
        append(&mut writer, 3, 2);
        change(&mut writer, "UPDATE history SET created_at = '2000-01-01T00:00:00.000Z'");
        writer.max_days = 1;
        thread::sleep(QUIET);
        let (orders, inbox) = crossbeam_channel::unbounded();
        let (done, answer) = channel();
        assert!(orders.send(Order::Probe(done)).is_ok() && writer.work(&inbox));
        assert_eq!(answer.recv(), Ok(true));
        writer.housekeep();
        assert_eq!(told::<i64>(&mut writer, "SELECT count(*) FROM history"), 0);
        remove(writer);
    }

    #[test]
    fn what_did_not_fit_is_not_asked_for_before_there_is_room() {
        let mut writer = writer("wanted-room");
        (writer.wanted_room, writer.open) = (u64::MAX, None);
        writer.state.failing.store(true, Ordering::Relaxed);
        assert!(!works(&mut writer));
        assert!(writer.state.failing.load(Ordering::Relaxed));
        writer.wanted_room = 1;
        assert!(works(&mut writer));
        append(&mut writer, 1, 2);
        assert_eq!(writer.wanted_room, 0);
        remove(writer);
    }

    #[test]
    fn a_lock_is_waited_for_as_long_as_the_last_who_came_may_wait() {
        let mut writer = writer("patience");
        let long_ago = Instant::now() - DATABASE_BUSY;
        let holder = locked_for(&writer.path, QUIET);
        writer.append(vec![come(long_ago), come(Instant::now())]);
        holder.join().expect("it lets go");
        assert_eq!(writer.last_id, 2, "also for who came before");
        writer.append(vec![come(long_ago)]);
        // For longer than who has waited for long still waits.
        let holder = locked_for(&writer.path, DATABASE_BUSY / 4);
        assert!(writer.transact("tested", |_, _| Ok(())).is_some(), "what comes then has its own time");
        holder.join().expect("it lets go");
        remove(writer);
    }

    /// It may have been the disk that they waited for.
    #[test]
    fn who_has_waited_for_long_still_waits_a_moment_for_a_lock() {
        let mut writer = writer("moment-left");
        let holder = locked_for(&writer.path, Duration::from_millis(20));
        writer.append(vec![come(Instant::now() - 2 * DATABASE_BUSY)]);
        holder.join().expect("it lets go");
        assert_eq!(writer.last_id, 1);
        remove(writer);
    }

    #[test]
    fn what_is_ordered_after_the_end_is_refused() {
        let writer = writer("closed");
        let path = writer.path.clone();
        let desk = Desk::open(writer).expect("a thread");
        let (done, closed) = channel();
        desk.order(Order::Close(done), false);
        assert_eq!(closed.recv(), Ok(()));
        for lead in [true, false] {
            let (done, answer) = channel();
            desk.order(Order::Probe(done), lead);
            assert_eq!(answer.recv(), Ok(false));
        }
        fs::remove_file(path).expect("the file is there");
    }
}
