//! Histories of any size, written as the program writes them but without waiting for the disk.

use std::fs::File;
use std::path::Path;

use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::{Connection, params};

/// A word of every pair.
pub const COMMON: &str = "gateway";
/// A word of ten pairs, however many there are.
pub const RARE: &str = "okapi";

/// The program indexes the words of so many pairs at a time, which shapes the index.
const STEP: usize = 500;
const AT: &str = "2026-11-22T21:34:00.123Z";

/// Fills the database that the program made. Every second pair is another key's.
pub fn fill(path: &Path, rows: i64) {
    let mut database = Connection::open(path).expect("the database opens");
    database.execute_batch("PRAGMA synchronous = off; PRAGMA cache_size = -262144").expect("settings");
    // The program's function; there are no symbols in these texts.
    let as_it_is = |arguments: &mut Context| arguments.get::<String>(0);
    let made = database.create_scalar_function("plain", 1, FunctionFlags::SQLITE_UTF8, as_it_is);
    made.expect("a function");
    let append = include_str!("../../sql/queries/append.sql");
    let index = include_str!("../../sql/queries/index_words.sql");
    let note = include_str!("../../sql/queries/indexed_up_to.sql");
    let mut words = Words(1);
    for last in (0..=rows).step_by(STEP).skip(1) {
        let transaction = database.transaction().expect("a transaction");
        for row in last - STEP as i64 + 1..=last {
            let key = if row % 2 == 0 { "bench" } else { "other" };
            let rare = if row % (rows / 10) == 0 { RARE } else { "" };
            let question = format!("What {} {COMMON} {rare}?", words.take(8));
            let values = params![AT, key, question, words.take(24), "bench-1", "stop", 17, 46, 63, 412, row - 1];
            transaction.prepare_cached(append).and_then(|mut append| append.execute(values)).expect("a row");
        }
        transaction.prepare_cached(index).and_then(|mut index| index.execute([last])).expect("an index");
        transaction.prepare_cached(note).and_then(|mut note| note.execute([last, last])).expect("a note of it");
        transaction.commit().expect("a commit");
    }
    database.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).expect("a checkpoint");
    drop(database);
    // Otherwise the disk would still be busy with it while others are measured.
    File::open(path).and_then(|file| file.sync_all()).expect("a disk that is not full");
}

/// Words as unevenly frequent as those of a language, the same ones in every run.
struct Words(u64);

impl Words {
    fn take(&mut self, count: usize) -> String {
        let words: Vec<String> = (0..count).map(|_| format!("w{}", self.next())).collect();
        words.join(" ")
    }

    fn next(&mut self) -> u64 {
        // Knuth's MMIX generator.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let share = (self.0 >> 33) as f64 / (1u64 << 31) as f64;
        (20_000.0 * share.powi(3)) as u64
    }
}
