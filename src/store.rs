//! The door to the history, and the only file that names rusqlite: one thread writes, committing
//! together what waits together; readers have connections of their own and never block it. Knows pairs
//! and pages, nothing of HTTP or the LLM.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError, Sender, TryRecvError, unbounded};
use rusqlite::{Connection, OpenFlags, Row, params};

use crate::config::{self, Config, Sync};
use crate::error::{ApiError, Code, StartError};
use crate::exchange::{Exchange, Pair, Usage};
use crate::handoff::{Giver, Nothing, handoff};
use crate::metrics::Metrics;

/// Numbered from 1; the database's `user_version` is the number of the last one applied.
const MIGRATIONS: &[&str] = &[
    include_str!("../sql/migrations/0001_history.sql"),
    include_str!("../sql/migrations/0002_idempotency.sql"),
    include_str!("../sql/migrations/0003_deletemerge.sql"),
    include_str!("../sql/migrations/0004_ids.sql"),
];

/// At most so many pairs in one transaction.
const BATCH: usize = 1000;
/// The journal is moved over when it has so many pages of 4 KiB: with SQLite's default of 1,000 one question in
/// a hundred waits for that.
const CHECKPOINT_PAGES: u32 = 4000;
/// The writer does its housekeeping when nothing came for this long.
const QUIET: Duration = Duration::from_millis(100);
/// Housekeeping takes so many rows at a time, so that a new pair never waits long.
const CHORE_ROWS: i64 = 500;
/// The index takes no more bytes of text at a time, but at least one row.
const CHORE_BYTES: i64 = 256 << 10;
/// Words of more rows than this are not left for quiet times.
const MOST_UNINDEXED: i64 = 200_000;
/// The same in bytes of text.
const MOST_UNINDEXED_BYTES: i64 = 64 << 20;
/// So many words of a query count.
const MOST_WORDS: usize = 32;
/// And so many of its bytes, since FTS5 may see several words where we see one.
const MOST_QUERY: usize = 512;
/// How often retention looks at the clock.
const RETENTION_TICK: Duration = Duration::from_secs(60);
/// Read connections kept open.
const READERS: usize = 4;
/// How long `/readyz` waits for the writer.
const PROBE_WAIT: Duration = Duration::from_secs(1);

/// A request that must not be asked twice: what to note beside its pair.
pub struct Unique {
    /// The client's `Idempotency-Key`.
    pub key: String,
    pub path: &'static str,
    pub request: Vec<u8>,
    /// The answer's body, where the pair does not say it all.
    pub response: Option<Vec<u8>>,
}

/// What was noted of such a request, and the pair that answered it.
pub struct Remembered {
    pub path: String,
    pub request: Vec<u8>,
    pub response: Option<Vec<u8>>,
    pub exchange: Exchange,
}

/// What follows when a pair is committed, or cannot be.
type Then = Box<dyn FnOnce(Result<Exchange, ApiError>) + Send>;

/// A pair on its way.
struct Arrival {
    pair: Pair,
    unique: Option<Unique>,
    then: Then,
}

enum Order {
    Append(Box<Arrival>),
    /// Show that writing works.
    Probe(Giver<bool>),
    /// Tell when all words so far are indexed, for a search that is about to be made.
    Index(Giver<()>),
    Close,
}

/// The history's front: cheap to share, safe to use from any thread.
pub struct Store {
    orders: Sender<Order>,
    /// The writer sleeps where its inbox is empty; whoever fills it wakes it.
    wake: Thread,
    readers: Mutex<Vec<(u64, Connection)>>,
    path: PathBuf,
    state: Arc<State>,
    /// All pairs are one key's, but for those of keys that are no longer in use.
    one_key: bool,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What the writer tells about itself.
#[derive(Default)]
struct State {
    failing: AtomicBool,
    /// How often the database was opened: readers of an earlier opening are of no use.
    opening: AtomicU64,
    /// A probe is under way; one is enough.
    probing: AtomicBool,
}

impl Store {
    /// Opens and migrates the database and starts the writer. Errs with one line that says what to do.
    pub fn open(config: &Config, metrics: Arc<Metrics>) -> Result<Store, StartError> {
        let path = config.database_path.clone();
        let failed = |text: String| StartError::machine(format!("history {}: {text}", path.display()));
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(|e| failed(format!("its folder cannot be made: {e}; set DATABASE_PATH")))?;
        }
        let state = Arc::new(State::default());
        let mut writer = Writer::new(path.clone(), config.history_sync, Arc::clone(&state), metrics);
        (writer.max_rows, writer.max_days) = (config.history_max_rows, config.history_max_days);
        writer.ready().map_err(|e| failed(advice(&e)))?;
        writer
            .write(|connection| connection.execute_batch(include_str!("../sql/queries/probe.sql")))
            .map_err(|e| failed(advice(&Trouble::Sql(e))))?;
        let (orders, inbox) = unbounded();
        let thread = std::thread::Builder::new().name("history".into()).spawn(move || writer.run(&inbox));
        let thread = thread.map_err(|e| failed(format!("no thread for it: {e}")))?;
        let wake = thread.thread().clone();
        Ok(Store {
            orders,
            wake,
            readers: Mutex::default(),
            path,
            state,
            one_key: config.api_keys.len() <= 1,
            writer: Mutex::new(Some(thread)),
        })
    }

    /// Hands a pair over, with what is to be noted of a request that must not be asked twice. The writer calls
    /// `then` when it is committed, or with the reason why it is not; what comes next waits meanwhile, so
    /// `then` must be quick.
    pub fn append(&self, pair: Pair, unique: Option<Unique>, then: impl FnOnce(Result<Exchange, ApiError>) + Send + 'static) {
        self.order(Order::Append(Box::new(Arrival { pair, unique, then: Box::new(then) })));
    }

    /// The same, and waits until it is committed.
    pub fn keep(&self, pair: Pair, unique: Option<Unique>) -> Result<Exchange, ApiError> {
        let (done, committed) = handoff();
        self.append(pair, unique, move |stored| drop(done.give(stored)));
        committed.take().unwrap_or_else(|| Err(unavailable()))
    }

    /// What answered the request that this key sent with this `Idempotency-Key` within the last day.
    pub fn remembered(&self, key: &str, idempotency_key: &str) -> Result<Option<Remembered>, ApiError> {
        self.read(|connection| {
            let mut remembered = connection.prepare_cached(include_str!("../sql/queries/remembered.sql"))?;
            let found = remembered.query_row([key, idempotency_key], |row| {
                Ok(Remembered { exchange: exchange(row)?, path: row.get(10)?, request: row.get(11)?, response: row.get(12)? })
            });
            match found {
                Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
                found => found.map(Some),
            }
        })
    }

    /// True when a write works: tried anew unless one just did. Waits at most a second.
    pub fn writable(&self) -> bool {
        if self.state.probing.swap(true, Ordering::Relaxed) {
            return !self.state.failing.load(Ordering::Relaxed);
        }
        let (done, answer) = handoff();
        self.order(Order::Probe(done));
        answer.take_within(PROBE_WAIT).unwrap_or_else(|nothing| {
            if nothing == Nothing::Ever {
                // The writer is gone, so nobody else would tell.
                self.state.failing.store(true, Ordering::Relaxed);
            }
            self.state.probing.store(false, Ordering::Relaxed);
            false
        })
    }

    /// Errs with `history_unavailable` where the last write failed and another try fails too, so that
    /// nobody pays for an answer that cannot be kept.
    pub fn check(&self) -> Result<(), ApiError> {
        if self.state.failing.load(Ordering::Relaxed) && !self.writable() { Err(unavailable()) } else { Ok(()) }
    }

    /// A key's pairs with ids below `before`, newest first, at most `limit` and 4 MiB of JSON; the first is
    /// always there.
    pub fn page(&self, key: &str, before: i64, limit: u32) -> Result<Vec<Exchange>, ApiError> {
        self.read(|connection| {
            let mut page = connection.prepare_cached(include_str!("../sql/queries/page.sql"))?;
            bounded(page.query_map(params![key, before, limit], exchange)?)
        })
    }

    /// Waits until the words so far are indexed, for a search, but not for long: where there is very much of
    /// them, or the writer is in trouble, the newest pairs are not found.
    pub fn await_index(&self) {
        let (done, indexed) = handoff();
        self.order(Order::Index(done));
        let _ = indexed.take_within(config::DATABASE_BUSY);
    }

    /// A key's pairs that have all of `words` in question or answer, best match first: of the newest 1,000
    /// matches, or 4 MiB of them, those where the words are most of the text.
    pub fn search(&self, key: &str, words: &str, before: i64, limit: u32) -> Result<Vec<Exchange>, ApiError> {
        let words = wanted(words);
        let Some(query) = match_expression(key, &words, self.one_key) else { return Ok(Vec::new()) };
        let mut found = self.read(|connection| {
            let mut search = connection.prepare_cached(include_str!("../sql/queries/search.sql"))?;
            bounded(search.query_map(params![query, before, key], exchange)?)
        })?;
        let words: Vec<String> = words.iter().map(|word| word.to_lowercase()).collect();
        found.sort_by_cached_key(|pair| std::cmp::Reverse((score(pair, &words), pair.id)));
        found.truncate(limit as usize);
        Ok(found)
    }

    /// Writes what was handed over, closes the database and ends the writer.
    pub fn close(&self) {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.order(Order::Close);
        if let Some(writer) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = writer.join();
        }
    }

    fn order(&self, order: Order) {
        if let Err(SendError(Order::Append(arrival))) = self.orders.send(order) {
            (arrival.then)(Err(unavailable()));
        }
        self.wake.unpark();
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, ApiError> {
        let opening = self.state.opening.load(Ordering::Relaxed);
        let kept = self.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let kept = kept.filter(|(of, _)| *of == opening).map(|(_, connection)| Ok(connection));
        let result = kept.unwrap_or_else(|| reader(&self.path)).and_then(|connection| {
            let found = query(&connection)?;
            let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
            if readers.len() < READERS {
                readers.push((opening, connection));
            }
            Ok(found)
        });
        result.map_err(|e| {
            log::error!("history cannot be read: {e}");
            unavailable()
        })
    }
}

/// The error for a pair that cannot be kept or found.
fn unavailable() -> ApiError {
    ApiError::new(Code::HistoryUnavailable, "the history cannot be written or read at the moment; the server's log says why")
}

/// The words of a query, each once, as far as they count: a search costs words times text.
fn wanted(text: &str) -> Vec<&str> {
    let (mut count, mut start, mut inside) = (0, 0, false);
    // What punctuation divides counts in parts, since FTS5 looks for each. Half a word would find nothing.
    let too_much = text.char_indices().any(|(at, c)| {
        if c.is_alphanumeric() && !inside {
            (count, start) = (count + 1, at);
        }
        inside = c.is_alphanumeric();
        count > MOST_WORDS || inside && at >= MOST_QUERY
    });
    let text = if too_much { &text[..start] } else { text };
    let mut words: Vec<&str> = Vec::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if word.contains(char::is_alphanumeric) && !words.iter().any(|known| known.eq_ignore_ascii_case(word)) {
            words.push(word);
        }
    }
    words
}

/// Any words as an FTS5 query: in quotes, all of them needed; FTS5 itself splits them further. Where there
/// is more than one key its own rows are picked out by the index, too. `None` where there are no words
/// (<https://sqlite.org/fts5.html#full_text_query_syntax>).
fn match_expression(key: &str, words: &[&str], one_key: bool) -> Option<String> {
    if words.is_empty() {
        return None;
    }
    let words: Vec<String> = words.iter().map(|w| format!("\"{}\"", w.replace('"', "\"\""))).collect();
    let words = format!("{{question answer}} : ({})", words.join(" AND "));
    if one_key {
        return Some(words);
    }
    let key: String = key.bytes().map(|b| format!("{b:02X}")).collect();
    Some(format!("key : \"{key}\" AND {words}"))
}

/// How well a pair matches, in thousandths: the occurrences of the words against the length of the text,
/// as BM25 weighs them. FTS5's own bm25() counts the matches in the whole history first.
fn score(pair: &Exchange, words: &[String]) -> u64 {
    let text = format!("{} {}", pair.question, pair.answer).to_lowercase();
    let length = text.len() as f64 / 500.0;
    let weights = words.iter().map(|word| {
        let count = text.matches(word.as_str()).count() as f64;
        count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length))
    });
    (weights.sum::<f64>() * 1000.0) as u64
}

/// The rows as far as they fit in an answer: pairs may be large.
fn bounded(rows: impl Iterator<Item = rusqlite::Result<Exchange>>) -> rusqlite::Result<Vec<Exchange>> {
    const MOST: usize = 4 << 20;
    let (mut kept, mut bytes) = (Vec::new(), 0);
    for row in rows {
        let row = row?;
        let texts = [&*row.question, &row.answer, &row.model, row.finish_reason.as_deref().unwrap_or_default()];
        bytes += texts.into_iter().map(escaped_length).sum::<usize>();
        if bytes > MOST && !kept.is_empty() {
            break;
        }
        kept.push(row);
    }
    Ok(kept)
}

/// How long a text is as JSON: six bytes for some characters, two for others.
fn escaped_length(text: &str) -> usize {
    let length = |byte| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0x00..0x20 => 6,
        _ => 1,
    };
    text.bytes().map(length).sum()
}

fn exchange(row: &Row) -> rusqlite::Result<Exchange> {
    let count = |column| row.get::<_, Option<i64>>(column).map(|n| n.map(|n| n as u64));
    let usage = match (count(6)?, count(7)?, count(8)?) {
        (Some(prompt_tokens), Some(completion_tokens), Some(total_tokens)) => {
            Some(Usage { prompt_tokens, completion_tokens, total_tokens })
        }
        _ => None,
    };
    Ok(Exchange {
        id: row.get(0)?,
        created_at: row.get(1)?,
        question: row.get(2)?,
        answer: row.get(3)?,
        model: row.get(4)?,
        finish_reason: row.get(5)?,
        usage,
        latency_ms: row.get::<_, i64>(9)? as u64,
    })
}

fn reader(path: &Path) -> rusqlite::Result<Connection> {
    let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.execute_batch("PRAGMA query_only = on; PRAGMA cache_size = -1024;")?;
    Ok(connection)
}

fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(config::DATABASE_BUSY)?;
    Ok(connection)
}

/// Why the database is not ready.
enum Trouble {
    Sql(rusqlite::Error),
    Newer(i64),
}

impl From<rusqlite::Error> for Trouble {
    fn from(e: rusqlite::Error) -> Trouble {
        Trouble::Sql(e)
    }
}

/// The trouble in words, with what to do about it.
fn advice(trouble: &Trouble) -> String {
    use rusqlite::ErrorCode::{
        CannotOpen, DatabaseBusy, DatabaseCorrupt, DatabaseLocked, DiskFull, NotADatabase, PermissionDenied, ReadOnly,
        SystemIoFailure,
    };
    let e = match trouble {
        Trouble::Newer(version) => {
            return format!(
                "it is of version {version}, made by a newer program than this one, which knows {}; run that program, or set DATABASE_PATH",
                MIGRATIONS.len()
            );
        }
        Trouble::Sql(e) => e,
    };
    let what = match e.sqlite_error_code() {
        Some(CannotOpen | PermissionDenied | ReadOnly) => {
            "it cannot be written; check the rights of file and folder, or set DATABASE_PATH"
        }
        Some(NotADatabase | DatabaseCorrupt) => {
            "it is damaged or no SQLite database; move it away and start again, or restore a backup"
        }
        Some(DatabaseBusy | DatabaseLocked) => "another process holds its lock; end that process",
        Some(DiskFull | SystemIoFailure) => "the disk is full or failing; make room",
        _ => "it cannot be used",
    };
    format!("{what} ({e})")
}

/// The last of the rows that are indexed next, and the bytes of their texts; `None` where there are no rows.
fn bite(connection: &Connection) -> rusqlite::Result<Option<(i64, i64)>> {
    let mut next = connection.prepare_cached(include_str!("../sql/queries/index_next.sql"))?;
    let mut rows = next.query([CHORE_ROWS])?;
    let mut bite: Option<(i64, i64)> = None;
    while let Some(row) = rows.next()? {
        let bytes = row.get::<_, i64>(1)? + bite.map_or(0, |(_, bytes)| bytes);
        if bite.is_some() && bytes > CHORE_BYTES {
            break;
        }
        bite = Some((row.get(0)?, bytes));
    }
    Ok(bite)
}

/// A panic in what follows costs this one request, not the history.
fn tell(then: Then, result: Result<Exchange, ApiError>) {
    let _ = catch_unwind(AssertUnwindSafe(|| then(result)));
}

struct Open {
    connection: Connection,
    inode: u64,
}

/// The one thread that writes.
struct Writer {
    path: PathBuf,
    sync: Sync,
    max_rows: u64,
    max_days: u64,
    state: Arc<State>,
    metrics: Arc<Metrics>,
    /// `None` after a failure: what comes next opens the database anew.
    open: Option<Open>,
    last_write: Instant,
    /// Rows in the table; kept only where their number is limited.
    rows: u64,
    /// The last id that was given, and the last one whose words are indexed.
    last_id: i64,
    indexed: i64,
    /// What was appended since the start and is not indexed, in bytes of text.
    unindexed_bytes: i64,
    /// Searches that wait until the words up to a row are indexed.
    searches: Vec<(i64, Giver<()>)>,
    next_retention: Instant,
    next_forgetting: Instant,
}

impl Writer {
    /// A writer that keeps everything and has not opened its database yet.
    fn new(path: PathBuf, sync: Sync, state: Arc<State>, metrics: Arc<Metrics>) -> Writer {
        Writer {
            path,
            sync,
            max_rows: 0,
            max_days: 0,
            state,
            metrics,
            open: None,
            last_write: Instant::now(),
            rows: 0,
            last_id: 0,
            indexed: 0,
            unindexed_bytes: 0,
            searches: Vec::new(),
            next_retention: Instant::now(),
            next_forgetting: Instant::now(),
        }
    }

    fn run(mut self, inbox: &Receiver<Order>) {
        let mut batch = Vec::new();
        let mut quiet_since = Instant::now();
        loop {
            let order = match inbox.try_recv() {
                Ok(Order::Append(arrival)) => {
                    batch.push(*arrival);
                    if batch.len() < BATCH {
                        continue;
                    }
                    None
                }
                Ok(order) => Some(order),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => Some(Order::Close),
            };
            if !batch.is_empty() {
                self.append(std::mem::take(&mut batch));
                // What waited for quiet would never come under a steady load.
                self.catch_up();
                self.retain();
                quiet_since = Instant::now();
            } else if order.is_none() {
                if self.searches.is_empty() && quiet_since.elapsed() < QUIET {
                    std::thread::park_timeout(QUIET);
                } else if !self.chores() {
                    std::thread::park_timeout(RETENTION_TICK);
                }
            }
            if order.is_some_and(|order| self.obey(order)) {
                return self.close();
            }
            self.let_searches_go();
        }
    }

    /// What waits for a quiet moment; true when there may be more to do.
    fn chores(&mut self) -> bool {
        self.forget_remembered();
        self.index() | self.retain()
    }

    /// Does what is not an append; true when it was the last order.
    fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Append(arrival) => self.append(vec![*arrival]),
            Order::Probe(done) => {
                let fresh = !self.state.failing.load(Ordering::Relaxed) && self.last_write.elapsed() < PROBE_WAIT;
                let probe = include_str!("../sql/queries/probe.sql");
                let fine =
                    fresh && self.is_in_place() || self.attempt("probed", |connection| connection.execute_batch(probe)).is_some();
                self.state.probing.store(false, Ordering::Relaxed);
                let _ = done.give(fine);
            }
            Order::Index(done) => self.searches.push((self.last_id, done)),
            Order::Close => return true,
        }
        false
    }

    /// Commits the pairs together, then does what follows for each.
    fn append(&mut self, batch: Vec<Arrival>) {
        let began = Instant::now();
        let last_id = self.last_id;
        let bytes: usize = batch.iter().map(|arrival| arrival.pair.question.len() + arrival.pair.answer.len()).sum();
        let ids = self.attempt("written", |connection| {
            let mut append = connection.prepare_cached(include_str!("../sql/queries/append.sql"))?;
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
                    let mut remember = connection.prepare_cached(include_str!("../sql/queries/remember.sql"))?;
                    remember.execute(params![&*pair.key, key, path, request, response, id])?;
                }
                ids.push(id);
            }
            Ok(ids)
        });
        match ids {
            Some(ids) => {
                self.metrics.history_commits.inc();
                self.metrics.history_rows.add(ids.len() as u64);
                self.metrics.history_batch_size.observe_value(ids.len() as f64);
                self.metrics.history_commit.observe(began.elapsed());
                self.rows += ids.len() as u64;
                self.unindexed_bytes += bytes as i64;
                self.last_id = ids.last().copied().unwrap_or(self.last_id);
                for (arrival, id) in batch.into_iter().zip(ids) {
                    tell(arrival.then, Ok(Exchange::new(id, arrival.pair)));
                }
            }
            None => batch.into_iter().for_each(|arrival| tell(arrival.then, Err(unavailable()))),
        }
    }

    /// Under a load that never pauses: one bite of the index after each batch where a search waits for it. Where
    /// very much is not indexed, the more bites the more that is, so that it does not grow for ever.
    fn catch_up(&mut self) {
        let behind = ((self.last_id - self.indexed) / MOST_UNINDEXED).max(self.unindexed_bytes / MOST_UNINDEXED_BYTES);
        for _ in 0..behind.max(i64::from(!self.searches.is_empty())) {
            self.index();
        }
    }

    /// Indexes the words of some rows, one bite; true when there may be more to do.
    fn index(&mut self) -> bool {
        if self.indexed >= self.last_id || self.state.failing.load(Ordering::Relaxed) {
            return false;
        }
        let last_id = self.last_id;
        let done = self.attempt("indexed", |connection| {
            let Some((up_to, bytes)) = bite(connection)? else {
                // The newest rows were deleted before they were indexed; their ids are not given again.
                connection.prepare_cached(include_str!("../sql/queries/indexed_up_to.sql"))?.execute([last_id])?;
                return Ok(None);
            };
            connection.prepare_cached(include_str!("../sql/queries/index_words.sql"))?.execute([up_to])?;
            connection.prepare_cached(include_str!("../sql/queries/indexed_up_to.sql"))?.execute([up_to])?;
            Ok(Some((up_to, bytes)))
        });
        if let Some(bitten) = done {
            let (up_to, bytes) = bitten.unwrap_or((last_id, 0));
            self.indexed = up_to;
            self.unindexed_bytes = if up_to < self.last_id { (self.unindexed_bytes - bytes).max(0) } else { 0 };
        }
        done.is_some()
    }

    /// Tells the searches that miss nothing any more, and all of them where indexing fails. Who gave up waiting is
    /// forgotten.
    fn let_searches_go(&mut self) {
        let failing = self.state.failing.load(Ordering::Relaxed);
        // A giver that is dropped wakes who waits.
        self.searches.retain(|(up_to, search)| *up_to > self.indexed && !failing && search.is_awaited());
    }

    /// Deletes some of what retention says has to go; true when there may be more to do.
    fn retain(&mut self) -> bool {
        let too_many = if self.max_rows > 0 { self.rows.saturating_sub(self.max_rows).min(CHORE_ROWS as u64) } else { 0 };
        let look_at_age = self.max_days > 0 && Instant::now() >= self.next_retention;
        if too_many == 0 && !look_at_age {
            return false;
        }
        let max_days = self.max_days;
        let forgotten = self.attempt("pruned", |connection| {
            let mut last: Option<i64> = None;
            if too_many > 0 {
                last = connection
                    .query_row(include_str!("../sql/queries/oldest_over_count.sql"), [too_many as i64], |row| row.get(0))?;
            }
            if look_at_age {
                let query = include_str!("../sql/queries/oldest_over_age.sql");
                let aged: Option<i64> = connection.query_row(query, [CHORE_ROWS, max_days as i64], |row| row.get(0))?;
                last = last.max(aged);
            }
            let Some(last) = last else { return Ok(0) };
            connection.prepare_cached(include_str!("../sql/queries/forget_words.sql"))?.execute([last])?;
            connection.prepare_cached(include_str!("../sql/queries/forget.sql"))?.execute([last])
        });
        let forgotten = forgotten.unwrap_or(0) as u64;
        self.rows = self.rows.saturating_sub(forgotten);
        if look_at_age && forgotten < CHORE_ROWS as u64 {
            self.next_retention = Instant::now() + RETENTION_TICK;
        }
        forgotten > 0
    }

    /// Drops old notes of requests that must not be asked twice.
    fn forget_remembered(&mut self) {
        if Instant::now() >= self.next_forgetting {
            self.next_forgetting = Instant::now() + RETENTION_TICK;
            self.attempt("pruned", |connection| connection.execute(include_str!("../sql/queries/forget_remembered.sql"), []));
        }
    }

    /// Does `work` in one transaction. `None` where it failed, which is logged; the database is then
    /// opened anew for the next.
    fn attempt<T>(&mut self, what: &str, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Option<T> {
        if !self.is_in_place() {
            self.open = None;
        }
        let result = self.ready().and_then(|()| self.write(work).map_err(Trouble::Sql));
        let failing = result.is_err();
        if let Err(trouble) = &result {
            log::error!("history cannot be {what}: {}", advice(trouble));
            self.open = None;
        }
        if self.state.failing.swap(failing, Ordering::Relaxed) && !failing {
            log::info!("history can be written again");
        }
        result.ok()
    }

    fn write<T>(&mut self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let Some(open) = &mut self.open else { return Err(rusqlite::Error::InvalidQuery) };
        let connection = &open.connection;
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

    /// The open database is still the file at its path. What is written to a deleted file is lost.
    fn is_in_place(&self) -> bool {
        let inode = fs::metadata(&self.path).map(|file| file.ino()).ok();
        self.open.as_ref().is_some_and(|open| Some(open.inode) == inode)
    }

    /// Opens and migrates the database where it is not open.
    fn ready(&mut self) -> Result<(), Trouble> {
        if self.open.is_some() {
            return Ok(());
        }
        // Made before SQLite makes it, since what people ask is for the owner's eyes only.
        let _ = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.path);
        let mut connection = connect(&self.path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
        let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if version > MIGRATIONS.len() as i64 {
            return Err(Trouble::Newer(version));
        }
        connection.query_row("PRAGMA journal_mode = wal", [], |_| Ok(()))?;
        let synchronous = match self.sync {
            Sync::Full => "FULL",
            Sync::Normal => "NORMAL",
        };
        connection.execute_batch(&format!(
            "PRAGMA synchronous = {synchronous}; PRAGMA cache_size = -2048; PRAGMA journal_size_limit = 67108864;
             PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};"
        ))?;
        for (number, migration) in (1..).zip(MIGRATIONS).skip(version as usize) {
            let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            transaction.execute_batch(migration)?;
            transaction.pragma_update(None, "user_version", number)?;
            transaction.commit()?;
        }
        if self.max_rows > 0 {
            self.rows = connection.query_row(include_str!("../sql/queries/count.sql"), [], |row| row.get::<_, i64>(0))? as u64;
        }
        let progress = include_str!("../sql/queries/progress.sql");
        (self.last_id, self.indexed) = connection.query_row(progress, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let inode = fs::metadata(&self.path).map(|file| file.ino()).unwrap_or(0);
        self.open = Some(Open { connection, inode });
        self.state.opening.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn close(self) {
        if let Some(open) = self.open {
            let _ = open.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
            if let Err((_, e)) = open.connection.close() {
                log::error!("history was not closed cleanly: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_a_query_for_words() {
        let query = |text: &str, one_key| match_expression("a", &wanted(text), one_key);
        let found = query("\"x\" OR -z\0don't & or 🦀", false);
        assert_eq!(found.as_deref(), Some(r#"key : "61" AND {question answer} : ("""x""" AND "OR" AND "-z" AND "don't")"#));
        assert_eq!(query(" \"'*🦀", false), None);
        assert_eq!(query("x", true).as_deref(), Some(r#"{question answer} : ("x")"#));
    }

    #[test]
    fn of_a_query_32_words_count_and_512_bytes() {
        let words: Vec<String> = (0..40).map(|number| format!("w{number}")).collect();
        assert_eq!(wanted(&words.join(" ")), words[..32]);
        assert_eq!(wanted(&words.join("-")), [words[..32].join("-") + "-"], "the parts of a word, too");
        assert_eq!(wanted(&"x".repeat(512)), ["x".repeat(512)]);
        assert_eq!(wanted(&"x".repeat(513)), [""; 0]);
        assert_eq!(wanted(&format!("whole {} half", "é".repeat(252))), ["whole".to_string(), "é".repeat(252)]);
        assert_eq!(wanted(&format!("{0}blank{0}", " ".repeat(500))), ["blank"]);
    }

    #[test]
    fn the_escaped_length_is_that_of_the_json() {
        let text: String = (0..=0x250).filter_map(char::from_u32).collect();
        assert_eq!(escaped_length(&text), serde_json::to_string(&text).expect("JSON").len() - 2);
    }

    /// A writer whose history is a file of its own.
    fn writer(name: &str) -> Writer {
        reopened(std::env::temp_dir().join(format!("ai-proxy-{}-{name}.db", std::process::id())))
    }

    fn reopened(path: PathBuf) -> Writer {
        let mut writer = Writer::new(path, Sync::Normal, Arc::default(), Arc::new(Metrics::new(&[], &[])));
        assert!(writer.ready().is_ok());
        writer
    }

    fn remove(writer: Writer) {
        let path = writer.path.clone();
        writer.close();
        fs::remove_file(path).expect("the file is there");
    }

    fn append(writer: &mut Writer, pairs: usize, bytes: usize) {
        let arrival = |_| Arrival {
            pair: Pair {
                key: "anonymous".into(),
                question: "w ".repeat(bytes / 2),
                answer: String::new(),
                model: String::new(),
                finish_reason: None,
                usage: None,
                latency_ms: 0,
                created_at: String::new(),
            },
            unique: None,
            then: Box::new(|result| assert!(result.is_ok())),
        };
        writer.append((0..pairs).map(arrival).collect());
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
        let deleted = writer.write(|connection| connection.execute("DELETE FROM history WHERE id > 708", []));
        assert_eq!(deleted, Ok(10));
        assert!(writer.index() && !writer.index(), "nothing is left to do");
        remove(writer);
    }

    #[test]
    fn an_id_is_not_given_again_when_its_row_is_gone() {
        let mut writer = writer("ids");
        append(&mut writer, 3, 2);
        let delete = |writer: &mut Writer| writer.write(|connection| connection.execute("DELETE FROM history", []));
        assert_eq!(delete(&mut writer), Ok(3));
        append(&mut writer, 2, 2);
        assert_eq!(writer.last_id, 5);
        assert_eq!(delete(&mut writer), Ok(2));
        while writer.index() {}
        let path = writer.path.clone();
        writer.close();
        let mut writer = reopened(path);
        append(&mut writer, 1, 2);
        assert_eq!(writer.last_id, 6, "nor after a restart");
        let by_hand = "INSERT INTO history VALUES (9, '', '', '', '', '', NULL, NULL, NULL, NULL, 0)";
        assert_eq!(writer.write(|connection| connection.execute(by_hand, [])), Ok(1));
        append(&mut writer, 1, 2);
        assert_eq!(writer.last_id, 10);
        remove(writer);
    }

    #[test]
    fn a_history_of_before_is_taken_over_with_its_ids() {
        let path = std::env::temp_dir().join(format!("ai-proxy-{}-before.db", std::process::id()));
        let before = Connection::open(&path).expect("a file");
        for (number, migration) in (1..).zip(&MIGRATIONS[..3]) {
            before.execute_batch(&format!("{migration}; PRAGMA user_version = {number}")).expect("a migration");
        }
        let row =
            "INSERT INTO history (created_at, key_name, question, answer, model, latency_ms) VALUES ('', 'k', 'q', 'a', 'm', 1)";
        before
            .execute_batch(&format!("{row}; {row}; {row}; DELETE FROM history WHERE id = 3; UPDATE indexed SET up_to = 2"))
            .expect("rows");
        drop(before);
        let mut writer = reopened(path);
        append(&mut writer, 1, 2);
        let ids = "SELECT group_concat(id ORDER BY id) FROM history";
        let ids = writer.write(|connection| connection.query_row(ids, [], |row| row.get(0)));
        assert_eq!(ids, Ok("1,2,4".to_string()));
        remove(writer);
    }

    #[test]
    fn under_a_load_that_never_pauses_there_are_the_more_bites_the_more_is_not_indexed() {
        let mut writer = writer("load");
        append(&mut writer, 30, 100 << 10);
        writer.catch_up();
        assert_eq!(writer.indexed, 0, "that can wait");
        let (search, _waits) = handoff();
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
        let (early, late, gone) = (handoff(), handoff(), handoff());
        writer.searches = vec![(2, early.0), (3, late.0), (3, gone.0)];
        drop(gone.1);
        writer.index();
        writer.let_searches_go();
        assert_eq!(early.1.take(), None);
        assert_eq!(writer.searches.len(), 1, "who gave up is forgotten");
        assert_eq!(late.1.take_within(Duration::ZERO), Err(Nothing::Yet));
        writer.state.failing.store(true, Ordering::Relaxed);
        writer.let_searches_go();
        assert_eq!(late.1.take_within(Duration::ZERO), Err(Nothing::Ever));
        remove(writer);
    }

    #[test]
    fn a_writer_that_is_gone_is_not_writable() {
        let (orders, _) = unbounded();
        let store = Store {
            orders,
            wake: std::thread::current(),
            readers: Mutex::default(),
            path: PathBuf::new(),
            state: Arc::default(),
            one_key: true,
            writer: Mutex::default(),
        };
        for _ in 0..3 {
            assert!(!store.writable());
        }
        assert!(store.check().is_err(), "nobody pays for an answer that cannot be kept");
    }
}
