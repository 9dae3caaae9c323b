//! The comparison: every contender at the size that its budget gives it, on every task, for every seed.
//!
//! All contenders see the same data in the same order with the same optimiser and as many learning rates. Each trial is
//! a row of the store, claimed before it runs and finished after, so a comparison that was killed goes on where it was.

mod contest;
mod latency;
pub mod plan;
mod run;
mod size;
mod task_model;

use std::path::PathBuf;

pub(crate) use contest::write;
pub use plan::{Plan, TaskPlan, Unfit, label, parse_mixer};
pub use run::{Comparison, Price, Where, prices, run};
pub use task_model::task_model;

use crate::match_budget::BudgetError;
use crate::trial::TrialRecord;

/// What a comparison tells the outside.
#[derive(Clone, Debug)]
pub enum Event {
    /// A contender's size for a task was solved.
    Sized {
        /// The task.
        task: String,
        /// The contender.
        mixer: String,
        /// Width.
        dim: usize,
        /// Trainable parameters.
        params: u64,
        /// `achieved / target - 1`.
        mismatch: f64,
    },
    /// A contender takes no part in a task.
    LeftOut {
        /// The task.
        task: String,
        /// The contender.
        mixer: String,
        /// Why.
        reason: String,
    },
    /// A trial begins.
    Started {
        /// Trials before it.
        done: usize,
        /// Trials in all.
        total: usize,
        /// The task.
        task: String,
        /// The contender.
        mixer: String,
        /// The seed.
        seed: u64,
    },
    /// A trial is under way.
    Step {
        /// Updates done.
        step: u64,
        /// Updates in all.
        steps: u64,
        /// Training loss.
        loss: f64,
        /// Input positions per second.
        tokens_per_second: f64,
    },
    /// A contender's steps were timed at so many lengths.
    Timed {
        /// The contender.
        mixer: String,
        /// Lengths.
        lengths: usize,
    },
    /// A trial is done, now or in an earlier sitting.
    Finished {
        /// Trials done.
        done: usize,
        /// Trials in all.
        total: usize,
        /// What was measured, or why it failed.
        record: Box<TrialRecord>,
        /// True when it was found in the store.
        earlier: bool,
    },
}

/// Why a comparison could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A plan that makes no sense.
    #[error("plan the comparison: {0}")]
    Plan(String),
    /// A contender that cannot be made to cost the budget.
    #[error("size {mixer} to the budget: {error}")]
    Budget {
        /// The contender.
        mixer: String,
        /// What is the nearest.
        error: BudgetError,
    },
    /// A mixer's config.
    #[error(transparent)]
    Mixer(#[from] anyformer_mixers::ConfigError),
    /// A model's config.
    #[error(transparent)]
    Model(#[from] anyformer_models::ModelError),
    /// A task.
    #[error(transparent)]
    Data(#[from] anyformer_data::DataError),
    /// Training options, or training itself.
    #[error(transparent)]
    Train(#[from] anyformer_train::TrainError),
    /// The store of results.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The export.
    #[error(transparent)]
    Export(#[from] crate::export::ExportError),
    /// A file of the comparison's folder.
    #[error("write {path}: {error}")]
    Folder {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The report.
    #[error("draw the report: {0}")]
    Report(String),
    /// It was asked to stop; everything finished is in the store.
    #[error("finish the comparison: it was stopped; run the same command to go on")]
    Stopped,
}
