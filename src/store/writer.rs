//! The writer of the history: commits together what waits together, moves the journal, and sees to the housekeeping. Knows
//! rows and files, not who asks for them.

mod index;
mod retention;

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use oneshot::Sender;
use rusqlite::{Connection, OpenFlags, ffi, params};

use self::index::INDEXING_REST;
use super::schema::{self, Trouble, advice};
use super::{Arrival, Order, PROBE_WAIT, State, Then, Unique, connect, reader, taken_over, unavailable};
use crate::config::{DATABASE_BUSY, Durability};
use crate::error::ApiError;
use crate::exchange::{Pair, Usage};
use crate::kernel::{self, Room};
use crate::lock::{lock, own, share};
use crate::logging;
use crate::metrics::Metrics;

const PROBE: &str = include_str!("../../sql/queries/probe.sql");
/// At most so many pairs in one transaction.
const BATCH: usize = 1000;
/// The journal is moved over beside the writing when it has grown by about so many pages of 4 KiB: a question
/// that waits for that waits 10 ms, and under load a fifth of the time goes there.
const CHECKPOINT_PAGES: usize = 1000;
/// Passive: it waits for nobody and nobody for it (<https://sqlite.org/pragma.html#pragma_wal_checkpoint>).
const CHECKPOINT: &str = "PRAGMA wal_checkpoint(PASSIVE)";
/// Bytes of a page.
const PAGE: usize = 4096;
/// With so many pages the writer does not wait for that any more.
const MOST_PAGES: usize = 4 * CHECKPOINT_PAGES;
/// The writer does its housekeeping when nothing came for this long.
pub const QUIET: Duration = Duration::from_millis(100);
/// How often retention looks at the clock, and how long the index rests at most where it failed.
const RETENTION_TICK: Duration = Duration::from_secs(60);
/// So many requests with an `Idempotency-Key` are forgotten at a time, so that a new pair never waits long.
const FORGET_REQUESTS: usize = 100;
/// Bytes of room that new pairs leave alone, or a sixteenth of a small disk: deleting takes some, too.
const KEPT_ROOM: u64 = 4 << 20;
/// Bytes of room without which no database is opened where blocks are smaller than SQLite's pages: in the journal's index, of
/// 32 KiB, it leaves holes then, and who writes into one on a full disk ends (SIGBUS).
const OPENING_ROOM: u64 = 64 << 10;
/// Bytes that a row takes beside its texts, at most, in the journal and in the database.
const ROW: u64 = 1 << 10;

/// Nothing is lost where the journal was not moved over: it is tried again later, and a disk that fails shows in the next
/// commit.
fn log_unmoved<T>(moved: &rusqlite::Result<T>) {
    if let Err(e) = moved {
        log::debug!("the history's journal was not moved over: {e}");
    }
}

/// Moves the journal over, as far as nobody reads an older state; the pages that are left in it, where that is known.
fn move_journal(connection: &Connection) -> rusqlite::Result<Option<u64>> {
    let left = connection.query_row(CHECKPOINT, [], |row| {
        let (is_busy, pages, moved): (bool, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok((!is_busy).then_some((pages - moved).max(0) as u64))
    });
    log_unmoved(&left);
    left
}

/// As SQLite says it.
fn disk_full() -> rusqlite::Error {
    let text = "what is left is needed for what is written already";
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_FULL), Some(text.to_string()))
}

/// A number that changes when another connection writes (<https://sqlite.org/pragma.html#pragma_data_version>).
fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0))
}

/// A panic in what follows costs this one request, not the history.
fn tell(then: Then, result: Result<Pair, ApiError>) {
    let _ = catch_unwind(AssertUnwindSafe(|| then(result)));
}

struct Open {
    connection: Connection,
    /// The inodes of its three files.
    files: [Option<u64>; 3],
}

/// The one connection that writes.
pub struct Writer {
    /// The database, its journal and the index of that, which all who use it share.
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
    last_order: Instant,
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
    /// Bytes that the pairs take which could not be written last; 0: they could.
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
        let beside = |ending: &str| {
            let mut path = path.clone().into_os_string();
            path.push(ending);
            PathBuf::from(path)
        };
        Writer {
            journal: beside("-wal"),
            journal_index: beside("-shm"),
            path,
            sync,
            max_rows: 0,
            max_days: 0,
            state,
            metrics,
            open: None,
            last_write: Instant::now(),
            last_order: Instant::now(),
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
        self.last_order = Instant::now();
        if !batch.is_empty() {
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
        let is_quiet = self.last_order.elapsed() >= QUIET;
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

    /// Commits the pairs together, then does what follows for each.
    fn append(&mut self, batch: Vec<Arrival>) {
        let began = Instant::now();
        // Those that come make room for themselves, and for as many again where there are too many already.
        let (surplus, most) = (self.surplus(batch.len()), 2 * batch.len() as u64);
        let text = |arrival: &Arrival| arrival.pair.question.len() + arrival.pair.answer.len();
        let bytes: usize = batch.iter().map(text).sum();
        let noted = |unique: &Unique| unique.request.len() + unique.response.as_ref().map_or(0, Vec::len);
        let noted: usize = batch.iter().filter_map(|arrival| arrival.unique.as_ref()).map(noted).sum();
        // Once in the journal and once in the database.
        let wanted_room = 2 * (bytes + noted) as u64 + ROW * batch.len() as u64;
        let has_room = self.has_room(wanted_room, self.quarters());
        // Who has waited behind others for a lock need not wait for it as long once more.
        let waited = batch.iter().map(|arrival| arrival.since).max().map_or(Duration::ZERO, |newest| newest.elapsed());
        // A moment is left: what they waited for may have been the disk, and a lock that is just taken is soon given back.
        self.patience = DATABASE_BUSY.saturating_sub(waited).max(DATABASE_BUSY / 10);
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
            Ok((ids, surplus.delete_alone(connection, most)?))
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
                self.grew(rows, bytes);
            }
            None => {
                self.wanted_room = wanted_room;
                batch.into_iter().for_each(|arrival| tell(arrival.then, Err(unavailable())));
            }
        }
    }

    /// After a commit of so many rows and bytes of text: has the journal moved over beside the writing where it is time.
    fn grew(&mut self, rows: usize, bytes: usize) {
        self.pages += 3 + rows / 8 + 2 * bytes / PAGE;
        if self.checkpoint.take_if(|running| running.is_finished()).is_some() {
            // What came meanwhile is little, and the journal begins anew only when all of it is moved.
            self.open.iter().for_each(|open| drop(move_journal(&open.connection)));
        } else if self.pages >= CHECKPOINT_PAGES && self.checkpoint.is_none() {
            self.pages = 0;
            let (path, state) = (self.path.clone(), Arc::clone(&self.state));
            let checkpoint = thread::Builder::new().name("checkpoint".into()).spawn(move || {
                let _reading = share(&state.reading);
                log_unmoved(&reader(&path, &state).and_then(|connection| move_journal(&connection)));
            });
            self.checkpoint = checkpoint.ok();
        }
    }

    /// Whether so many bytes more fit on the disk, beside the room that is left alone, so many `quarters` of it, and beside
    /// what only the journal has: that must find its place in the database, or nothing could be written any more, not even
    /// what deletes. On a disk that is nearly full it is moved over first. Where something else is wrong the write says so.
    fn has_room(&mut self, bytes: u64, quarters: u64) -> bool {
        let Some(room) = (self.room)(&self.path) else { return true };
        let wanted = bytes.saturating_add(KEPT_ROOM.min(room.total / 16) * quarters / 4);
        if room.left >= wanted.saturating_add(kernel::size(&self.journal)) {
            return true;
        }
        if let Some(running) = self.checkpoint.take() {
            let _ = running.join();
        }
        let (Ok(()), Some(open)) = (self.ready(), &self.open) else { return true };
        // Who reads an old state, such as a backup, keeps the rest of it back.
        let unmoved = move_journal(&open.connection).ok().flatten();
        let unmoved = unmoved.map_or_else(|| kernel::size(&self.journal), |pages| pages * PAGE as u64);
        self.pages = 0;
        let free = open.connection.query_row("PRAGMA freelist_count", [], |row| row.get::<_, i64>(0));
        let free = free.unwrap_or(0) as u64 * PAGE as u64;
        (self.room)(&self.path).is_none_or(|room| room.left + free >= wanted.saturating_add(unmoved))
    }

    /// Quarters of `KEPT_ROOM` that new pairs must leave: one where each replaces an old pair and the file stays as it is.
    fn quarters(&self) -> u64 {
        if self.max_rows > 0 && self.rows >= self.max_rows { 1 } else { 4 }
    }

    /// Forgets some of the requests with an `Idempotency-Key` that nobody may repeat any more; true when there may be more
    /// to do.
    fn forget_remembered(&mut self) -> bool {
        if Instant::now() < self.next_forgetting {
            return false;
        }
        let forgotten = self.transact("cleared of old requests", |connection, _| {
            connection.execute(include_str!("../../sql/queries/forget_remembered.sql"), [FORGET_REQUESTS as i64])
        });
        let more = forgotten == Some(FORGET_REQUESTS);
        if !more {
            self.next_forgetting = Instant::now() + RETENTION_TICK;
        }
        more
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

    /// The open database is still the one at its path. What is written to a deleted file is lost.
    fn is_in_place(&self) -> bool {
        match (&self.open, self.files()) {
            (Some(open), Ok(files)) => open.files == files && (files[1].is_none() || files[2].is_some()),
            // Where the disk does not say, the next write shows what is wrong.
            (open, Err(_)) => open.is_some(),
            (None, Ok(_)) => false,
        }
    }

    fn files(&self) -> io::Result<[Option<u64>; 3]> {
        Ok([kernel::inode(&self.path)?, kernel::inode(&self.journal)?, kernel::inode(&self.journal_index)?])
    }

    /// Lets go of a database that is not in its place any more, while nobody reads. What only its journal has, which may be
    /// deleted, goes over first; a journal that is left must not be taken for that of another database.
    fn let_go(&mut self) {
        self.state.inode.store(0, Ordering::Relaxed);
        // What they wait for may never be indexed there.
        self.searches.clear();
        // What reads by the old index of the journal would keep it for all that this process opens.
        lock(&self.state.readers).clear();
        if let Some(open) = self.open.take() {
            self.last_id = 0;
            if kernel::inode(&self.path).is_ok_and(|now| now != open.files[0]) {
                log::error!(
                    "the database was deleted or replaced, and what is there now is used, or a new one; if that was not \
                     meant, stop the server and restore a backup"
                );
            }
            log_unmoved(&open.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())));
        }
    }

    /// Opens and migrates the database where it is not open, or not the one at its path.
    fn ready(&mut self) -> Result<(), Trouble> {
        if self.is_in_place() {
            return Ok(());
        }
        // Whoever reads meanwhile waits, and finds the database in its place.
        let state = Arc::clone(&self.state);
        let _alone = own(&state.reading);
        self.let_go();
        if self.is_closed {
            return Err(Trouble::Sql(rusqlite::Error::InvalidQuery));
        }
        let place = match kernel::inode(&self.path) {
            Ok(None) => {
                // Before SQLite makes it, since what people ask is for the owner's eyes only.
                let _ = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&self.path);
                kernel::inode(&self.path)
            }
            there => there,
        };
        if !(self.fits)(&self.path, OPENING_ROOM) {
            return Err(Trouble::Sql(disk_full()));
        }
        let mut connection = connect(&self.path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
        schema::check(&connection)?;
        schema::keep_journal(&connection)?;
        // Migrations need not wait for the disk: one that a power cut takes back is made again.
        connection.execute_batch(&format!(
            "PRAGMA synchronous = NORMAL; PRAGMA cache_size = -1024; PRAGMA journal_size_limit = 67108864;
             PRAGMA wal_autocheckpoint = {MOST_PAGES};"
        ))?;
        schema::migrate(&mut connection)?;
        index::teach(&connection)?;
        // A migration may sort what is large; what the index puts by is small, and must not need a folder somewhere else.
        connection.execute_batch("PRAGMA temp_store = MEMORY")?;
        if self.sync == Durability::Full {
            connection.execute_batch("PRAGMA synchronous = FULL")?;
        }
        self.learn(&connection)?;
        let unseen = |_| rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_IOERR), None);
        let (place, files) = (place.map_err(unseen)?, self.files().map_err(unseen)?);
        self.open = Some(Open { connection, files });
        if files[0] != place {
            // Another one came meanwhile: what is open may be gone, and its journal must not be taken for the other's.
            self.let_go();
            return Err(Trouble::Sql(taken_over()));
        }
        self.state.inode.store(files[0].unwrap_or(0), Ordering::Relaxed);
        Ok(())
    }

    /// What is known of the rows; an id that was given is not given again.
    fn learn(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let version = data_version(connection)?;
        let count = || connection.query_row(include_str!("../../sql/queries/count.sql"), [], |row| row.get::<_, i64>(0));
        let rows = if self.max_rows > 0 { count()? as u64 } else { 0 };
        let progress = include_str!("../../sql/queries/progress.sql");
        let (last_id, indexed) = connection.query_row(progress, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        (self.data_version, self.rows, self.last_id, self.indexed) = (version, rows, self.last_id.max(last_id), indexed);
        Ok(())
    }

    /// Learns it anew where another connection wrote, as who deletes or restores by hand does.
    fn look_again(&mut self) {
        let Some(open) = self.open.take() else { return };
        if data_version(&open.connection).is_ok_and(|version| version != self.data_version) {
            // A backup of an older version was restored: to be migrated it is opened anew.
            if schema::is_old(&open.connection) {
                return;
            }
            // The next write says what is wrong.
            let _ = self.learn(&open.connection);
        }
        self.open = Some(open);
    }

    fn close(&mut self) {
        if self.open.is_some() {
            // The newest rows may be deleted before the next start.
            self.transact("closed", |connection, last_id| {
                connection.execute(include_str!("../../sql/queries/given.sql"), [last_id])
            });
        }
        self.is_closed = true;
        if let Some(running) = self.checkpoint.take() {
            let _ = running.join();
        }
        if let Some(open) = self.open.take() {
            let _ = open.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
            if let Err((_, e)) = open.connection.close() {
                log::error!("history was not closed cleanly: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::desk::Desk;
    use super::index::{MOST_UNINDEXED, MOST_UNINDEXED_BYTES};
    use super::*;
    use std::os::unix::fs::MetadataExt;

    use oneshot::{RecvTimeoutError, channel};
    use rusqlite::types::FromSql;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("ai-proxy-{}-{name}.db", std::process::id()))
    }

    /// A writer whose history is a file of its own.
    fn writer(name: &str) -> Writer {
        reopened(path(name))
    }

    fn reopened(path: PathBuf) -> Writer {
        let mut writer = Writer::new(path, Durability::Normal, Arc::default(), Arc::new(Metrics::new(&[], &[])));
        assert!(writer.ready().is_ok());
        writer
    }

    fn remove(mut writer: Writer) {
        let path = writer.path.clone();
        writer.close();
        fs::remove_file(path).expect("the file is there");
    }

    /// What the query says of the writer's database.
    fn told<T: FromSql>(writer: &mut Writer, query: &str) -> T {
        writer.write(|connection| connection.query_row(query, [], |row| row.get(0))).expect("it is told")
    }

    fn change(writer: &mut Writer, sql: &str) {
        writer.write(|connection| connection.execute_batch(sql)).expect("it is changed");
    }

    /// The answer to who asks whether a write works.
    fn works(writer: &mut Writer) -> bool {
        let (done, answer) = channel();
        writer.probe(done);
        answer.recv().expect("an answer")
    }

    fn is_kept(writer: &mut Writer, pair: Pair, unique: Option<Unique>) -> bool {
        let (done, answer) = channel();
        writer.append(vec![Arrival::new(pair, unique, move |result| drop(done.send(result.is_ok())))]);
        answer.recv().expect("an answer")
    }

    fn append(writer: &mut Writer, pairs: usize, bytes: usize) {
        let pair = || Pair { key: "anonymous".into(), question: "w ".repeat(bytes / 2), ..Pair::default() };
        let arrival = |_| Arrival::new(pair(), None, |result| assert!(result.is_ok()));
        writer.append((0..pairs).map(arrival).collect());
    }

    /// Another process has the lock of the database at this path for so long.
    fn locked_for(path: &Path, time: Duration) -> JoinHandle<()> {
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

    #[test]
    fn where_there_are_too_many_each_new_row_makes_room_for_two() {
        let mut writer = writer("room");
        append(&mut writer, 20, 10);
        while writer.index() {}
        writer.max_rows = 6;
        let mut left = Vec::new();
        for new in [1, 5, 1, 3, 3, 1] {
            append(&mut writer, new, 10);
            left.push(writer.rows);
        }
        assert_eq!(left, [19, 14, 13, 10, 7, 6]);
        assert_eq!(told::<i64>(&mut writer, "SELECT count(*) FROM history"), 6);
        let words = "SELECT count(*) FROM history_words WHERE history_words MATCH 'w'";
        assert_eq!(told::<i64>(&mut writer, words), 0);
        while writer.index() {}
        assert_eq!(told::<i64>(&mut writer, words), 6);
        remove(writer);
    }

    #[test]
    fn a_bite_of_the_index_is_so_many_bytes_but_at_least_a_row() {
        let mut writer = writer("bite");
        append(&mut writer, 6, 100 << 10);
        append(&mut writer, 2, 1 << 20);
        append(&mut writer, 700, 2);
        let mut steps = Vec::new();
        while writer.index() {
            steps.push(writer.indexed);
        }
        assert_eq!(steps, [2, 4, 6, 7, 8, 508, 708]);
        append(&mut writer, 10, 2);
        change(&mut writer, "DELETE FROM history WHERE id > 708");
        assert!(writer.index() && !writer.index(), "nothing is left to do");
        remove(writer);
    }

    /// As when somebody gives ids by the clock.
    #[test]
    fn far_between_ids_is_not_far_behind() {
        let mut writer = writer("far");
        append(&mut writer, 1, 2);
        change(&mut writer, "INSERT INTO history VALUES (1760000000000000000, '', '', '', '', '', NULL, NULL, NULL, NULL, 0)");
        append(&mut writer, 1, 2);
        writer.catch_up();
        assert_eq!(writer.indexed, 1760000000000000001, "and there is an end to it");
        remove(writer);
    }

    #[test]
    fn an_index_that_fails_rests_the_longer_the_longer_it_fails_and_no_more_where_pairs_are_kept_again() {
        let mut writer = writer("rest");
        append(&mut writer, 1, 2);
        let full: fn(&Path) -> Option<Room> = |_| Some(Room { left: 0, total: 1 << 30 });
        let roomy = std::mem::replace(&mut writer.room, full);
        for (seconds, next) in [(1, 2), (2, 4), (4, 8)] {
            writer.next_indexing = Instant::now();
            assert!(writer.indexing_rest == Duration::from_secs(seconds) && !writer.index());
            assert!(writer.is_index_failing() && writer.indexing_rest == Duration::from_secs(next));
        }
        writer.attempt("written", |_, _| Err::<(), _>(disk_full()));
        writer.room = roomy;
        append(&mut writer, 1, 2);
        assert!(!writer.is_index_failing() && writer.index());
        assert_eq!((writer.indexed, writer.indexing_rest), (2, INDEXING_REST));
        remove(writer);
    }

    #[test]
    fn what_was_noted_of_a_request_goes_with_its_pair() {
        let mut writer = writer("noted");
        append(&mut writer, 4, 2);
        let note = "INSERT INTO idempotency SELECT 'k', id, '/', x'', NULL, id, unixepoch() + id FROM history";
        let date = "UPDATE history SET created_at = strftime('%Y-%m-%dT%H:%M:%fZ', unixepoch() + id, 'unixepoch')";
        change(&mut writer, &format!("{note}; {date}"));
        let set_back = "UPDATE history SET created_at = '2100-01-01T00:00:00.000Z'";
        for (sql, left) in [
            ("DELETE FROM history WHERE id = 1", "2,3,4"),
            ("DELETE FROM history WHERE id = 3", "2,3,4"),
            ("DELETE FROM history WHERE id = 2", "4"),
            (set_back, "4"),
        ] {
            change(&mut writer, sql);
            writer.next_forgetting = Instant::now();
            assert!(!writer.forget_remembered());
            let ids = "SELECT group_concat(history_id) FROM (SELECT history_id FROM idempotency ORDER BY history_id)";
            assert_eq!(told::<String>(&mut writer, ids), left, "{sql}");
        }
        remove(writer);
    }

    /// Or they would become ever more under a load that brings more in a minute than goes at a time.
    #[test]
    fn what_is_too_old_goes_at_once_however_much_it_is() {
        let mut writer = writer("old");
        append(&mut writer, 120, 2);
        let note = "INSERT INTO idempotency SELECT 'k', id, '/', x'', NULL, id, 0 FROM history";
        let date = "UPDATE history SET created_at = '2000-01-01T00:00:00.000Z'";
        change(&mut writer, &format!("{note}; {date}"));
        writer.max_days = 1;
        writer.next_forgetting = Instant::now();
        while writer.forget_remembered() | writer.retain() {}
        let left = "SELECT (SELECT count(*) FROM idempotency) + (SELECT count(*) FROM history)";
        assert_eq!(told::<i64>(&mut writer, left), 0);
        remove(writer);
    }

    /// As the shell's `.restore` does while the server runs.
    #[test]
    fn a_backup_of_before_that_is_restored_is_migrated() {
        let mut writer = writer("restored");
        append(&mut writer, 1, 2);
        let shell = Connection::open(&writer.path).expect("a file");
        shell.execute_batch("DROP TABLE history_words; PRAGMA user_version = 4").expect("as it was");
        assert!(shell.execute_batch(&schema::MIGRATIONS[4].replace("DROP TABLE history_words;", "")).is_ok());
        drop(shell);
        writer.look_again();
        append(&mut writer, 1, 2);
        assert_eq!(told::<i64>(&mut writer, "PRAGMA user_version"), schema::MIGRATIONS.len() as i64);
        remove(writer);
    }

    #[test]
    fn an_id_is_not_given_again_when_its_row_is_gone() {
        let mut writer = writer("ids");
        append(&mut writer, 3, 2);
        change(&mut writer, "DELETE FROM history");
        append(&mut writer, 2, 2);
        assert_eq!(writer.last_id, 5);
        change(&mut writer, "DELETE FROM history");
        while writer.index() {}
        let path = writer.path.clone();
        writer.close();
        let mut writer = reopened(path);
        append(&mut writer, 1, 2);
        assert_eq!(writer.last_id, 6, "nor after a restart");
        change(&mut writer, "INSERT INTO history VALUES (9, '', '', '', '', '', NULL, NULL, NULL, NULL, 0)");
        append(&mut writer, 1, 2);
        assert_eq!(writer.last_id, 10);
        remove(writer);
    }

    #[test]
    fn a_history_of_before_is_taken_over_with_its_ids() {
        let path = path("before");
        let before = Connection::open(&path).expect("a file");
        for (number, migration) in (1..).zip(&schema::MIGRATIONS[..3]) {
            before.execute_batch(&format!("{migration}; PRAGMA user_version = {number}")).expect("a migration");
        }
        let row =
            "INSERT INTO history (created_at, key_name, question, answer, model, latency_ms) VALUES ('', 'k', 'q', 'a', 'm', 1)";
        before
            .execute_batch(&format!(
                "{row}; {row}; {row}; DELETE FROM history WHERE id = 3; UPDATE indexed SET up_to = 2;
                 CREATE VIEW mine AS SELECT question FROM history"
            ))
            .expect("rows");
        drop(before);
        let mut writer = reopened(path);
        append(&mut writer, 1, 2);
        assert_eq!(told::<String>(&mut writer, "SELECT group_concat(id ORDER BY id) FROM history"), "1,2,4");
        assert_eq!(told::<i64>(&mut writer, "SELECT count(*) FROM mine"), 3, "what others made of it");
        while writer.index() {}
        let found = "SELECT count(*) FROM history_words WHERE history_words MATCH 'q'";
        assert_eq!(told::<i64>(&mut writer, found), 2, "rows that another index had");
        remove(writer);
    }

    #[test]
    fn under_a_load_that_never_pauses_there_are_the_more_bites_the_more_is_not_indexed() {
        let mut writer = writer("load");
        append(&mut writer, 30, 100 << 10);
        writer.catch_up();
        assert_eq!(writer.indexed, 0, "that can wait");
        let (search, _waits) = channel();
        writer.searches.push((30, search));
        writer.catch_up();
        assert_eq!(writer.indexed, 2, "a search cannot");
        writer.unindexed_bytes = 3 * MOST_UNINDEXED_BYTES;
        writer.catch_up();
        assert_eq!(writer.indexed, 8);
        writer.last_id = 8 + 4 * MOST_UNINDEXED;
        writer.catch_up();
        assert_eq!(writer.indexed, 16);
        remove(writer);
    }

    #[test]
    fn searches_go_on_when_they_miss_nothing_or_cannot_be_helped() {
        let mut writer = writer("searches");
        append(&mut writer, 3, 100 << 10);
        let (early, late, gone) = (channel(), channel(), channel());
        writer.searches = vec![(2, early.0), (3, late.0), (3, gone.0)];
        drop(gone.1);
        writer.index();
        writer.let_searches_go();
        assert!(early.1.recv().is_err());
        assert_eq!(writer.searches.len(), 1, "who gave up is forgotten");
        assert_eq!(late.1.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
        writer.state.failing.store(true, Ordering::Relaxed);
        writer.let_searches_go();
        assert_eq!(late.1.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Disconnected));
        remove(writer);
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

    /// What is full could not even delete: the journal must be moved over, and takes some room of its own.
    #[test]
    fn a_nearly_full_disk_takes_what_fits_beside_the_journal_and_what_deleting_frees() {
        let mut writer = writer("nearly-full");
        let pair = || Pair { key: "k".into(), question: "w ".repeat(50_000), ..Pair::default() };
        let kept = |writer: &mut Writer| is_kept(writer, pair(), None);
        for _ in 0..20 {
            assert!(kept(&mut writer));
        }
        let (in_database, in_journal) = (kernel::size(&writer.path), kernel::size(&writer.journal));
        assert!(in_database < 1 << 20 && in_journal > 2 << 20, "{in_database} {in_journal}");
        writer.room = |_| Some(Room { left: KEPT_ROOM + (300 << 10), total: u64::MAX });
        assert!(kept(&mut writer));
        assert!(kernel::size(&writer.path) > in_database + (1 << 20), "the journal is moved over first");
        let backup = Connection::open(&writer.path).expect("a file");
        backup.execute_batch("BEGIN; SELECT count(*) FROM history").expect("a state");
        writer.room = kernel::room;
        for _ in 0..20 {
            assert!(kept(&mut writer));
        }
        writer.room = |_| Some(Room { left: KEPT_ROOM + (1 << 20), total: u64::MAX });
        assert!(!kept(&mut writer), "the journal cannot be moved over, and wants its room");
        drop(backup);
        assert!(kept(&mut writer));
        writer.room = |_| Some(Room { left: KEPT_ROOM + (100 << 10), total: u64::MAX });
        assert!(!kept(&mut writer) && !kept(&mut writer));
        assert!(!works(&mut writer), "the next answer would be paid for in vain");
        writer.max_rows = 41;
        writer.rows = 42;
        assert!(kept(&mut writer), "who takes the place of another needs little");
        writer.max_rows = 10;
        assert!(writer.ready().is_ok());
        while writer.retain() {}
        assert!(kept(&mut writer), "new rows take the place of old ones");
        writer.max_rows = 5;
        writer.room = |_| Some(Room { left: 100 << 10, total: u64::MAX });
        assert!(!writer.index() && !writer.is_index_failing(), "what deletes goes first");
        while writer.retain() {}
        assert!(writer.index());
        writer.room = |_| Some(Room { left: 300 << 10, total: 1 << 20 });
        assert!(kept(&mut writer), "of a small disk less is kept");
        remove(writer);
    }

    #[test]
    fn no_database_is_opened_where_the_journals_index_would_not_fit() {
        let mut writer = writer("no-room");
        writer.open = None;
        let fits = std::mem::replace(&mut writer.fits, |_, bytes| bytes < 64 << 10);
        assert!(writer.prove().is_err_and(|text| text.contains("the disk is full")));
        writer.fits = fits;
        assert_eq!(writer.prove(), Ok(()));
        remove(writer);
    }

    /// It may be much larger than its pair.
    #[test]
    fn what_is_noted_of_a_request_needs_room_too() {
        let mut writer = writer("noted-room");
        writer.room = |_| Some(Room { left: KEPT_ROOM + (1 << 20), total: u64::MAX });
        let unique = Unique { key: "k".into(), path: "/".into(), request: vec![0; 1 << 20], response: None };
        assert!(!is_kept(&mut writer, Pair::default(), Some(unique)));
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
        let holder = locked_for(&writer.path, QUIET);
        assert!(writer.transact("tested", |_, _| Ok(())).is_some(), "what comes then has its own time");
        holder.join().expect("it lets go");
        remove(writer);
    }

    /// Or more would seem to be there than there is, and recent ones would go for that.
    #[test]
    fn of_what_cannot_all_be_deleted_nothing_goes() {
        let mut writer = writer("guarded");
        append(&mut writer, 3, 2);
        let guard = "CREATE TRIGGER guard BEFORE DELETE ON history WHEN old.id = 2 BEGIN SELECT RAISE(ABORT, 'no'); END";
        change(&mut writer, guard);
        writer.max_rows = 1;
        append(&mut writer, 1, 2);
        assert_eq!((told::<i64>(&mut writer, "SELECT count(*) FROM history"), writer.rows), (4, 4));
        remove(writer);
    }

    /// Deleting nothing works on the fullest disk.
    #[test]
    fn housekeeping_does_not_say_that_pairs_can_be_kept() {
        let mut writer = writer("housekeeping");
        writer.state.failing.store(true, Ordering::Relaxed);
        writer.forget_remembered();
        writer.max_rows = 1;
        writer.rows = 2;
        assert!(!writer.retain());
        assert!(writer.state.failing.load(Ordering::Relaxed));
        remove(writer);
    }

    #[test]
    fn rows_of_another_database_are_counted_before_any_goes() {
        let (mut old, mut new) = (writer("counted"), writer("counted-new"));
        append(&mut new, 3, 10);
        let (here, there) = (old.path.clone(), new.path.clone());
        new.close();
        old.max_rows = 5;
        append(&mut old, 5, 10);
        fs::rename(there, here).expect("both are there");
        append(&mut old, 1, 10);
        assert_eq!(told::<i64>(&mut old, "SELECT count(*) FROM history"), 4);
        remove(old);
    }

    /// Whatever is the first to notice it.
    #[test]
    fn what_is_known_of_a_database_that_is_gone_is_not_taken_for_the_next_one() {
        let replaced = |name: &str, rows| {
            let (mut old, mut new) = (writer(name), writer(&format!("{name}-new")));
            append(&mut old, 6, 10);
            append(&mut new, rows, 10);
            change(&mut new, "DELETE FROM history WHERE id > 2");
            let there = new.path.clone();
            new.close();
            fs::rename(there, &old.path).expect("both are there");
            old
        };
        let mut writer = replaced("known-index", 0);
        while writer.index() {}
        append(&mut writer, 3, 10);
        assert!(writer.index(), "the words of the new rows are not in the index yet");
        remove(writer);
        let mut writer = replaced("known-append", 9);
        append(&mut writer, 1, 10);
        assert_eq!(writer.last_id, 10, "9 were given there");
        remove(writer);
        let writer = replaced("known-close", 9);
        let path = {
            let mut writer = writer;
            writer.close();
            writer.path
        };
        let mut writer = reopened(path);
        append(&mut writer, 1, 10);
        assert_eq!(writer.last_id, 10, "9 were given there");
        remove(writer);
    }

    /// Writing would go on in the file that was opened, which is gone, and its journal would be taken for the other's.
    #[test]
    fn a_database_that_comes_while_another_is_opened_is_used_and_stays_whole() {
        let mut writer = writer("moment");
        append(&mut writer, 3, 10);
        let (path, backup) = (writer.path.clone(), writer.path.with_extension("backup"));
        for round in 0..40 {
            let copied: i64 = told(&mut writer, "SELECT count(*) FROM history");
            let shell = Connection::open(&path).expect("a file");
            shell.execute("VACUUM INTO ?1", [backup.to_string_lossy()]).expect("a copy");
            drop(shell);
            [&path, &writer.journal, &writer.journal_index].iter().for_each(|file| drop(fs::remove_file(file)));
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(Duration::from_micros(400 * round));
                    fs::rename(&backup, &path).expect("both are there");
                });
                let _ = writer.ready();
            });
            append(&mut writer, 1, 10);
            let there = Connection::open(&path).expect("a file");
            let rows: i64 = there.query_row("SELECT count(*) FROM history", [], |row| row.get(0)).expect("a number");
            assert_eq!(rows - 1, copied, "round {round}");
        }
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

    /// As where two servers start at once. SQLite waits for other locks by itself, for this one not.
    #[test]
    fn a_new_database_that_another_process_is_just_making_is_waited_for() {
        let path = path("made");
        let holder = locked_for(&path, QUIET);
        let writer = reopened(path);
        holder.join().expect("it lets go");
        remove(writer);
    }

    #[test]
    fn a_link_may_lead_to_a_database_that_is_not_there_yet() {
        let (link, there) = (path("link"), path("behind-link"));
        std::os::unix::fs::symlink(&there, &link).expect("a link");
        let mut writer = Writer::new(link.clone(), Durability::Normal, Arc::default(), Arc::new(Metrics::new(&[], &[])));
        assert_eq!(writer.prove(), Ok(()));
        assert_eq!(fs::metadata(&there).expect("it is there").mode() & 0o777, 0o600, "nor may others read it");
        writer.close();
        [link, there].iter().for_each(|path| fs::remove_file(path).expect("it is there"));
    }

    #[test]
    fn whoever_reads_meanwhile_waits_until_the_database_is_open_again() {
        let mut writer = writer("again");
        let (state, path) = (Arc::clone(&writer.state), writer.path.clone());
        thread::scope(|scope| {
            let reopening = scope.spawn(|| {
                for _ in 0..200 {
                    // As after a write that failed.
                    writer.open = None;
                    assert!(writer.ready().is_ok());
                }
            });
            while !reopening.is_finished() {
                let reading = share(&state.reading);
                assert!(state.is_at(&path), "it was there all the time");
                drop(reading);
                thread::yield_now();
            }
        });
        remove(writer);
    }

    #[test]
    fn commits_wait_for_the_disk_as_they_are_told_to() {
        for (sync, name, level) in [(Durability::Full, "full", 2), (Durability::Normal, "normal", 1)] {
            let mut writer = writer(name);
            (writer.sync, writer.open) = (sync, None);
            assert!(writer.ready().is_ok());
            assert_eq!(told::<i64>(&mut writer, "PRAGMA synchronous"), level);
            remove(writer);
        }
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
