//! The index of words, which the writer makes in quiet moments, or when a search waits for it. Knows which rows are in it,
//! not what is searched for.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::functions::FunctionFlags;

use super::journal::disk_full;
use super::{RETENTION_TICK, Writer};
use crate::store::search::plain;

/// Housekeeping takes so many rows at a time, so that a new pair never waits long.
const CHORE_ROWS: i64 = 500;
/// The index takes no more bytes of text at a time, but at least one row.
const CHORE_BYTES: i64 = 256 << 10;
/// Words of more rows than this are not left for quiet times.
pub(super) const MOST_UNINDEXED: i64 = 200_000;
/// The same in bytes of text.
pub(super) const MOST_UNINDEXED_BYTES: i64 = 64 << 20;

/// At most so many bites at once: by ids there may be far more than there are rows.
const MOST_BITES: i64 = 10;

/// The index rests so long after a failure, and twice as long after each further one.
pub(super) const INDEXING_REST: Duration = Duration::from_secs(1);

/// Has the connection know what `index_words.sql` asks for.
pub(super) fn teach(connection: &Connection) -> rusqlite::Result<()> {
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
    connection.create_scalar_function("plain", 1, flags, |arguments| {
        let text = arguments.get_raw(0).as_bytes_or_null()?.map(String::from_utf8_lossy);
        Ok(text.map(|text| plain(&text).into_owned()))
    })
}

/// The last of the rows that are indexed next, and the bytes of their texts; `None` where there are no rows.
fn bite(connection: &Connection) -> rusqlite::Result<Option<(i64, i64)>> {
    let mut next = connection.prepare_cached(include_str!("../../../sql/queries/index_next.sql"))?;
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

impl Writer {
    /// Under a load that never pauses: one bite of the index after each batch where a search waits for it. Else
    /// one for each `MOST_UNINDEXED` rows (or bytes) not indexed, so that they stay bounded.
    pub fn catch_up(&mut self) {
        if self.is_closed {
            return;
        }
        let behind = ((self.last_id - self.indexed) / MOST_UNINDEXED).max(self.unindexed_bytes / MOST_UNINDEXED_BYTES);
        for _ in 0..behind.min(MOST_BITES).max(i64::from(!self.searches.is_empty())) {
            if !self.index() {
                break;
            }
        }
    }

    /// Indexes the words of some rows, one bite; true when there may be more to do.
    pub(super) fn index(&mut self) -> bool {
        if self.indexed >= self.last_id || self.is_index_failing() {
            return false;
        }
        // What is searched for may take some of the room that new pairs leave, but not before what deletes is done.
        let deletes = !self.surplus(0).is_none();
        let has_room = self.has_room(4 * CHORE_BYTES as u64, if deletes { 4 } else { 1 });
        if deletes && !has_room {
            return false;
        }
        let done = self.transact("indexed", |connection, last_id| {
            if !has_room {
                return Err(disk_full());
            }
            let Some((up_to, bytes)) = bite(connection)? else { return Ok(None) };
            connection.prepare_cached(include_str!("../../../sql/queries/index_words.sql"))?.execute([up_to])?;
            connection.prepare_cached(include_str!("../../../sql/queries/indexed_up_to.sql"))?.execute([up_to, last_id])?;
            Ok(Some((up_to, bytes)))
        });
        if let Some(bitten) = done {
            // The newest rows may have been deleted before they were indexed.
            let (up_to, bytes) = bitten.unwrap_or((self.last_id, 0));
            self.grew(0, 2 * bytes as usize);
            self.indexed = up_to;
            self.unindexed_bytes = if up_to < self.last_id { (self.unindexed_bytes - bytes).max(0) } else { 0 };
            self.indexing_rest = INDEXING_REST;
        } else {
            self.next_indexing = Instant::now() + self.indexing_rest;
            self.indexing_rest = (2 * self.indexing_rest).min(RETENTION_TICK);
        }
        done.is_some()
    }

    pub(super) fn is_index_failing(&self) -> bool {
        self.state.failing.load(Ordering::Relaxed) || Instant::now() < self.next_indexing
    }

    /// Tells the searches that miss nothing any more, and all of them where indexing fails. Who gave up waiting is
    /// forgotten.
    pub(super) fn let_searches_go(&mut self) {
        let failing = self.is_index_failing();
        // A sender that is dropped wakes who waits.
        self.searches.retain(|(up_to, search)| *up_to > self.indexed && !failing && !search.is_closed());
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use oneshot::{RecvTimeoutError, channel};

    use super::super::tests::{append, change, remove, writer};
    use super::*;
    use crate::kernel::Room;

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
        let wait = channel();
        writer.housekeep();
        assert_eq!(late.1.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Disconnected), "as soon as it is indexed");
        append(&mut writer, 1, 2);
        writer.searches.push((4, wait.0));
        writer.state.failing.store(true, Ordering::Relaxed);
        writer.let_searches_go();
        assert_eq!(wait.1.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Disconnected));
        remove(writer);
    }
}
