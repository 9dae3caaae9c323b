//! What can go wrong with data.

use std::path::PathBuf;

/// Data that cannot be had or read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// No such task.
    #[error("find task {name:?}: no such name{hint}; `anyformer list` shows all")]
    UnknownTask {
        /// What was asked for.
        name: String,
        /// `; did you mean …?` or empty.
        hint: String,
    },
    /// No such option.
    #[error("read the options of task {task}: unknown key {key:?}{hint}; its keys are: {known}")]
    UnknownOption {
        /// The task.
        task: &'static str,
        /// The key.
        key: String,
        /// `; did you mean …?` or empty.
        hint: String,
        /// All keys.
        known: String,
    },
    /// A value that cannot be.
    #[error("set up task {task}: {message}")]
    Option {
        /// The task.
        task: &'static str,
        /// Expected, got, and what to change.
        message: String,
    },
    /// A file that cannot be read.
    #[error("read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A file whose content is not what it should be.
    #[error("read {path}: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Expected, got, place and hint.
        message: String,
    },
    /// A position that this loader cannot have been at.
    #[error("go to a position in the data of task {task}: {message}")]
    Position {
        /// The task.
        task: String,
        /// Expected and got.
        message: String,
    },
    /// A tokenizer that cannot be read, made or used.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::TokenizerError),
}

/// `; did you mean "…"?` for the candidate nearest to `name`, or nothing.
pub(crate) fn hint<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(String::new(), |(_, candidate)| {
            format!("; did you mean {candidate:?}?")
        })
}
