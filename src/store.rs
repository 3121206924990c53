//! The door to the history, and the only place that names rusqlite: one connection writes, committing
//! together what waits together; readers have connections of their own and block it only for a moment where
//! the journal is large. Knows pairs and pages, nothing of HTTP or the LLM.

mod desk;
mod schema;
mod search;
mod writer;

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};

use oneshot::{RecvTimeoutError, Sender};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, ffi, params};

use crate::config::{self, Config};
use crate::error::{ApiError, Code, StartError};
use crate::exchange::{Pair, Usage, size_in_json};
use crate::kernel;
use crate::lock::{lock, share, wait_while};
use crate::metrics::Metrics;
use desk::Desk;
use writer::Writer;

/// A search ranks so many matches, the newest, or as many as are asked for: each costs 2 to 4 us.
const RANKED: u32 = 500;
/// Read connections kept open.
const READERS: usize = 4;
/// How long the end of a stream waits for others, where there are: of 500 that come and go in a second that takes
/// 7 % of the CPU time.
const GATHER: Duration = Duration::from_millis(5);
/// How long `/readyz` waits for the writer.
const PROBE_WAIT: Duration = Duration::from_secs(1);

/// A request that must not be asked twice: what to note beside its pair.
pub struct Unique {
    /// The client's `Idempotency-Key`.
    pub key: String,
    pub path: String,
    pub request: Vec<u8>,
    /// The answer's body, where the pair does not say it all.
    pub response: Option<Vec<u8>>,
}

/// What was noted of such a request, and the pair that answered it.
pub struct Remembered {
    pub path: String,
    pub request: Vec<u8>,
    pub response: Option<Vec<u8>>,
    pub pair: Pair,
}

/// What follows when a pair is committed, or cannot be.
type Then = Box<dyn FnOnce(Result<Pair, ApiError>) + Send>;

/// A pair on its way.
struct Arrival {
    pair: Pair,
    unique: Option<Unique>,
    then: Then,
    since: Instant,
}

impl Arrival {
    fn new(pair: Pair, unique: Option<Unique>, then: impl FnOnce(Result<Pair, ApiError>) + Send + 'static) -> Arrival {
        Arrival { pair, unique, then: Box::new(then), since: Instant::now() }
    }
}

enum Order {
    Append(Box<Arrival>),
    /// Show that writing works.
    Probe(Sender<bool>),
    /// Tell when all words so far are indexed, for a search that is about to be made.
    Index(Sender<()>),
    /// Tell when the database is closed.
    Close(Sender<()>),
}

/// The history's front: cheap to share, safe to use from any thread.
pub struct Store {
    desk: Arc<Desk>,
    path: PathBuf,
    state: Arc<State>,
}

/// What the writer and those who ask it share.
#[derive(Default)]
struct State {
    failing: AtomicBool,
    /// The inode of the database that is open, or was last; 0: none.
    inode: AtomicU64,
    /// Shared by all who use a read connection. Another database at the same path has its journal's index at the same
    /// path, too, and whoever opens it cuts that short, which ends the process where somebody still looks into it
    /// (SIGBUS). So who opens it is alone.
    reading: RwLock<()>,
    /// Read connections that nobody uses, to the database that is open; who opens another lets go of them.
    readers: Mutex<Vec<Connection>>,
    /// A probe is under way; one is enough, and who needs to know waits for what it shows.
    probing: Mutex<bool>,
    probed: Condvar,
}

impl State {
    /// The database at the path is the one that is open, or the disk does not say.
    fn is_at(&self, path: &Path) -> bool {
        kernel::inode(path).map_or(true, |inode| inode.unwrap_or(0) == self.inode.load(Ordering::Relaxed))
    }

    /// No probe is under way any more.
    fn probed(&self) {
        *lock(&self.probing) = false;
        self.probed.notify_all();
    }
}

impl Store {
    /// Opens and migrates the database and starts the writer. Errs with one line that says what to do.
    pub fn open(config: &Config, metrics: Arc<Metrics>) -> Result<Store, StartError> {
        let path = config.database_path.clone();
        let failed = |text: String| StartError::machine(format!("history {}: {text}", path.display()));
        if path.is_dir() {
            return Err(failed("it is a folder; set DATABASE_PATH to a file in it".to_string()));
        }
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(|e| failed(format!("its folder cannot be made: {e}; set DATABASE_PATH")))?;
        }
        let state = Arc::new(State::default());
        let mut writer = Writer::new(path.clone(), config.history_sync, Arc::clone(&state), metrics);
        (writer.max_rows, writer.max_days) = (config.history_max_rows, config.history_max_days);
        writer.prove().map_err(failed)?;
        let desk = Desk::open(writer).map_err(|e| failed(format!("no thread for it: {e}")))?;
        Ok(Store { desk, path, state })
    }

    /// Hands a pair over, with what is to be noted of a request that must not be asked twice. When it is
    /// committed, or with the reason why it is not, `then` is called by whoever wrote it; what comes next waits
    /// meanwhile, so `then` must be quick. `lead`: that may be the caller, where nobody else is writing.
    pub fn append(
        &self,
        pair: Pair,
        unique: Option<Unique>,
        lead: bool,
        then: impl FnOnce(Result<Pair, ApiError>) + Send + 'static,
    ) {
        self.desk.order(Order::Append(Box::new(Arrival::new(pair, unique, then))), lead);
    }

    /// The same, and waits until it is committed.
    pub fn keep(&self, pair: Pair, unique: Option<Unique>, lead: bool) -> Result<Pair, ApiError> {
        let (done, committed) = oneshot::channel();
        self.append(pair, unique, lead, move |stored| drop(done.send(stored)));
        committed.recv().unwrap_or_else(|_| Err(unavailable()))
    }

    /// The same for one of many that are in no hurry: what comes within a moment is committed together, and costs
    /// little more than one.
    pub fn keep_together(&self, pair: Pair) -> Result<Pair, ApiError> {
        let (done, committed) = oneshot::channel();
        let arrival = Arrival::new(pair, None, move |stored| drop(done.send(stored)));
        self.desk.leave(Order::Append(Box::new(arrival)));
        let stored = committed.recv_timeout(GATHER).or_else(|_| {
            self.desk.hurry(false);
            committed.recv()
        });
        stored.unwrap_or_else(|_| Err(unavailable()))
    }

    /// Whether anything is known of a request that this key sent with this `Idempotency-Key`.
    pub fn is_noted(&self, key: &str, idempotency_key: &str) -> Result<bool, ApiError> {
        self.read(|connection| {
            connection.prepare_cached(include_str!("../sql/queries/noted.sql"))?.exists([key, idempotency_key])
        })
    }

    /// What answered the request that this key sent with this `Idempotency-Key` within the last day.
    pub fn remembered(&self, key: &str, idempotency_key: &str) -> Result<Option<Remembered>, ApiError> {
        self.read(|connection| {
            let mut remembered = connection.prepare_cached(include_str!("../sql/queries/remembered.sql"))?;
            let found = remembered.query_row([key, idempotency_key], |row| {
                Ok(Remembered { pair: pair(row)?, path: row.get(10)?, request: row.get(11)?, response: row.get(12)? })
            });
            found.optional()
        })
    }

    /// True when a write works: tried anew unless one just did. Waits at most a second.
    pub fn writable(&self) -> bool {
        let mut probing = lock(&self.state.probing);
        if *probing {
            // Where all was well, or it is so again when the other's probe is over.
            let waits = |probing: &mut bool| *probing && self.is_failing();
            drop(wait_while(&self.state.probed, probing, PROBE_WAIT, waits));
            return !self.is_failing();
        }
        *probing = true;
        drop(probing);
        self.probe().unwrap_or_else(|nothing| {
            if nothing == RecvTimeoutError::Disconnected {
                // The writer is gone, so nobody else would tell.
                self.state.failing.store(true, Ordering::Relaxed);
            }
            self.state.probed();
            false
        })
    }

    /// The last write failed.
    pub fn is_failing(&self) -> bool {
        self.state.failing.load(Ordering::Relaxed)
    }

    /// Errs with `history_unavailable` where the last write failed and another try fails too, so that
    /// nobody pays for an answer that cannot be kept.
    pub fn check(&self) -> Result<(), ApiError> {
        if self.is_failing() && !self.writable() { Err(unavailable()) } else { Ok(()) }
    }

    /// A key's pairs with ids below `before`, newest first, at most `limit` and 4 MiB of JSON, where the first is
    /// always there; and whether there are more.
    pub fn page(&self, key: &str, before: i64, limit: u32) -> Result<(Vec<Pair>, bool), ApiError> {
        self.read(|connection| {
            let mut page = connection.prepare_cached(include_str!("../sql/queries/page.sql"))?;
            bounded(page.query_map(params![key, before, limit + 1], pair)?, limit)
        })
    }

    /// Waits until the words so far are indexed, for a search, but not for long: where there is very much of
    /// them, or the writer is in trouble, the newest pairs are not found.
    pub fn await_index(&self) {
        let (done, indexed) = oneshot::channel();
        self.desk.order(Order::Index(done), false);
        let _ = indexed.recv_timeout(config::DATABASE_BUSY);
    }

    /// A key's pairs that have all of `words` in question or answer, best match first: of the newest 500
    /// matches, or `limit` where that is more, or 4 MiB of them, those where the words are most of the text.
    pub fn search(&self, key: &str, words: &str, before: i64, limit: u32) -> Result<Vec<Pair>, ApiError> {
        let words = search::plain(words);
        let words = search::wanted(&words);
        let Some(query) = search::match_expression(&words) else { return Ok(Vec::new()) };
        let ranked = limit.max(RANKED);
        let mut found = self.read(|connection| {
            let is_rare = || {
                let mut matches = connection.prepare_cached(include_str!("../sql/queries/count_matches.sql"))?;
                matches.query_row(params![query, before, ranked], |row| Ok(row.get::<_, u32>(0)? < ranked))
            };
            // Where many match, the index picks out the key's own; of few, the rows tell sooner.
            let query = if is_rare()? { query } else { search::among_own(key, &query) };
            let mut search = connection.prepare_cached(include_str!("../sql/queries/search.sql"))?;
            Ok(bounded(search.query_map(params![query, before, key, ranked], pair)?, ranked)?.0)
        })?;
        search::rank(&mut found, &words);
        found.truncate(limit as usize);
        Ok(found)
    }

    /// Writes what was handed over, closes the database and ends the writer.
    pub fn close(&self) {
        lock(&self.state.readers).clear();
        let (done, closed) = oneshot::channel();
        self.desk.order(Order::Close(done), false);
        let _ = closed.recv();
    }

    /// Has the writer look at the database that has come to the path.
    fn notice(&self) {
        if self.is_failing() {
            self.writable();
        } else {
            let _ = self.probe();
        }
    }

    /// Has the writer show that writing works.
    fn probe(&self) -> Result<bool, RecvTimeoutError> {
        let (done, answer) = oneshot::channel();
        self.desk.order(Order::Probe(done), false);
        answer.recv_timeout(PROBE_WAIT)
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, ApiError> {
        let mut reading = share(&self.state.reading);
        if !self.state.is_at(&self.path) {
            drop(reading);
            self.notice();
            reading = share(&self.state.reading);
            if !self.state.is_at(&self.path) {
                // The writer has said why.
                return Err(unavailable());
            }
        }
        let kept = lock(&self.state.readers).pop().map(Ok);
        let result = kept.unwrap_or_else(|| reader(&self.path, &self.state)).and_then(|connection| {
            let found = query(&connection)?;
            let mut readers = lock(&self.state.readers);
            if readers.len() < READERS {
                readers.push(connection);
            }
            Ok(found)
        });
        drop(reading);
        result.map_err(|e| {
            log::error!("history cannot be read: {}", schema::advice(&e.into()));
            unavailable()
        })
    }
}

/// The error for a pair that cannot be kept or found.
fn unavailable() -> ApiError {
    ApiError::new(Code::HISTORY_UNAVAILABLE, "the history cannot be written or read at the moment; the server's log says why")
}

/// At most so many rows, as far as they fit in an answer, since pairs may be large; and whether there are more.
fn bounded(rows: impl Iterator<Item = rusqlite::Result<Pair>>, limit: u32) -> rusqlite::Result<(Vec<Pair>, bool)> {
    const MOST: usize = 4 << 20;
    let (mut kept, mut bytes) = (Vec::new(), 0);
    for row in rows {
        let row = row?;
        let texts = [&*row.question, &row.answer, &row.model, row.finish_reason.as_deref().unwrap_or_default()];
        bytes += texts.into_iter().map(size_in_json).sum::<usize>();
        if kept.len() == limit as usize || bytes > MOST && !kept.is_empty() {
            return Ok((kept, true));
        }
        kept.push(row);
    }
    Ok((kept, false))
}

/// A row as a pair. By hand anything can be written, and one row must not cost a page.
fn pair(row: &Row) -> rusqlite::Result<Pair> {
    let text = |column| Ok::<_, rusqlite::Error>(row.get_ref(column)?.as_bytes_or_null()?.map(String::from_utf8_lossy));
    let whole = |column| Ok::<_, rusqlite::Error>(text(column)?.unwrap_or_default().into_owned());
    let count = |column| row.get::<_, Option<i64>>(column).map(|n| n.map(|n| n.max(0) as u64));
    let usage = match (count(6)?, count(7)?, count(8)?) {
        (Some(prompt_tokens), Some(completion_tokens), Some(total_tokens)) => {
            Some(Usage { prompt_tokens, completion_tokens, total_tokens })
        }
        _ => None,
    };
    Ok(Pair {
        id: row.get(0)?,
        key: Arc::default(),
        created_at: whole(1)?,
        question: whole(2)?,
        answer: whole(3)?,
        model: whole(4)?,
        finish_reason: text(5)?.map(Cow::into_owned),
        usage,
        latency_ms: count(9)?.unwrap_or(0),
    })
}

/// A read connection, for who shares `state.reading`, to the database that the writer has open.
fn reader(path: &Path, state: &State) -> rusqlite::Result<Connection> {
    let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    // Looked at after it is open, and before anything is read.
    if !state.is_at(path) {
        return Err(taken_over());
    }
    connection.execute_batch("PRAGMA query_only = on; PRAGMA cache_size = -1024; PRAGMA temp_store = MEMORY;")?;
    Ok(connection)
}

/// What was opened is not what is at the path.
fn taken_over() -> rusqlite::Error {
    let text = "another database has taken its place";
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_ABORT), Some(text.to_string()))
}

fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(config::DATABASE_BUSY)?;
    // Otherwise a kept statement is planned anew for each value that it is given, a quarter of a search's time.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // What others add to the database must not keep retention from deleting.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, false)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever opens another database at the same path would pull the index of the journal from under who reads.
    #[test]
    fn who_reads_is_waited_for_before_another_database_is_opened() {
        let path = std::env::temp_dir().join(format!("ai-proxy-{}-replaced.db", std::process::id()));
        let (state, metrics) = (Arc::new(State::default()), Arc::new(Metrics::new(&[], &[])));
        let mut writer = Writer::new(path.clone(), config::Durability::Normal, Arc::clone(&state), metrics);
        assert_eq!(writer.prove(), Ok(()));
        let store = Store { desk: Desk::open(writer).expect("a thread"), path: path.clone(), state };
        let keep = || store.keep(Pair { key: "k".into(), ..Pair::default() }, None, false).is_ok();
        let count =
            |connection: &Connection| connection.query_row("SELECT count(*) FROM history", [], |row| row.get::<_, i64>(0));
        assert!(keep());
        let other = path.with_extension("other");
        let copied = Connection::open(&path).and_then(|shell| shell.execute("VACUUM INTO ?1", [other.to_string_lossy()]));
        assert!(copied.is_ok());
        let read = store.read(|connection| {
            let before = count(connection)?;
            fs::rename(&other, &path).expect("it is there");
            assert!(!store.writable(), "it is not opened yet");
            Ok((before, count(connection)?))
        });
        assert_eq!(read.expect("it is read"), (1, 1));
        assert!(keep() && keep());
        assert_eq!(store.read(count).expect("it is read"), 3);
        store.close();
        fs::remove_file(path).expect("it is there");
    }
}
