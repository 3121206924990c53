//! The journal: when it is moved over, and the room on the disk that new pairs leave for what it has. Knows no pairs.

use std::sync::Arc;
use std::thread;

use rusqlite::{Connection, ffi};

use super::Writer;
use crate::kernel;
use crate::lock::{own, share};
use crate::store::reader;

/// The journal is moved over beside the writing when it has grown by about so many pages of 4 KiB: a question
/// that waits for that waits 10 ms, and under load a fifth of the time goes there.
const CHECKPOINT_PAGES: usize = 1000;
/// Passive: it waits for nobody and nobody for it (<https://sqlite.org/pragma.html#pragma_wal_checkpoint>).
const CHECKPOINT: &str = "PRAGMA wal_checkpoint(PASSIVE)";
/// Bytes of a page, unless somebody made the database with others.
const PAGE: usize = 4096;
/// A journal of more bytes is to begin anew.
pub(super) const LARGE: u64 = 64 << 20;
/// With so many pages the writer does not wait for that any more.
pub(super) const MOST_PAGES: usize = 4 * CHECKPOINT_PAGES;
/// Bytes of room that new pairs leave alone, or a sixteenth of a small disk: deleting takes some, too.
pub(super) const KEPT_ROOM: u64 = 4 << 20;

/// Nothing is lost where the journal was not moved over: it is tried again later, and a disk that fails shows in the next
/// commit.
pub(super) fn log_unmoved<T>(moved: &rusqlite::Result<T>) {
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
pub(super) fn disk_full() -> rusqlite::Error {
    let text = "what is left is needed for what is written already";
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_FULL), Some(text.to_string()))
}

impl Writer {
    /// After a commit of so many rows and bytes: has the journal moved over beside the writing where it is time.
    pub(super) fn grew(&mut self, rows: usize, bytes: usize) {
        self.pages += 3 + rows / 8 + 2 * bytes / PAGE;
        if self.checkpoint.take_if(|running| running.is_finished()).is_some() {
            // What came meanwhile is little, and the journal begins anew only when all of it is moved, and nobody reads it at
            // that moment: those who read one after the other are held up where it is large.
            let left = self.open.as_ref().and_then(|open| move_journal(&open.connection).ok().flatten());
            // Where somebody else keeps it back, nobody need wait.
            if kernel::size(&self.journal) > LARGE && left.is_some_and(|pages| pages < CHECKPOINT_PAGES as u64) {
                let state = Arc::clone(&self.state);
                let _alone = own(&state.reading);
                self.open.iter().for_each(|open| drop(move_journal(&open.connection)));
            }
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
    pub(super) fn has_room(&mut self, bytes: u64, quarters: u64) -> bool {
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
        self.pages = 0;
        let sizes = "SELECT page_size, freelist_count FROM pragma_page_size, pragma_freelist_count";
        let sizes = open.connection.query_row(sizes, [], |row| Ok((row.get(0)?, row.get(1)?)));
        let (page, free): (i64, i64) = sizes.unwrap_or((PAGE as i64, 0));
        let unmoved = unmoved.map_or_else(|| kernel::size(&self.journal), |pages| pages * page as u64);
        let free = (free * page) as u64;
        (self.room)(&self.path).is_none_or(|room| room.left + free >= wanted.saturating_add(unmoved))
    }

    /// Quarters of `KEPT_ROOM` that new pairs must leave: one where each replaces an old pair and the file stays as it is.
    pub(super) fn quarters(&self) -> u64 {
        if self.max_rows > 0 && self.rows >= self.max_rows { 1 } else { 4 }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::Ordering;
    use std::time::Instant;

    use super::super::tests::{append, is_kept, locked_for, remove, told, works, writer};
    use super::*;
    use crate::config::DATABASE_BUSY;
    use crate::exchange::Pair;
    use crate::kernel::Room;
    use crate::store::{Arrival, Unique};

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
        writer.rows = 41;
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

    /// Or a burst would lose what each alone finds room for, and nobody could ask any more, though a question would fit.
    #[test]
    fn what_does_not_fit_together_is_kept_in_parts_and_what_is_waited_for_is_room_for_one() {
        let mut writer = writer("parts");
        let lack: fn(&Path) -> Option<Room> = |_| Some(Room { left: KEPT_ROOM + (30 << 10), total: u64::MAX });
        let enough: fn(&Path) -> Option<Room> = |_| Some(Room { left: KEPT_ROOM + (100 << 10), total: u64::MAX });
        writer.room = enough;
        append(&mut writer, 20, 20 << 10);
        let refused = |writer: &mut Writer| {
            let pair = || Pair { question: "w ".repeat(10 << 10), ..Pair::default() };
            let since = Instant::now() - DATABASE_BUSY;
            let arrival = |_| Arrival { since, ..Arrival::new(pair(), None, |_| {}) };
            writer.append((0..20).map(arrival).collect());
            assert!(writer.state.failing.load(Ordering::Relaxed));
        };
        writer.room = lack;
        refused(&mut writer);
        assert!(!works(&mut writer));
        writer.room = enough;
        assert!(works(&mut writer));
        // Whatever the trouble was.
        let holder = locked_for(&writer.path, DATABASE_BUSY / 2);
        writer.room = kernel::room;
        refused(&mut writer);
        holder.join().expect("it lets go");
        writer.room = enough;
        assert!(works(&mut writer));
        assert_eq!(told::<i64>(&mut writer, "SELECT count(*) FROM history"), 20);
        remove(writer);
    }

    /// Though a large one came before them.
    #[test]
    fn where_not_all_fit_the_small_ones_are_kept() {
        let mut writer = writer("small");
        writer.room = |_| Some(Room { left: KEPT_ROOM + (30 << 10), total: u64::MAX });
        let pair = |words| Pair { question: "w ".repeat(words), ..Pair::default() };
        writer.append([50 << 10, 1, 2, 3, 4].map(|words| Arrival::new(pair(words), None, |_| {})).into());
        assert!(writer.state.failing.load(Ordering::Relaxed));
        writer.room = kernel::room;
        assert!(works(&mut writer));
        assert_eq!(told::<i64>(&mut writer, "SELECT count(*) FROM history"), 4);
        remove(writer);
    }

    /// Or SQLite moves it over within a commit.
    #[test]
    fn what_is_noted_of_a_request_lets_the_journal_grow_too() {
        let mut writer = writer("noted-grew");
        let unique = Unique { key: "k".into(), path: "/".into(), request: vec![0; CHECKPOINT_PAGES * PAGE / 2], response: None };
        assert!(is_kept(&mut writer, Pair::default(), Some(unique)));
        assert!(writer.checkpoint.is_some());
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
}
