//! Opens the database, sees whether it is still the one at its path, and closes it; what is known of its rows. Knows no pairs.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rusqlite::{Connection, OpenFlags, ffi};

use super::journal::{LARGE, MOST_PAGES, disk_full, log_unmoved};
use super::{Writer, index};
use crate::config::Durability;
use crate::kernel;
use crate::lock::{lock, own};
use crate::store::schema::{self, Trouble};
use crate::store::{connect, taken_over};

/// Bytes of room without which no database is opened where blocks are smaller than SQLite's pages: in the journal's index, of
/// 32 KiB, it leaves holes then, and who writes into one on a full disk ends (SIGBUS).
const OPENING_ROOM: u64 = 64 << 10;

/// A number that changes when another connection writes (<https://sqlite.org/pragma.html#pragma_data_version>).
fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0))
}

pub(super) struct Open {
    pub(super) connection: Connection,
    /// The inodes of its three files.
    pub(super) files: [Option<u64>; 3],
}

impl Writer {
    /// The open database is still the one at its path. What is written to a deleted file is lost.
    pub(super) fn is_in_place(&self) -> bool {
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
    pub(super) fn ready(&mut self) -> Result<(), Trouble> {
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
        // They stand beside the file itself, which may be behind a link.
        let file = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let beside = |ending: &str| PathBuf::from([file.as_os_str(), ending.as_ref()].join(OsStr::new("")));
        (self.journal, self.journal_index) = (beside("-wal"), beside("-shm"));
        schema::check(&connection)?;
        schema::keep_journal(&connection)?;
        // Migrations need not wait for the disk: one that a power cut takes back is made again.
        connection.execute_batch(&format!(
            "PRAGMA synchronous = NORMAL; PRAGMA cache_size = -1024; PRAGMA journal_size_limit = {LARGE};
             PRAGMA wal_autocheckpoint = {MOST_PAGES};"
        ))?;
        // It is in the journal before it is in its place, where it would have to fit once more.
        let copied = schema::copied(&connection)?;
        if (self.room)(&self.path).is_some_and(|room| room.left < 2 * copied) {
            return Err(Trouble::Sql(disk_full()));
        }
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
        let count = || connection.query_row(include_str!("../../../sql/queries/count.sql"), [], |row| row.get::<_, i64>(0));
        let rows = if self.max_rows > 0 { count()? as u64 } else { 0 };
        let progress = include_str!("../../../sql/queries/progress.sql");
        let (last_id, indexed) = connection.query_row(progress, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        (self.data_version, self.rows, self.last_id, self.indexed) = (version, rows, self.last_id.max(last_id), indexed);
        Ok(())
    }

    /// Learns it anew where another connection wrote, as who deletes or restores by hand does.
    pub(super) fn look_again(&mut self) {
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

    pub(super) fn close(&mut self) {
        if self.open.is_some() {
            // The newest rows may be deleted before the next start.
            self.transact("closed", |connection, last_id| {
                connection.execute(include_str!("../../../sql/queries/given.sql"), [last_id])
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
    use std::os::unix::fs::MetadataExt;
    use std::thread;
    use std::time::Duration;

    use super::super::tests::{append, change, locked_for, path, remove, reopened, told, writer};
    use super::*;
    use crate::kernel::Room;
    use crate::lock::share;
    use crate::metrics::Metrics;
    use crate::store::writer::QUIET;

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
    fn an_id_that_a_restored_backup_has_given_is_not_given_again() {
        let mut writer = writer("restored-ids");
        append(&mut writer, 1, 2);
        // Its newest rows were deleted before.
        change(&mut writer, "UPDATE indexed SET last_id = 30");
        append(&mut writer, 1, 2);
        assert_eq!(writer.last_id, 31);
        change(&mut writer, "UPDATE indexed SET last_id = 40");
        while writer.index() {}
        assert_eq!(told::<i64>(&mut writer, "SELECT last_id FROM indexed"), 40);
        writer.close();
        let mut writer = reopened(writer.path.clone());
        assert_eq!(told::<i64>(&mut writer, "SELECT last_id FROM indexed"), 40);
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
    fn what_was_noted_before_is_taken_over() {
        let path = path("notes");
        let before = Connection::open(&path).expect("a file");
        before.execute_batch(&format!("{}; PRAGMA user_version = 2", schema::MIGRATIONS[..2].join(";"))).expect("migrations");
        before.execute_batch("INSERT INTO idempotency VALUES ('k', 'i', '/', x'01', x'02', 3, 4)").expect("a note");
        drop(before);
        let mut writer = reopened(path);
        let note = "SELECT concat_ws(' ', key_name, idempotency_key, path, hex(request), hex(response), history_id, created_at)
                    FROM idempotency";
        assert_eq!(told::<String>(&mut writer, note), "k i / 01 02 3 4");
        remove(writer);
    }

    /// Half of it would fill the disk, and the program of before could not go back.
    #[test]
    fn no_migration_begins_that_would_not_fit() {
        let pair = "INSERT INTO history (created_at, key_name, question, answer, model, latency_ms)
                    VALUES ('', '', printf('%.1000000c', 'x'), '', '', 0)";
        // Of short ones a row takes more than its texts.
        let pairs = "INSERT INTO history (created_at, key_name, question, answer, model, latency_ms)
                     SELECT '2026-11-27T12:00:00.000Z', 'anonymous', 'q', 'a', 'gpt-4o-mini', 0 FROM numbers";
        let pairs =
            &*format!("WITH RECURSIVE numbers(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM numbers WHERE n < 7700) {pairs}");
        let note = "INSERT INTO idempotency VALUES ('', '', '', zeroblob(1000000), NULL, 1, 0)";
        for (made, row) in [(1, pair), (3, pairs), (5, note)] {
            let path = path(&format!("fits-{made}"));
            let before = Connection::open(&path).expect("a file");
            let migrations = schema::MIGRATIONS[..made].join(";");
            before.execute_batch(&format!("{migrations}; PRAGMA user_version = {made}; {row}")).expect("as it was");
            let mut writer = Writer::new(path, Durability::Normal, Arc::default(), Arc::new(Metrics::new(&[], &[])));
            writer.room = |_| Some(Room { left: 1_900_000, total: u64::MAX });
            assert!(writer.prove().is_err_and(|text| text.contains("the disk is full")));
            assert_eq!(before.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)), Ok(made as i64));
            drop(before);
            writer.room = |_| Some(Room { left: 2_100_000, total: u64::MAX });
            assert_eq!(writer.prove(), Ok(()));
            remove(writer);
        }
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
    fn no_database_is_opened_where_the_journals_index_would_not_fit() {
        let mut writer = writer("no-room");
        writer.open = None;
        let fits = std::mem::replace(&mut writer.fits, |_, bytes| bytes < 64 << 10);
        assert!(writer.prove().is_err_and(|text| text.contains("the disk is full")));
        writer.fits = fits;
        assert_eq!(writer.prove(), Ok(()));
        remove(writer);
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
        let mut writer = replaced("known-fewer", 2);
        append(&mut writer, 1, 10);
        assert_eq!(writer.last_id, 3, "ids go on where those of the new one end");
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
}
