//! Rows as they are in the file, and the checks that turn them into records.

use rusqlite::Row;

use crate::canonical;
use crate::trial::{Status, TrialId, TrialRecord};

/// The columns that [`raw`] reads.
pub(super) const SELECT: &str =
    "SELECT id, key, status, attempts, result, result_hash, error FROM trials";

/// A row as it is in the file, not yet believed.
pub(super) struct Raw {
    id: String,
    key: String,
    status: String,
    attempts: u32,
    result: Option<String>,
    result_hash: Option<String>,
    error: Option<String>,
}

/// Reads one row of [`SELECT`].
pub(super) fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok(Raw {
        id: row.get(0)?,
        key: row.get(1)?,
        status: row.get(2)?,
        attempts: row.get(3)?,
        result: row.get(4)?,
        result_hash: row.get(5)?,
        error: row.get(6)?,
    })
}

impl Raw {
    /// Checks both hashes, so that a flipped bit inside a row is found, which SQLite itself would not see.
    pub(super) fn check(self) -> Result<TrialRecord, String> {
        let id = TrialId::of_canonical(&self.key);
        if id.as_str() != self.id {
            return Err(format!(
                "the key of trial {} does not hash to its id",
                self.id
            ));
        }
        let key = serde_json::from_str(&self.key)
            .map_err(|error| format!("key of trial {id}: {error}"))?;
        let status = [Status::Claimed, Status::Done, Status::Failed]
            .into_iter()
            .find(|status| status.name() == self.status)
            .ok_or_else(|| format!("status {:?} of trial {id}", self.status))?;
        if self.result.is_some() != (status == Status::Done) {
            return Err(format!(
                "trial {id} is {} but its result says otherwise",
                status.name()
            ));
        }
        let result = match self.result {
            None => None,
            Some(text) if Some(canonical::hash(&text)) == self.result_hash => Some(
                serde_json::from_str(&text)
                    .map_err(|error| format!("result of trial {id}: {error}"))?,
            ),
            Some(_) => return Err(format!("the result of trial {id} does not match its hash")),
        };
        Ok(TrialRecord {
            id,
            key,
            status,
            attempts: self.attempts,
            result,
            error: self.error,
        })
    }
}
