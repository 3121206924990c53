//! The version of the database and the steps to the newest, and in words what is wrong with a database. Knows no rows.

use rusqlite::{Connection, TransactionBehavior};

/// Numbered from 1; the database's `user_version` is the number of the last one applied.
pub const MIGRATIONS: &[&str] = &[
    include_str!("../../sql/migrations/0001_history.sql"),
    include_str!("../../sql/migrations/0002_idempotency.sql"),
    include_str!("../../sql/migrations/0003_deletemerge.sql"),
    include_str!("../../sql/migrations/0004_ids.sql"),
];

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0))
}

/// Errs where a newer program made the database.
pub fn check(connection: &Connection) -> Result<(), Trouble> {
    let version = version(connection)?;
    if version > MIGRATIONS.len() as i64 { Err(Trouble::Newer(version)) } else { Ok(()) }
}

/// Makes the migrations that are not made yet, each in a transaction.
pub fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let made = version(connection)?;
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
}

impl From<rusqlite::Error> for Trouble {
    fn from(e: rusqlite::Error) -> Trouble {
        Trouble::Sql(e)
    }
}

/// The trouble in words, with what to do about it.
pub fn advice(trouble: &Trouble) -> String {
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
        Some(NotADatabase) => "it is no SQLite database; move it away and start again, or restore a backup",
        // An error of the disk looks the same (SQLITE_IOERR_CORRUPTFS).
        Some(DatabaseCorrupt) => {
            "it is damaged, or the disk cannot read it; look at the kernel's messages and at what PRAGMA integrity_check says, \
             and restore a backup if it is damaged"
        }
        Some(DatabaseBusy | DatabaseLocked) => "another process holds its lock; end that process",
        Some(DiskFull | SystemIoFailure) => "the disk is full or failing; make room",
        _ if matches!(e, rusqlite::Error::SqlInputError { .. }) => {
            "its tables are not those that this program makes, as after .dump, which leaves out their version; restore a copy \
             made with VACUUM INTO, or set DATABASE_PATH"
        }
        _ => "it cannot be used",
    };
    // rusqlite's own text goes on with the statement, which may have many lines.
    let said = if let rusqlite::Error::SqlInputError { msg, .. } = e { msg.clone() } else { e.to_string() };
    format!("{what} ({said})")
}
