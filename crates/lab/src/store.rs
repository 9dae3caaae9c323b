//! The result store: one SQLite file, one row per trial, safe against a kill at any moment.
//!
//! One comparison at a time writes a store (an operating-system lock beside the file, which a dead process no longer
//! holds). A trial is *claimed* before it runs and *done* or *failed* after, each in one transaction that is on disk when
//! the call returns. So a row that is claimed by an earlier opening belongs to a process that is gone, and its trial
//! is run again; a row that is done is never run again and never changes.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use serde_json::Value;

pub use self::error::StoreError;
use self::error::failure;
use self::row::{Raw, SELECT, raw};
pub use crate::lock::Owner;
use crate::lock::{Lock, LockFailure};
use crate::trial::{Status, TrialId, TrialKey, TrialRecord, TrialResult};
use crate::{canonical, units};

mod error;
mod file;
mod growth;
mod row;

/// Version of the tables; a store with a newer one is refused.
pub const SCHEMA_VERSION: i64 = 1;
/// A trial that this opening may run.
#[derive(Debug)]
pub struct Ticket {
    id: TrialId,
    attempt: u32,
}

impl Ticket {
    /// The trial.
    pub fn id(&self) -> &TrialId {
        &self.id
    }

    /// 1 for the first start, more after a kill.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}

/// The answer to a claim.
#[derive(Debug)]
pub enum Claim {
    /// Run it, then call [`Store::finish`] or [`Store::fail`].
    Run(Ticket),
    /// It has a result already.
    Done(Box<TrialRecord>),
    /// It failed earlier; [`Store::retry_failed`] makes such trials claimable again.
    Failed(Box<TrialRecord>),
    /// This opening claimed it already and has not finished it.
    Busy,
}

/// Which rows to list; an absent field does not restrict.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only this task.
    pub task: Option<String>,
    /// Only this contender.
    pub mixer: Option<String>,
    /// Only this status.
    pub status: Option<Status>,
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    database: Connection,
    owner: String,
    plan: Value,
    _lock: Option<Lock>,
}

impl Store {
    /// Opens the store for one comparison, creating it where absent. `plan` holds every setting that a continued comparison
    /// must share with the one that made the store (tasks, contenders, budget, steps; not the output paths or the commit).
    /// It may ask for further tasks, contenders and seeds: the store then takes it as its own.
    pub fn open(path: &Path, plan: &Value) -> Result<Self, StoreError> {
        let owner = Owner::here();
        let lock = Lock::take(path, &owner).map_err(|failure| match failure {
            LockFailure::Held(owner) => StoreError::Locked {
                path: path.into(),
                owner,
            },
            LockFailure::Io(source) => StoreError::Io {
                action: "lock",
                path: path.into(),
                source,
            },
        })?;
        if !path.exists() {
            file::create(path, plan)?;
        }
        let mut store = Self::connect(path, false)?;
        let asked: Value = serde_json::from_str(&canonical::text(plan)).unwrap_or_default();
        if growth::grows(&store.plan, &asked) {
            store.adopt(asked)?;
        } else {
            let differences = canonical::differences(&store.plan, &asked, 8);
            return Err(StoreError::PlanMismatch {
                path: path.into(),
                differences,
            });
        }
        store.owner = serde_json::to_string(&owner).unwrap_or_default();
        store._lock = Some(lock);
        Ok(store)
    }

    /// Opens an existing store to look at it, also while a comparison is writing it.
    pub fn read(path: &Path) -> Result<Self, StoreError> {
        Self::connect(path, true)
    }

    fn connect(path: &Path, read_only: bool) -> Result<Self, StoreError> {
        let (database, plan) = file::connect(path, read_only)?;
        let store = Self {
            path: path.into(),
            database,
            owner: String::new(),
            plan,
            _lock: None,
        };
        store.records()?;
        Ok(store)
    }

    /// Takes a plan that asks for more.
    fn adopt(&mut self, plan: Value) -> Result<(), StoreError> {
        if canonical::text(&plan) != canonical::text(&self.plan) {
            file::replace_plan(&mut self.database, &plan)
                .map_err(|source| failure("write", &self.path, source))?;
            self.plan = plan;
        }
        Ok(())
    }

    /// The plan that the store was made with, or the last that asked for more.
    pub fn plan(&self) -> &Value {
        &self.plan
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks to run a trial. What a dead process claimed is handed out again; what is done never is.
    pub fn claim(&mut self, key: &TrialKey) -> Result<Claim, StoreError> {
        let id = key.id();
        let owner = self.owner.clone();
        self.transact("claim a trial in", |rows| {
            let found = rows
                .query_row("SELECT status, owner FROM trials WHERE id = ?1", [id.as_str()], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
                })
                .optional()?;
            match found {
                None => {
                    rows.execute(
                        "INSERT INTO trials (id, task, mixer, key, status, attempts, owner, claimed_at)
                         VALUES (?1, ?2, ?3, ?4, 'claimed', 1, ?5, ?6)",
                        params![id.as_str(), key.task, key.mixer, key.canonical(), owner, units::now()],
                    )?;
                }
                Some((status, _)) if status != "claimed" => return Ok(None),
                Some((_, holder)) if holder == owner => return Ok(Some(Claim::Busy)),
                Some(_) => {
                    rows.execute(
                        "UPDATE trials SET attempts = attempts + 1, owner = ?2, claimed_at = ?3 WHERE id = ?1",
                        params![id.as_str(), owner, units::now()],
                    )?;
                }
            }
            let attempt =
                rows.query_row("SELECT attempts FROM trials WHERE id = ?1", [id.as_str()], |row| row.get(0))?;
            Ok(Some(Claim::Run(Ticket { id: id.clone(), attempt })))
        })?
        .map_or_else(|| self.ended(&id), Ok)
    }

    fn ended(&self, id: &TrialId) -> Result<Claim, StoreError> {
        let record = self.get(id)?.map(Box::new);
        match record {
            Some(record) if record.status == Status::Done => Ok(Claim::Done(record)),
            Some(record) => Ok(Claim::Failed(record)),
            None => Err(self.corrupt(format!("trial {id} vanished"))),
        }
    }

    /// Records what a claimed trial measured. On disk when this returns.
    pub fn finish(&mut self, ticket: &Ticket, result: &TrialResult) -> Result<(), StoreError> {
        // A result holds numbers and strings only, which always serialise.
        let text = serde_json::to_string(result).expect("a trial result serialises");
        let hash = canonical::hash(&text);
        self.end(ticket, "done", Some((&text, &hash)), None)
    }

    /// Records that a claimed trial ended with an error.
    pub fn fail(&mut self, ticket: &Ticket, error: &str) -> Result<(), StoreError> {
        self.end(ticket, "failed", None, Some(error))
    }

    /// Gives a claimed trial back unrun, as on Ctrl-C.
    pub fn release(&mut self, ticket: Ticket) -> Result<(), StoreError> {
        let owner = self.owner.clone();
        let changed = self.transact("release a trial of", |rows| {
            let sql = "DELETE FROM trials WHERE id = ?1 AND status = 'claimed' AND owner = ?2";
            rows.execute(sql, params![ticket.id.as_str(), owner])
        })?;
        if changed == 1 {
            Ok(())
        } else {
            Err(self.not_claimed(&ticket.id))
        }
    }

    fn end(
        &mut self,
        ticket: &Ticket,
        status: &str,
        result: Option<(&str, &str)>,
        error: Option<&str>,
    ) -> Result<(), StoreError> {
        let owner = self.owner.clone();
        let (text, hash) = result.unzip();
        let changed = self.transact("record a trial in", |rows| {
            rows.execute(
                "UPDATE trials SET status = ?3, result = ?4, result_hash = ?5, error = ?6, finished_at = ?7
                 WHERE id = ?1 AND status = 'claimed' AND owner = ?2",
                params![ticket.id.as_str(), owner, status, text, hash, error, units::now()],
            )
        })?;
        if changed == 1 {
            Ok(())
        } else {
            Err(self.not_claimed(&ticket.id))
        }
    }

    /// Forgets failures, so that those trials run again; returns how many there were.
    pub fn retry_failed(&mut self) -> Result<usize, StoreError> {
        self.transact("retry failed trials of", |rows| {
            rows.execute("DELETE FROM trials WHERE status = 'failed'", [])
        })
    }

    /// One row.
    pub fn get(&self, id: &TrialId) -> Result<Option<TrialRecord>, StoreError> {
        let mut found = self.select(" WHERE id = ?1", params![id.as_str()])?;
        Ok(found.pop())
    }

    /// All rows in the order in which they were first claimed.
    pub fn records(&self) -> Result<Vec<TrialRecord>, StoreError> {
        self.query(&Filter::default())
    }

    /// The rows that `filter` lets through, in the order in which they were first claimed.
    pub fn query(&self, filter: &Filter) -> Result<Vec<TrialRecord>, StoreError> {
        self.select(
            " WHERE (?1 IS NULL OR task = ?1) AND (?2 IS NULL OR mixer = ?2) AND (?3 IS NULL OR status = ?3)
              ORDER BY number",
            params![filter.task, filter.mixer, filter.status.map(Status::name)],
        )
    }

    fn select(
        &self,
        rest: &str,
        values: &[&dyn rusqlite::ToSql],
    ) -> Result<Vec<TrialRecord>, StoreError> {
        let read = || {
            let mut statement = self.database.prepare(&format!("{SELECT}{rest}"))?;
            let rows = statement.query_map(values, raw)?;
            rows.collect::<Result<Vec<_>, _>>()
        };
        let rows: Vec<Raw> = read().map_err(|source| failure("read", &self.path, source))?;
        rows.into_iter()
            .map(|row| row.check().map_err(|detail| self.corrupt(detail)))
            .collect()
    }

    fn transact<T>(
        &mut self,
        action: &'static str,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let path = &self.path;
        let run = |database: &mut Connection| {
            let rows = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = work(&rows)?;
            rows.commit()?;
            Ok(value)
        };
        run(&mut self.database).map_err(|source| failure(action, path, source))
    }

    fn corrupt(&self, detail: String) -> StoreError {
        StoreError::Corrupt {
            path: self.path.clone(),
            detail,
        }
    }

    fn not_claimed(&self, id: &TrialId) -> StoreError {
        let found = self
            .get(id)
            .ok()
            .flatten()
            .map_or("absent", |record| record.status.name());
        StoreError::NotClaimed {
            id: id.clone(),
            found: found.into(),
        }
    }
}
