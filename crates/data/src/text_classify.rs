//! Text classification on bytes: a folder in the layout of the IMDb film reviews, as Long Range Arena uses it.
//!
//! Maas et al. (ACL 2011); Tay et al. (2021), arXiv 2011.04006. `train` and `test` hold `neg` (class 0) and `pos` (class 1),
//! a file per review; its bytes are read as they are, mark-up included. The released benchmark has no validation part and
//! chooses on the test part; here every tenth training review is for validation.

use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dialect::{Alphabet, Dialect};
use crate::error::DataError;
use crate::task::{Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, read};

const NAME: &str = "text_classify";
/// One of this many training reviews is for validation.
const VALIDATION: usize = 10;

/// Options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TextClassifyOptions {
    /// The folder with `train` and `test`; there is no default (`anyformer data get imdb`). Without it: task toy_reviews.
    pub path: Option<PathBuf>,
    /// Longest review in tokens; 0 takes the dialect's, 4,000 or 4,096.
    pub time: usize,
    /// Whose form of the benchmark.
    pub dialect: Dialect,
}

struct Review {
    file: PathBuf,
    class: i64,
}

fn bytes(file: &Path) -> Result<Vec<u8>, DataError> {
    std::fs::read(file).map_err(|error| DataError::Read {
        path: file.to_path_buf(),
        error,
    })
}

/// The reviews of `train` or `test`, the two classes in turn.
fn reviews(root: &Path, split: &str) -> Result<Vec<Review>, DataError> {
    let mut classes = Vec::new();
    for name in ["neg", "pos"] {
        let folder = root.join(split).join(name);
        if !folder.is_dir() {
            return Err(DataError::Format {
                path: folder,
                message: format!(
                    "no such folder; expected {{train,test}}/{{neg,pos}} below {}, as in the published archive",
                    root.display()
                ),
            });
        }
        let mut files = Vec::new();
        let listing = std::fs::read_dir(&folder).map_err(|error| DataError::Read {
            path: folder.clone(),
            error,
        })?;
        for entry in listing {
            let path = entry
                .map_err(|error| DataError::Read {
                    path: folder.clone(),
                    error,
                })?
                .path();
            if path.extension().is_some_and(|ending| ending == "txt") {
                files.push(path);
            }
        }
        if files.is_empty() {
            return Err(DataError::Format {
                path: folder,
                message: "the folder holds no .txt file".into(),
            });
        }
        files.sort();
        classes.push(files.into_iter());
    }
    let mut all = Vec::new();
    loop {
        let before = all.len();
        for (class, files) in classes.iter_mut().enumerate() {
            all.extend(files.next().map(|file| Review {
                file,
                class: class as i64,
            }));
        }
        if all.len() == before {
            return Ok(all);
        }
    }
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (TextClassifyOptions, _) = read(NAME, options)?;
    let Some(path) = &o.path else {
        return Err(DataError::Option {
            task: NAME,
            message: "give path = the folder of the reviews (`anyformer data get imdb` fetches them), or take the generated task toy_reviews".into(),
        });
    };
    let (all, test) = (reviews(path, "train")?, reviews(path, "test")?);
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    // Pairs of reviews, one of each class, go together, so that both parts stay balanced.
    for (index, review) in all.into_iter().enumerate() {
        match index / 2 % VALIDATION == VALIDATION - 1 {
            true => validation.push(review),
            false => train.push(review),
        }
    }
    if validation.is_empty() {
        return Err(DataError::Format {
            path: path.join("train"),
            message: format!(
                "expected at least {} reviews, to keep some for validation",
                2 * VALIDATION
            ),
        });
    }
    let alphabet = Alphabet::of(o.dialect, train.iter().map(|review| bytes(&review.file)))?;
    let time = if o.time == 0 {
        o.dialect.time()
    } else {
        o.time
    };
    let positive = test.iter().filter(|review| review.class == 1).count();
    let most = positive.max(test.len() - positive);
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: NAME.into(),
            description: format!(
                "Is a review positive? {} + {} + {} reviews, {time} tokens at most.",
                train.len(),
                validation.len(),
                test.len()
            ),
            source: "Maas et al. (ACL 2011); Long Range Arena, arXiv 2011.04006".into(),
            kind: TaskKind::Classify,
            time,
            vocab: alphabet.vocab(),
            classes: 2,
            floor: Some(most as f64 / test.len() as f64),
            options: resolved,
        },
        samples: Reviews {
            parts: [train, validation, test],
            alphabet,
            time,
        },
        tokenizer: None,
    }))
}

struct Reviews {
    parts: [Vec<Review>; 3],
    alphabet: Alphabet,
    time: usize,
}

impl Samples for Reviews {
    fn count(&self, split: Split) -> Option<usize> {
        Some(self.parts[split as usize].len())
    }

    fn sample(
        &self,
        split: Split,
        index: usize,
        _: u64,
        _: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let review = &self.parts[split as usize][index];
        Ok(Sample {
            tokens: self.alphabet.encode(&bytes(&review.file)?, self.time),
            target: SampleTarget::Class(review.class),
            pixels: Vec::new(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A folder in the layout of the archive, with `rows` reviews of each class and part.
    pub(crate) fn folder(root: &Path, rows: usize) {
        for split in ["train", "test"] {
            for class in ["neg", "pos"] {
                let folder = root.join(split).join(class);
                std::fs::create_dir_all(&folder).expect("made");
                for row in 0..rows {
                    let text = format!("{split} {class} number {row}");
                    std::fs::write(folder.join(format!("{row:03}_1.txt")), text).expect("written");
                }
            }
        }
    }

    #[test]
    fn the_layout_is_read_and_a_missing_part_is_named() {
        let root = tempfile::tempdir().expect("a folder");
        folder(root.path(), 20);
        let made = task(&json!({"path": root.path()})).expect("whole");
        let counts = [Split::Train, Split::Validation, Split::Test].map(|split| made.count(split));
        assert_eq!(counts, [Some(36), Some(4), Some(40)]);
        assert_eq!((made.spec().time, made.spec().vocab), (4000, 257));
        let batch = made
            .loader(Split::Test, 2, 0)
            .and_then(|mut loader| loader.next_batch());
        let batch = batch.expect("a batch");
        assert_eq!(batch.targets, crate::task::Targets::Classes(vec![0, 1]));
        assert_eq!(batch.tokens[0], u32::from(b't') + 1);
        let short = task(&json!({"path": root.path(), "time": 4, "dialect": "s4"})).expect("whole");
        assert_eq!(short.spec().time, 4);
        std::fs::remove_dir_all(root.path().join("test/pos")).expect("gone");
        let error = task(&json!({"path": root.path()})).err().expect("missing");
        let error = error.to_string();
        assert!(
            error.contains("test/pos") && error.contains("no such folder"),
            "{error}"
        );
        let error = task(&json!({})).err().expect("no path").to_string();
        assert!(error.contains("toy_reviews"), "{error}");
    }
}
