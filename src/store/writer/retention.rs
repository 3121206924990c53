//! Retention: which rows are too many or too old, and their going, in quiet moments or along with new ones; also of what was
//! noted of requests. Knows no pairs.

use std::time::Instant;

use rusqlite::{Connection, params_from_iter};

use super::{RETENTION_TICK, Writer};

/// Retention takes so many in a quiet moment: their words are in the index, and a new pair waits about a millisecond.
const RETAIN_ROWS: u64 = 50;
/// So many requests with an `Idempotency-Key`, and so many bytes of them, are forgotten at a time, so that a new pair never
/// waits long.
const FORGET_REQUESTS: usize = 100;
const FORGET_BYTES: i64 = 4 << 20;

/// What retention says has to go.
pub(super) struct Surplus {
    /// Rows more than may be kept.
    rows: u64,
    /// Rows of more than so many days ago; 0: it is not the time to look for them.
    days: u64,
}

impl Surplus {
    pub(super) fn is_none(&self) -> bool {
        self.rows == 0 && self.days == 0
    }

    /// Deletes at most so many of them, the oldest; how many.
    pub(super) fn delete(&self, connection: &Connection, most: u64) -> rusqlite::Result<u64> {
        let mut ids: Vec<i64> = Vec::new();
        let mut find = |oldest: &str, parameters: &[i64]| {
            let mut oldest = connection.prepare_cached(oldest)?;
            for id in oldest.query_map(params_from_iter(parameters), |row| row.get(0))? {
                ids.push(id?);
            }
            Ok::<(), rusqlite::Error>(())
        };
        if self.rows > 0 {
            find(include_str!("../../../sql/queries/oldest_over_count.sql"), &[self.rows.min(most) as i64])?;
        }
        if self.days > 0 {
            find(include_str!("../../../sql/queries/oldest_over_age.sql"), &[most as i64, self.days as i64])?;
        }
        let mut forget_words = connection.prepare_cached(include_str!("../../../sql/queries/forget_words.sql"))?;
        let mut forget = connection.prepare_cached(include_str!("../../../sql/queries/forget.sql"))?;
        let mut deleted = 0;
        for id in ids {
            forget_words.execute([id])?;
            deleted += forget.execute([id])? as u64;
        }
        Ok(deleted)
    }
}

impl Writer {
    /// What has to go when so many pairs come.
    pub(super) fn surplus(&mut self, coming: usize) -> Surplus {
        if Instant::now() < self.next_pruning {
            return Surplus { rows: 0, days: 0 };
        }
        if self.max_rows > 0 && self.rows + coming as u64 > self.max_rows {
            // Of the database that is there now.
            let _ = self.ready();
            self.look_again();
        }
        let rows = if self.max_rows > 0 { (self.rows + coming as u64).saturating_sub(self.max_rows) } else { 0 };
        Surplus { rows, days: if Instant::now() >= self.next_retention { self.max_days } else { 0 } }
    }

    /// Deletes some of what has to go, one bite; true when there may be more to do.
    pub(super) fn retain(&mut self) -> bool {
        let surplus = self.surplus(0);
        if surplus.is_none() {
            return false;
        }
        // Deleting goes through the journal, too: on a disk that is nearly full that is moved over before each bite.
        self.has_room(1 << 20, 4);
        let Some(deleted) = self.transact("pruned", |connection, _| surplus.delete(connection, RETAIN_ROWS)) else {
            self.next_pruning = Instant::now() + RETENTION_TICK;
            return false;
        };
        self.shrank(&surplus, deleted, RETAIN_ROWS);
        self.grew(deleted as usize, 0);
        deleted > 0
    }

    /// Notes how many rows, of at most `most`, are gone.
    pub(super) fn shrank(&mut self, surplus: &Surplus, deleted: u64, most: u64) {
        self.rows = self.rows.saturating_sub(deleted);
        if surplus.days > 0 && deleted < most {
            self.next_retention = Instant::now() + RETENTION_TICK;
        }
    }

    /// Forgets some of the requests with an `Idempotency-Key` that nobody may repeat any more; true when there may be more
    /// to do.
    pub(super) fn forget_remembered(&mut self) -> bool {
        if Instant::now() < self.next_forgetting {
            return false;
        }
        let forgotten = self.transact("cleared of old requests", |connection, _| {
            let mut forgettable = connection.prepare(include_str!("../../../sql/queries/forgettable.sql"))?;
            let notes = forgettable.query_map([FORGET_REQUESTS as i64], |row| Ok((row.get(0)?, row.get(1)?)))?;
            let notes: Vec<(i64, i64)> = notes.collect::<rusqlite::Result<_>>()?;
            let (mut forgotten, mut bytes) = (0, 0);
            for (note, size) in notes {
                bytes += size;
                if forgotten > 0 && bytes > FORGET_BYTES {
                    break;
                }
                forgotten += connection.execute(include_str!("../../../sql/queries/forget_remembered.sql"), [note])?;
            }
            Ok(forgotten)
        });
        let more = forgotten.is_some_and(|forgotten| forgotten > 0);
        if !more {
            self.next_forgetting = Instant::now() + RETENTION_TICK;
        }
        more
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::Ordering;

    use super::super::tests::{append, change, remove, told, writer};
    use super::*;

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
    fn what_was_noted_of_a_request_goes_with_its_pair() {
        let mut writer = writer("noted");
        append(&mut writer, 4, 2);
        let note = "INSERT INTO idempotency SELECT 'k', id, '/', id, unixepoch() + id, x'', NULL FROM history";
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
            while writer.forget_remembered() {}
            let ids = "SELECT group_concat(history_id) FROM (SELECT history_id FROM idempotency ORDER BY history_id)";
            assert_eq!(told::<String>(&mut writer, ids), left, "{sql}");
        }
        remove(writer);
    }

    /// Those who ask wait meanwhile.
    #[test]
    fn of_what_was_noted_no_more_goes_at_a_time_than_can_go_soon() {
        let mut writer = writer("large-notes");
        append(&mut writer, 10, 2);
        let note = "INSERT INTO idempotency SELECT 'k', id, '/', id, 0, zeroblob(1 << 20), NULL FROM history";
        change(&mut writer, note);
        let mut left = Vec::new();
        writer.next_forgetting = Instant::now();
        while writer.forget_remembered() {
            left.push(told::<i64>(&mut writer, "SELECT count(*) FROM idempotency"));
        }
        assert_eq!(left, [6, 2, 0]);
        change(&mut writer, &note.replace("1 << 20", "1 << 23"));
        writer.next_forgetting = Instant::now();
        assert!(writer.forget_remembered());
        assert_eq!(told::<i64>(&mut writer, "SELECT count(*) FROM idempotency"), 9, "one at least");
        remove(writer);
    }

    /// Or they would become ever more under a load that brings more in a minute than goes at a time.
    #[test]
    fn what_is_too_old_goes_at_once_however_much_it_is() {
        let mut writer = writer("old");
        append(&mut writer, 120, 2);
        let note = "INSERT INTO idempotency SELECT 'k', id, '/', id, 0, x'', NULL FROM history";
        let date = "UPDATE history SET created_at = '2000-01-01T00:00:00.000Z'";
        change(&mut writer, &format!("{note}; {date}"));
        writer.max_days = 1;
        writer.next_forgetting = Instant::now();
        while writer.forget_remembered() | writer.retain() {}
        let left = "SELECT (SELECT count(*) FROM idempotency) + (SELECT count(*) FROM history)";
        assert_eq!(told::<i64>(&mut writer, left), 0);
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
}
