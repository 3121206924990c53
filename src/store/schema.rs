//! The version of the database, the steps to the newest, its journal, and in words what is wrong with it. Knows no rows.

use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, TransactionBehavior, ffi};

use crate::config::DATABASE_BUSY;

/// Numbered from 1; the database's `user_version` is the number of the last one applied.
pub const MIGRATIONS: &[&str] = &[
    include_str!("../../sql/migrations/0001_history.sql"),
    include_str!("../../sql/migrations/0002_idempotency.sql"),
    include_str!("../../sql/migrations/0003_deletemerge.sql"),
    include_str!("../../sql/migrations/0004_ids.sql"),
    include_str!("../../sql/migrations/0005_words.sql"),
    include_str!("../../sql/migrations/0006_notes.sql"),
];

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0))
}

/// Errs where a newer or another program made the database.
pub fn check(connection: &Connection) -> Result<(), Trouble> {
    // In one statement, since another process may migrate it meanwhile. Other programs count from 1, too: what has a version
    // has a table of ours, what has none has nothing.
    let both = "SELECT user_version, (SELECT count(*) FROM sqlite_schema WHERE user_version = 0 OR name = 'indexed')
                FROM pragma_user_version";
    match connection.query_row(both, [], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?)))? {
        (version, _) if version > MIGRATIONS.len() as i64 => Err(Trouble::Newer(version)),
        (0, 0) => Ok(()),
        (0, _) | (_, 0) => Err(Trouble::Foreign),
        _ => Ok(()),
    }
}

/// The database is of an older version than the newest.
pub fn is_old(connection: &Connection) -> bool {
    version(connection).is_ok_and(|version| version < MIGRATIONS.len() as i64)
}

/// Has the database keep a write-ahead log. Unlike for other locks, SQLite does not wait for another process that does the
/// same at this moment, as where two servers start at once.
pub fn keep_journal(connection: &Connection) -> rusqlite::Result<()> {
    let began = Instant::now();
    loop {
        let kept = connection.query_row("PRAGMA journal_mode = wal", [], |_| Ok(()));
        let is_busy = kept.as_ref().is_err_and(|e| e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy));
        if !is_busy || began.elapsed() >= DATABASE_BUSY {
            return kept;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that the migrations which are not made yet copy: of the pairs number 4, of what is noted of requests, since number 2 made
/// its table, number 6.
pub fn copied(connection: &Connection) -> rusqlite::Result<u64> {
    let bytes = |query| connection.query_row(query, [], |row| row.get::<_, i64>(0)).map(|bytes| bytes as u64);
    let version = version(connection)?;
    let pairs = if (1..4).contains(&version) { bytes(include_str!("../../sql/queries/pair_bytes.sql"))? } else { 0 };
    let noted = if (2..6).contains(&version) { bytes(include_str!("../../sql/queries/noted_bytes.sql"))? } else { 0 };
    Ok(pairs + noted)
}

/// Makes the migrations that are not made yet, each in a transaction.
pub fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let made = version(connection)?;
    if (1..MIGRATIONS.len() as i64).contains(&made) {
        log::info!("history: migrating from version {made} to {}, which may take a while", MIGRATIONS.len());
    }
    for (number, migration) in (1..).zip(MIGRATIONS).skip(made as usize) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Another process may have made it meanwhile.
        if version(&transaction)? >= number {
            continue;
        }
        transaction.execute_batch(migration)?;
        transaction.pragma_update(None, "user_version", number)?;
        transaction.commit()?;
    }
    Ok(())
}

/// Why the database is not ready.
pub enum Trouble {
    Sql(rusqlite::Error),
    Newer(i64),
    Foreign,
}

impl From<rusqlite::Error> for Trouble {
    fn from(e: rusqlite::Error) -> Trouble {
        Trouble::Sql(e)
    }
}

const FOREIGN: &str = "its tables are not those that this program makes, as after .dump, which leaves out their version; \
                       restore a copy made with VACUUM INTO, or set DATABASE_PATH";

/// What fails where a file system lacks what processes need that share a database.
const SHARING: [i32; 4] =
    [ffi::SQLITE_IOERR_LOCK, ffi::SQLITE_IOERR_SHMOPEN, ffi::SQLITE_IOERR_SHMLOCK, ffi::SQLITE_IOERR_SHMMAP];

/// The trouble in words, with what to do about it.
pub fn advice(trouble: &Trouble) -> String {
    use rusqlite::Error::{QueryReturnedNoRows, SqlInputError};
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
        Trouble::Foreign => return FOREIGN.to_string(),
        Trouble::Sql(e) => e,
    };
    // rusqlite's own text goes on with the statement, which may have many lines.
    let said = if let SqlInputError { msg, .. } = e { msg.clone() } else { e.to_string() };
    let extended = e.sqlite_error().map_or(0, |e| e.extended_code);
    let what = match e.sqlite_error_code() {
        Some(CannotOpen | PermissionDenied | ReadOnly) => {
            "it cannot be opened or written; check the rights of file and folder, the limits on open files and on files of the \
             disk, or set DATABASE_PATH"
        }
        Some(NotADatabase) => "it is no SQLite database; move it away and start again, or restore a backup",
        // An error of the disk looks the same (SQLITE_IOERR_CORRUPTFS).
        Some(DatabaseCorrupt) => {
            "it is damaged, or the disk cannot read it; look at the kernel's messages and at what PRAGMA integrity_check says, \
             and restore a backup if it is damaged"
        }
        Some(DatabaseBusy | DatabaseLocked) => "another process holds its lock; end that process",
        Some(SystemIoFailure) if SHARING.contains(&extended) => {
            "its file system cannot lock or share memory, as that of a network may not; set DATABASE_PATH to a local disk"
        }
        Some(SystemIoFailure) if extended == ffi::SQLITE_IOERR_GETTEMPPATH => {
            "there is no folder for temporary files that can be written; set SQLITE_TMPDIR"
        }
        Some(DiskFull | SystemIoFailure) => "the disk is full or failing; make room",
        _ if extended == ffi::SQLITE_ERROR || matches!(e, SqlInputError { .. } | QueryReturnedNoRows) => FOREIGN,
        _ => "it cannot be used",
    };
    format!("{what} ({said})")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the journal's index SQLite says one thing where the disk is full, and another where it cannot be shared otherwise.
    #[test]
    fn each_trouble_says_what_to_do_about_it() {
        for (code, advised) in [
            (ffi::SQLITE_IOERR_SHMSIZE, "the disk is full"),
            (ffi::SQLITE_FULL, "the disk is full"),
            (ffi::SQLITE_IOERR_SHMMAP, "its file system cannot"),
            (ffi::SQLITE_IOERR_GETTEMPPATH, "there is no folder for temporary files"),
            (ffi::SQLITE_BUSY, "another process holds its lock"),
            (ffi::SQLITE_CORRUPT, "it is damaged"),
            (ffi::SQLITE_NOTADB, "it is no SQLite database"),
            (ffi::SQLITE_READONLY, "it cannot be opened or written"),
        ] {
            let told = advice(&Trouble::Sql(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)));
            assert!(told.starts_with(advised), "{told}");
        }
    }

    /// As where two servers start at once.
    #[test]
    fn what_another_process_migrates_meanwhile_is_not_migrated_again() {
        let path = std::env::temp_dir().join(format!("ai-proxy-{}-migrated.db", std::process::id()));
        let open = || {
            let connection = Connection::open(&path).expect("a file");
            connection.busy_timeout(10 * DATABASE_BUSY).expect("a time");
            connection
        };
        let (one, mut other) = (open(), open());
        one.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
        thread::scope(|scope| {
            let migrating = scope.spawn(|| migrate(&mut other));
            // Until it has seen how old it is, and waits for the lock.
            thread::sleep(Duration::from_millis(50));
            let all = MIGRATIONS.join(";");
            one.execute_batch(&format!("{all}; PRAGMA user_version = {}; COMMIT", MIGRATIONS.len())).expect("it is migrated");
            assert_eq!(migrating.join().expect("no panic"), Ok(()));
        });
        std::fs::remove_file(path).expect("it is there");
    }
}
