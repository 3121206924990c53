//! Retention: which rows are too many or too old, and their going, in quiet moments or along with new ones. Knows no pairs.

use std::time::Instant;

use rusqlite::{Connection, params_from_iter};

use super::{RETENTION_TICK, Writer};
use crate::store::schema::{Trouble, advice};

/// Retention takes so many in a quiet moment: their words are in the index, and a new pair waits about a millisecond.
const RETAIN_ROWS: u64 = 50;

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
    fn delete(&self, connection: &Connection, most: u64) -> rusqlite::Result<u64> {
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

    /// The same, and where it fails the transaction that it is a part of can go on: what is damaged, such as the index of
    /// words, is to keep nobody from asking.
    pub(super) fn delete_alone(&self, connection: &Connection, most: u64) -> rusqlite::Result<rusqlite::Result<u64>> {
        if self.is_none() {
            return Ok(Ok(0));
        }
        connection.execute_batch("SAVEPOINT surplus")?;
        let deleted = self.delete(connection, most);
        connection.execute_batch(if deleted.is_ok() { "RELEASE surplus" } else { "ROLLBACK TO surplus; RELEASE surplus" })?;
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
        let deleted = self.transact("pruned", |connection, _| surplus.delete_alone(connection, RETAIN_ROWS));
        let deleted = self.shrank(&surplus, deleted.unwrap_or(Ok(0)), RETAIN_ROWS);
        self.grew(deleted as usize, 0);
        deleted > 0
    }

    /// Notes and says how many rows, of at most `most`, are gone; where that failed, retention rests.
    pub(super) fn shrank(&mut self, surplus: &Surplus, deleted: rusqlite::Result<u64>, most: u64) -> u64 {
        let deleted = deleted.unwrap_or_else(|e| {
            log::error!("history cannot be pruned: {}", advice(&Trouble::Sql(e)));
            self.next_pruning = Instant::now() + RETENTION_TICK;
            0
        });
        self.rows = self.rows.saturating_sub(deleted);
        if surplus.days > 0 && deleted < most {
            self.next_retention = Instant::now() + RETENTION_TICK;
        }
        deleted
    }
}
