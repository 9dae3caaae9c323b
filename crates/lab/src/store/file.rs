//! The file itself: making it, and believing it.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params};
use serde_json::Value;

use super::SCHEMA_VERSION;
use super::error::{StoreError, failure};
use crate::{atomic, canonical, units};

/// SQLite's application id of our stores: `ANYF`.
const APPLICATION_ID: i64 = 0x414e_5946;

const SCHEMA: &str = "
CREATE TABLE meta (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE trials (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    task TEXT NOT NULL,
    mixer TEXT NOT NULL,
    key TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('claimed', 'done', 'failed')),
    attempts INTEGER NOT NULL,
    owner TEXT NOT NULL,
    claimed_at INTEGER NOT NULL,
    finished_at INTEGER,
    result TEXT,
    result_hash TEXT,
    error TEXT
);
";

const PUT: &str = "INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)";

fn put_plan(rows: &Transaction, plan: &Value) -> rusqlite::Result<()> {
    let plan = canonical::text(plan);
    let mut put = rows.prepare(PUT)?;
    put.execute(params!["plan_hash", canonical::hash(&plan)])?;
    put.execute(params!["plan", plan])?;
    Ok(())
}

/// Another plan for the trials that are there.
pub(super) fn replace_plan(database: &mut Connection, plan: &Value) -> rusqlite::Result<()> {
    let rows = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
    put_plan(&rows, plan)?;
    rows.commit()
}

/// Builds a new, empty store under a temporary name and renames it, so that a half-made one is never seen.
pub(super) fn create(path: &Path, plan: &Value) -> Result<(), StoreError> {
    let io = |source| StoreError::Io {
        action: "create",
        path: path.into(),
        source,
    };
    let temporary = atomic::temporary_name(path).map_err(io)?;
    let _ = std::fs::remove_file(&temporary);
    let build = || {
        let mut database = Connection::open(&temporary)?;
        database.pragma_update(None, "synchronous", "FULL")?;
        let rows = database.transaction()?;
        rows.execute_batch(SCHEMA)?;
        rows.pragma_update(None, "application_id", APPLICATION_ID)?;
        let mut put = rows.prepare(PUT)?;
        put.execute(params!["schema_version", SCHEMA_VERSION])?;
        put.execute(params!["created", units::now()])?;
        drop(put);
        put_plan(&rows, plan)?;
        rows.commit()
    };
    let outcome = build().map_err(|source| failure("create", path, source));
    let outcome = outcome.and_then(|()| std::fs::rename(&temporary, path).map_err(io));
    if outcome.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    atomic::sync_folder(path);
    outcome
}

/// Opens an existing file and checks that it is a whole store of a known version.
pub(super) fn connect(path: &Path, read_only: bool) -> Result<(Connection, Value), StoreError> {
    let corrupt = |detail: String| StoreError::Corrupt {
        path: path.into(),
        detail,
    };
    let fail = |source| failure("open", path, source);
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(StoreError::Missing { path: path.into() });
        }
        Err(source) => {
            return Err(StoreError::Io {
                action: "open",
                path: path.into(),
                source,
            });
        }
        Ok(found) if !found.is_file() => return Err(corrupt("not a regular file".into())),
        Ok(found) if found.len() == 0 => return Err(corrupt("0 bytes".into())),
        Ok(_) => {}
    }
    // Also a reader opens for writing where it may: what a killed writer left half-done must be rolled back first.
    let flags = OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let database =
        match Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_READ_WRITE) {
            Err(_) if read_only => {
                Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_READ_ONLY)
            }
            opened => opened,
        }
        .map_err(fail)?;
    database
        .busy_timeout(Duration::from_secs(10))
        .map_err(fail)?;
    let id: i64 = database
        .query_row("PRAGMA application_id", [], |row| row.get(0))
        .map_err(fail)?;
    if id != APPLICATION_ID {
        return Err(corrupt(format!(
            "an SQLite file of another program, application id {id:#x}"
        )));
    }
    let sound: String = database
        .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
        .map_err(fail)?;
    if sound != "ok" {
        return Err(corrupt(sound));
    }
    let meta = |name: &str| format!("SELECT value FROM meta WHERE name = '{name}'");
    let found: i64 = database
        .query_row(&meta("schema_version"), [], |row| row.get(0))
        .map_err(fail)?;
    if found != SCHEMA_VERSION {
        return Err(StoreError::Schema {
            path: path.into(),
            found,
            known: SCHEMA_VERSION,
        });
    }
    let plan: String = database
        .query_row(&meta("plan"), [], |row| row.get(0))
        .map_err(fail)?;
    let hash: String = database
        .query_row(&meta("plan_hash"), [], |row| row.get(0))
        .map_err(fail)?;
    if canonical::hash(&plan) != hash {
        return Err(corrupt("the plan does not match its hash".into()));
    }
    let plan = serde_json::from_str(&plan).map_err(|error| corrupt(format!("plan: {error}")))?;
    // One file when idle: a rollback journal, removed at each commit, not a write-ahead log beside it.
    if read_only {
        database
            .pragma_update(None, "query_only", true)
            .map_err(fail)?;
    } else {
        let mode: String = database
            .query_row("PRAGMA journal_mode = DELETE", [], |row| row.get(0))
            .map_err(fail)?;
        debug_assert_eq!(mode, "delete");
        database
            .pragma_update(None, "synchronous", "FULL")
            .map_err(fail)?;
    }
    Ok((database, plan))
}
