//! Training: the loop, its optimiser and schedules, checkpoints, and the folder of a run. It emits events and never
//! prints.
//!
//! A run that was killed goes on from its last checkpoint with the same bits as one that was not, given as many
//! threads: parameters, moments, the place in the data and in the schedule are all saved, and nothing else is random.

pub mod checkpoint;
pub mod config;
pub mod error;
pub mod evaluate;
pub mod events;
pub mod folder;
pub mod jsonl;
pub mod optimizer;
mod teacher;
pub mod tensorboard;
pub mod trainer;

pub use checkpoint::Saved;
pub use config::{MAY_CHANGE, Schedule, TrainConfig};
pub use error::TrainError;
pub use evaluate::{Early, Evaluation, evaluate, evaluate_early, score};
pub use events::{Best, Event, Events, Fan, NoEvents};
pub use folder::{RunFolder, latest_checkpoint, read_options};
pub use jsonl::JsonlSink;
pub use optimizer::AdamW;
pub use tensorboard::TensorBoardSink;
pub use trainer::{Outcome, StopFlag, Trainer, training_device};
