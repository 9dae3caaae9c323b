//! Why a store refuses.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use crate::lock::Owner;
use crate::trial::TrialId;

/// Why the store refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process, or another opening in this one, is writing it.
    #[error("open the trial store {}: {} is writing it; wait until it ends, or use another --out", .path.display(), holder(.owner))]
    Locked {
        /// The store.
        path: PathBuf,
        /// Who holds it, where known.
        owner: Option<Owner>,
    },
    /// There is no such store.
    #[error("open the trial store {}: no such file; run `anyformer compare` first", .path.display())]
    Missing {
        /// The store.
        path: PathBuf,
    },
    /// The file is damaged, cut off, or not SQLite at all.
    #[error("open the trial store {}: the file is damaged or not a store ({detail}); move it away to start anew", .path.display())]
    Corrupt {
        /// The store.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// It was written by a newer program.
    #[error("open the trial store {}: its schema version is {found}, this program knows {known}; use the newer program", .path.display())]
    Schema {
        /// The store.
        path: PathBuf,
        /// Version in the file.
        found: i64,
        /// Version of this program.
        known: i64,
    },
    /// It belongs to a comparison with other settings.
    #[error("continue the trial store {}: it was made by another plan: {}; repeat those settings, or use another --out", .path.display(), .differences.join("; "))]
    PlanMismatch {
        /// The store.
        path: PathBuf,
        /// Where the plans differ.
        differences: Vec<String>,
    },
    /// A trial was finished that this opening of the store does not hold.
    #[error("record trial {id}: it is {found}, not claimed by this run")]
    NotClaimed {
        /// The trial.
        id: TrialId,
        /// What the row says.
        found: String,
    },
    /// The disk is full; nothing was changed.
    #[error("write the trial store {}: the disk is full; free some space and run the same command again", .path.display())]
    DiskFull {
        /// The store.
        path: PathBuf,
    },
    /// Input or output failed.
    #[error("{action} the trial store {}: {source}", .path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The store.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// SQLite failed in another way.
    #[error("{action} the trial store {}: {source}", .path.display())]
    Sqlite {
        /// What was being done.
        action: &'static str,
        /// The store.
        path: PathBuf,
        /// The cause.
        source: rusqlite::Error,
    },
}

fn holder(owner: &Option<Owner>) -> String {
    owner
        .as_ref()
        .map_or("another process".into(), Owner::describe)
}

/// An SQLite failure as the error that tells what to do.
pub(super) fn failure(action: &'static str, path: &Path, source: rusqlite::Error) -> StoreError {
    match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => StoreError::Corrupt {
            path: path.into(),
            detail: source.to_string(),
        },
        Some(ErrorCode::DiskFull) => StoreError::DiskFull { path: path.into() },
        // Tables that are not there, or hold something else than they should (another type, no UTF-8), are damage.
        // The statements are fixed, so an error in them ("no such table", "unsupported file format") is the file's.
        None | Some(ErrorCode::Unknown) => StoreError::Corrupt {
            path: path.into(),
            detail: source.to_string(),
        },
        Some(_) => StoreError::Sqlite {
            action,
            path: path.into(),
            source,
        },
    }
}
