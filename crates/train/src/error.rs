//! Why a training run cannot begin or go on.

use std::io;
use std::path::PathBuf;

use anyformer_data::DataError;
use anyformer_hub::HubError;
use anyformer_models::ModelError;

/// A run that cannot begin or go on. Every message finishes "failed to …".
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Options that cannot be.
    #[error("read the training options: {0}")]
    Config(String),
    /// A model for inference only.
    #[error(
        "train: {0} is quantised, and quantised weights are not trained; train the model that it was made of"
    )]
    Quantised(String),
    /// A run file that cannot be read.
    #[error("read {}: {message}", path.display())]
    Run {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The folder of a new run is not empty.
    #[error("start a run in {}: it is not empty; choose another folder, or resume the run in it", .0.display())]
    FolderNotEmpty(PathBuf),
    /// Another process trains there.
    #[error("open the run in {}: another process is training there; stop it or choose another folder", .0.display())]
    FolderInUse(PathBuf),
    /// Not the folder of a run.
    #[error("open the run in {}: no run.toml in it; give the folder that a training run was started in", .0.display())]
    NotARun(PathBuf),
    /// The checkpoint was made with other options.
    #[error("resume from {}: the options differ from the run's own: {}; start a new run to change them (these may change: {})",
        checkpoint.display(), differences.join(", "), crate::config::MAY_CHANGE.join(", "))]
    OtherConfig {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// `key: was …, now …`.
        differences: Vec<String>,
    },
    /// A part of a checkpoint that does not fit.
    #[error("resume from {}: {message}", checkpoint.display())]
    Checkpoint {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A checkpoint with a damaged file.
    #[error("resume from {}: failed to {source}; or remove that folder to go on from the checkpoint before it", checkpoint.display())]
    Unreadable {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What is wrong.
        source: HubError,
    },
    /// A loss or gradient that is not a finite number; the parameters are those before the step.
    #[error("take step {step}: the loss is {loss}, and {}; the last checkpoint is unharmed, try a smaller lr or clip",
        match parameter { Some(name) => format!("the gradient of {name} is not finite"), None => "every gradient is finite".to_string() })]
    NotFinite {
        /// The update that was to be made, counted from 1.
        step: u64,
        /// The loss there.
        loss: f64,
        /// The first parameter, in order of construction, whose gradient is not finite.
        parameter: Option<String>,
    },
    /// A teacher that does not fit the student.
    #[error("learn from the teacher in {}: {message}", path.display())]
    Teacher {
        /// Its folder.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A model that cannot be built or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Data that cannot be had.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A file of a checkpoint that cannot be read or written.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Another file that cannot be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried: `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A receiver of events failed: a full disk.
    #[error("record an event: {0}")]
    Event(#[source] io::Error),
}

impl TrainError {
    pub(crate) fn io(
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| TrainError::Io {
            action,
            path,
            source,
        }
    }
}
