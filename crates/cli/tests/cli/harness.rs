//! Runs the binary in a folder and keeps what it said.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Fails the test unless the command succeeded.
    #[track_caller]
    pub fn ok(self) -> Ran {
        assert_eq!(self.code, 0, "out:\n{}\nerr:\n{}", self.out, self.err);
        self
    }

    /// Fails the test unless it is bad input whose message holds all of `words`.
    #[track_caller]
    pub fn bad(self, words: &[&str]) -> Ran {
        assert_eq!(self.code, 2, "out:\n{}\nerr:\n{}", self.out, self.err);
        assert!(!self.err.contains("panicked"), "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in:\n{}", self.err);
        }
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error} in:\n{}", self.out))
    }
}

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_anyformer"))
}

pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.current_dir(folder).args(args).stdin(Stdio::null());
    command
}

pub fn anyformer(folder: &Path, args: &[&str]) -> Ran {
    let output = command(folder, args).output().expect("the binary starts");
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

pub fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the checkout")
}

/// Every file below a folder, sorted.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).expect("a folder") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => open.push(path),
                false => found.push(path),
            }
        }
    }
    found.sort();
    found
}

/// A language model of a few thousand parameters on bytes.
pub const TINY_TEXT: &[&str] = &[
    "task.name=text",
    "task.time=32",
    "model.dim=16",
    "model.layers=1",
    "model.mixers.0.heads=2",
    "train.batch=2",
    "train.warmup=0",
    "train.eval_batches=1",
    "--threads=1",
    "--quiet",
];

/// Trains [`TINY_TEXT`] with more words into `folder/run`.
pub fn train_tiny(folder: &Path, more: &[&str]) -> Ran {
    let mut words = vec!["train"];
    words.extend(TINY_TEXT);
    words.extend(more);
    words.extend(["--out", "run"]);
    anyformer(folder, &words)
}

/// One trained run that tests may read but not change: its folder.
pub fn trained() -> &'static Path {
    static TRAINED: OnceLock<PathBuf> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("trained");
        let _ = std::fs::remove_dir_all(&place);
        std::fs::create_dir_all(&place).expect("a folder");
        train_tiny(&place, &["model.mixers.0.name=gla", "train.steps=3"]).ok();
        place.join("run")
    })
}

/// The model folder of a run: its newest checkpoint.
pub fn newest(run: &Path) -> PathBuf {
    let entries = std::fs::read_dir(run.join("checkpoints")).expect("checkpoints");
    let mut steps: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    steps.sort();
    steps.pop().expect("a checkpoint")
}

/// A copy of the newest checkpoint of [`trained`] that may be changed.
pub fn model_copy(place: &Path) -> PathBuf {
    let copy = place.join("model");
    std::fs::create_dir_all(&copy).expect("a folder");
    for file in files(&newest(trained())) {
        std::fs::copy(&file, copy.join(file.file_name().expect("a name"))).expect("copied");
    }
    copy
}
