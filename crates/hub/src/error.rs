//! What can be wrong with a model folder.

use std::io;
use std::path::{Path, PathBuf};

use anyformer_models::ModelError;

/// A model folder or one of its files that cannot be read or written. Every message finishes "failed to …".
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The operating system refused to read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The operating system refused to write; nothing is left under the final name.
    #[error("write {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The folder to be written is there already.
    #[error("write {}: it exists and is not empty; choose another name or remove it first", .0.display())]
    Exists(PathBuf),
    /// A folder without the files of a model.
    #[error("open the model folder {}: no {missing} in it; a model folder holds config.json and model.safetensors", folder.display())]
    NotAModel {
        /// The folder.
        folder: PathBuf,
        /// What is not there.
        missing: &'static str,
    },
    /// A file that is not what it should be.
    #[error("read {}: {damage}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        damage: Damage,
    },
    /// Tensors that do not fit the model, all of them.
    #[error("load {}: {}", path.display(), list(problems))]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Every tensor that does not fit.
        problems: Vec<Problem>,
    },
    /// A config that names no model.
    #[error("load {}: failed to {source}", path.display())]
    Model {
        /// The config file.
        path: PathBuf,
        /// What the model said.
        source: ModelError,
    },
    /// A model that no family of another program has.
    #[error("export {}: {reason}", path.display())]
    NoFamily {
        /// The model.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A chat template that cannot be read or used.
    #[error("use the chat template of {}: {reason}", path.display())]
    Template {
        /// The folder or file that holds it.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A weight that cannot be quantised.
    #[error("quantise {name}: {reason}")]
    Quantise {
        /// The weight.
        name: String,
        /// Why not.
        reason: String,
    },
    /// A folder written by a newer version.
    #[error("read {}: format_version is {got}, this version reads up to {known}; update anyformer", path.display())]
    Version {
        /// The config file.
        path: PathBuf,
        /// What stands in it.
        got: u64,
        /// What can be read.
        known: u64,
    },
}

impl HubError {
    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        HubError::Write { path, source }
    }

    pub(crate) fn damaged(path: &Path, damage: Damage) -> Self {
        let path = path.to_path_buf();
        HubError::Damaged { path, damage }
    }
}

/// What is wrong with the bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Shorter than the eight bytes that every safetensors file begins with.
    #[error(
        "{bytes} bytes are no safetensors file (8 bytes of header length come first); it is cut off, copy it again"
    )]
    NoHeader {
        /// Size of the file.
        bytes: usize,
    },
    /// A header larger than any real one.
    #[error(
        "its first 8 bytes say that the header is {claimed} bytes long, more than the allowed {allowed}; this is not a safetensors file or its beginning is damaged"
    )]
    HeaderTooLarge {
        /// What the file says.
        claimed: u64,
        /// What is allowed.
        allowed: u64,
    },
    /// A header that goes on beyond the end.
    #[error(
        "the header should be {claimed} bytes long, but the whole file has {bytes}; it is cut off or not a safetensors file, copy it again"
    )]
    HeaderBeyondFile {
        /// What the file says.
        claimed: u64,
        /// Size of the file.
        bytes: usize,
    },
    /// A header that is no JSON table of tensors.
    #[error(
        "its header is not the JSON of a safetensors file: {0}; the file is damaged, copy it again"
    )]
    HeaderNotJson(String),
    /// Offsets and shapes that do not fit together.
    #[error("its header contradicts itself: {0}; the file is damaged, copy it again")]
    Layout(String),
    /// Data shorter or longer than the header says.
    #[error(
        "the tensors take {expected} bytes, the file holds {got} after its header; it is cut off or has bytes added, copy it again"
    )]
    Length {
        /// What the header says.
        expected: usize,
        /// What is there.
        got: usize,
    },
    /// Not the bytes that were written.
    #[error(
        "sha256 is {got}, but {} says {expected}; the file was changed or damaged, copy it again",
        crate::folder::MANIFEST_FILE
    )]
    Checksum {
        /// What the manifest says.
        expected: String,
        /// What the bytes give.
        got: String,
    },
    /// Named in the manifest, but not there (or the reverse, of a file that must be named).
    #[error("it is missing from {}", .0)]
    Missing(&'static str),
    /// A GGUF file that cannot be read.
    #[error("as a GGUF file {0}")]
    Gguf(String),
    /// A text file that cannot be read.
    #[error("{0}")]
    Text(String),
}

/// One tensor that does not fit, under the name that it has in its file; of a model in several files the name of the file
/// follows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The model has it, the file does not.
    #[error("{name} {shape:?} is missing")]
    Missing {
        /// The tensor.
        name: String,
        /// Its shape in the model.
        shape: Vec<usize>,
    },
    /// The file has it, the model does not.
    #[error("{name} {shape:?} is not in the model")]
    Extra {
        /// The tensor.
        name: String,
        /// Its shape in the file.
        shape: Vec<usize>,
    },
    /// Another shape.
    #[error("{name} should be {expected:?}, is {got:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// In the model.
        expected: Vec<usize>,
        /// In the file.
        got: Vec<usize>,
    },
    /// In two files of one model.
    #[error("{name} stands in {} and again in {}", files[0], files[1])]
    Twice {
        /// The tensor.
        name: String,
        /// The files.
        files: [String; 2],
    },
    /// A type that is not read as f32.
    #[error(
        "{name} is {dtype}; F32, F16 and BF16 are read, in GGUF also Q8_0, Q4_0, Q4_1, Q4_K and Q6_K"
    )]
    Type {
        /// The tensor.
        name: String,
        /// Its type in the file.
        dtype: String,
    },
    /// A quantised weight that is not what it should be.
    #[error("{name} {reason}")]
    Quantised {
        /// The weight, or one of its tensors.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A value that is not a finite number.
    #[error("{name} holds {count} values that are not finite numbers, the first at {first}")]
    NotFinite {
        /// The tensor.
        name: String,
        /// How many.
        count: usize,
        /// Flat index of the first.
        first: usize,
    },
}

fn list(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| format!("\n  {problem}"))
        .collect();
    match problems.len() {
        1 => problems[0].to_string(),
        count => format!("{count} tensors do not fit:{}", lines.concat()),
    }
}
