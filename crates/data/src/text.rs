//! Language modelling on text: the next byte or the next token of a file, a folder of files, or the shipped Shakespeare.
//!
//! The text is split in three runs: training, then validation, then test. Windows of `time` tokens cover a run without
//! overlap; in training every pass shifts them by a random amount.

use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::DataError;
use crate::task::{
    Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, below, read, rng_for,
};
use crate::tokenizer::Tokenizer;

const NAME: &str = "text";
pub(crate) static SHAKESPEARE: &str = include_str!("../assets/shakespeare.txt");

/// Options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct TextOptions {
    /// A UTF-8 file or a folder of `.txt` files; absent: the shipped Shakespeare.
    pub path: Option<PathBuf>,
    /// `bytes`, `bpe` (trained on the training part), or the path of a tokenizer.json.
    pub tokenizer: String,
    /// Vocabulary of a trained `bpe` tokenizer.
    pub vocab: usize,
    /// Tokens of a row.
    pub time: usize,
    /// Share of the text for validation, and as much for test.
    pub held_out: f64,
}

impl Default for TextOptions {
    fn default() -> Self {
        TextOptions {
            path: None,
            tokenizer: "bytes".into(),
            vocab: 1024,
            time: 256,
            held_out: 0.05,
        }
    }
}

/// Reads one UTF-8 file.
fn read_file(path: &Path) -> Result<String, DataError> {
    let bytes = std::fs::read(path).map_err(|error| DataError::Read {
        path: path.to_path_buf(),
        error,
    })?;
    String::from_utf8(bytes).map_err(|error| DataError::Format {
        path: path.to_path_buf(),
        message: format!(
            "expected UTF-8 text, and byte {} is not; convert the file to UTF-8",
            error.utf8_error().valid_up_to()
        ),
    })
}

fn read_path(path: &Path) -> Result<String, DataError> {
    if !path.is_dir() {
        return read_file(path);
    }
    let fail = |error| DataError::Read {
        path: path.to_path_buf(),
        error,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let file = entry.map_err(fail)?.path();
        if file.extension().is_some_and(|ending| ending == "txt") {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(DataError::Format {
            path: path.to_path_buf(),
            message: "the folder holds no .txt file".into(),
        });
    }
    files.sort();
    let texts = files
        .iter()
        .map(|file| read_file(file))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(texts.join("\n"))
}

/// The nearest place at or before `at` where a character begins.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(0)
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (TextOptions, _) = read(NAME, options)?;
    let wrong = |message: String| DataError::Option {
        task: NAME,
        message,
    };
    if o.time == 0 || !(o.held_out > 0.0 && o.held_out < 0.5) {
        return Err(wrong(format!(
            "expected time of at least 1 and held_out between 0 and 0.5, got {} and {}",
            o.time, o.held_out
        )));
    }
    let text = match &o.path {
        Some(path) => read_path(path)?,
        None => SHAKESPEARE.to_string(),
    };
    let held = (text.len() as f64 * o.held_out) as usize;
    let first = boundary(&text, text.len() - 2 * held);
    let second = boundary(&text, text.len() - held);
    let parts = [&text[..first], &text[first..second], &text[second..]];
    let tokenizer = match o.tokenizer.as_str() {
        "bytes" => Tokenizer::Bytes,
        "bpe" => Tokenizer::train_bpe(&[parts[0]], o.vocab)?,
        path => Tokenizer::load(Path::new(path))?,
    };
    let mut runs = Vec::new();
    for (part, name) in parts.iter().zip(["training", "validation", "test"]) {
        let ids = tokenizer.encode(part)?;
        // One window, its shift and the token after it.
        let needed = o.time.saturating_mul(2).saturating_add(1);
        if ids.len() < needed {
            let source = o.path.as_deref().unwrap_or(Path::new("the shipped text"));
            return Err(wrong(format!(
                "the {name} part of {} has {} tokens, fewer than the {} that rows of {} need; give more text, a shorter time or a larger held_out",
                source.display(),
                ids.len(),
                needed,
                o.time
            )));
        }
        runs.push(ids);
    }
    let total: usize = runs.iter().map(Vec::len).sum();
    let what = match &o.path {
        Some(path) => path.display().to_string(),
        None => "Shakespeare's plays".into(),
    };
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: NAME.into(),
            description: format!(
                "Language modelling on {what}: the next of {total} tokens ({}), rows of {}.",
                o.tokenizer, o.time
            ),
            source: match o.path {
                Some(_) => "the user's files".into(),
                None => "public-domain plays; see crates/data/assets/README.md".into(),
            },
            kind: TaskKind::NextToken,
            time: o.time,
            vocab: tokenizer.vocab(),
            classes: 0,
            floor: None,
            options: resolved,
        },
        samples: Text { runs, time: o.time },
        tokenizer: Some(tokenizer),
    }))
}

struct Text {
    runs: Vec<Vec<u32>>,
    time: usize,
}

impl Samples for Text {
    fn count(&self, split: Split) -> Option<usize> {
        let windows = (self.runs[split as usize].len() - 1) / self.time;
        Some(match split {
            // One window less, so that all can shift.
            Split::Train => windows - 1,
            Split::Validation | Split::Test => windows,
        })
    }

    fn sample(
        &self,
        split: Split,
        index: usize,
        epoch: u64,
        _: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let shift = match split {
            Split::Train => below(&mut rng_for(&[epoch, 2]), self.time as u32) as usize,
            Split::Validation | Split::Test => 0,
        };
        let start = index * self.time + shift;
        let run = &self.runs[split as usize];
        let next = &run[start + 1..start + self.time + 1];
        Ok(Sample {
            tokens: run[start..start + self.time].to_vec(),
            target: SampleTarget::Tokens(next.iter().map(|id| i64::from(*id)).collect()),
            pixels: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Targets;
    use serde_json::json;

    #[test]
    fn targets_are_the_next_bytes_and_splits_are_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        let text: String = (0..4000u32)
            .map(|i| char::from(b'a' + (i / 7 % 26) as u8))
            .collect();
        std::fs::write(folder.path().join("a.txt"), &text).expect("written");
        let made = task(&json!({"path": folder.path(), "time": 16, "held_out": 0.1}));
        let made = made.expect("a text");
        let batch = made
            .loader(Split::Test, 1, 0)
            .and_then(|mut loader| loader.next_batch());
        let batch = batch.expect("a batch");
        let start = 4000 - 400;
        let bytes = |range: std::ops::Range<usize>| {
            text.as_bytes()[range]
                .iter()
                .map(|b| u32::from(*b))
                .collect::<Vec<u32>>()
        };
        assert_eq!(batch.tokens, bytes(start..start + 16));
        let next: Vec<i64> = bytes(start + 1..start + 17)
            .into_iter()
            .map(i64::from)
            .collect();
        assert_eq!(batch.targets, Targets::Tokens(next));
        assert_eq!(made.count(Split::Train), Some((3200 - 1) / 16 - 1));
    }

    #[test]
    fn bad_text_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let empty = task(&json!({"path": folder.path()}))
            .err()
            .expect("empty")
            .to_string();
        assert!(empty.contains("no .txt file"), "{empty}");
        let file = folder.path().join("b.txt");
        std::fs::write(&file, [b'a', b'b', 0xff, b'c']).expect("written");
        let bad = task(&json!({"path": file}))
            .err()
            .expect("not UTF-8")
            .to_string();
        assert!(bad.contains("byte 2") && bad.contains("b.txt"), "{bad}");
        std::fs::write(&file, "short").expect("written");
        let short = task(&json!({"path": file}))
            .err()
            .expect("short")
            .to_string();
        assert!(short.contains("fewer than"), "{short}");
    }
}
