//! Tasks: seeded data with a metric. A task is a numbered set of samples per split; one loader serves all of them.
//!
//! Sample `i` of a split depends on the task's options, the split and `i` alone (training samples of generated tasks also
//! on the seed), so a loader's position is three numbers and going to it costs nothing. Random numbers are ChaCha8,
//! seeded by a hash of seed, split and index.

use rand::seq::SliceRandom;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{DataError, hint};
use crate::tokenizer::Tokenizer;

/// Longest row of a generated task.
pub(crate) const MAX_TIME: usize = 1 << 24;

/// What the right answers of a batch are.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// The next token at every position, `[batch * time]`, -100 where none is scored.
    Tokens(Vec<i64>),
    /// The class of every row, or of every pair of rows.
    Classes(Vec<i64>),
}

/// What one optimiser step sees.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `[batch, time]`, row-major; empty for pictures. Of a pair of documents, the second is the row after the first.
    pub tokens: Vec<u32>,
    /// Rows; twice the number of pairs where the task matches documents.
    pub batch: usize,
    /// Tokens of a row, padding included.
    pub time: usize,
    /// The right answers.
    pub targets: Targets,
    /// Valid tokens of each row, where rows are padded.
    pub lengths: Option<Vec<usize>>,
    /// Pictures, `[batch, height, width, channels]`, values from 0 to 1.
    pub pixels: Option<Vec<f32>>,
}

/// A part of the data that shares no sample with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// To train on.
    Train,
    /// To choose settings by.
    Validation,
    /// To report.
    Test,
}

impl Split {
    /// Samples of this part where `train` are trained on (0: without end) and each other part has `test`.
    pub(crate) fn rows(self, train: usize, test: usize) -> Option<usize> {
        match self {
            Split::Train => (train > 0).then_some(train),
            Split::Validation | Split::Test => Some(test),
        }
    }
}

/// What a task asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Token ids in, the next token out.
    NextToken,
    /// Token ids in, a class out.
    Classify,
    /// Token ids of two documents in, a class for the pair out.
    Match,
    /// Pictures in, a class out.
    Pictures {
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
        /// Values of a pixel.
        channels: usize,
    },
}

/// What is true of a task with its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// Registered name.
    pub name: String,
    /// One or two sentences, with the sizes that the options give.
    pub description: String,
    /// Where the definition or the data comes from.
    pub source: String,
    /// What is asked.
    pub kind: TaskKind,
    /// Longest row in tokens (pixels of a picture, one document of a pair).
    pub time: usize,
    /// Token ids are below this; 0 for pictures.
    pub vocab: usize,
    /// Classes are below this; 0 for next-token tasks.
    pub classes: usize,
    /// Accuracy of the best answer that ignores the input, where it is known.
    pub floor: Option<f64>,
    /// The options, every key present.
    pub options: Map<String, Value>,
}

/// One row of a batch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    pub(crate) tokens: Vec<u32>,
    pub(crate) target: SampleTarget,
    pub(crate) pixels: Vec<f32>,
}

/// The right answer of one row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SampleTarget {
    Tokens(Vec<i64>),
    Class(i64),
    /// The tokens are two documents, the first of `first` tokens.
    Pair {
        class: i64,
        first: usize,
    },
}

/// The numbered samples behind a task.
pub(crate) trait Samples: Send + Sync {
    /// Number of samples of a split; `None` when there is no end.
    fn count(&self, split: Split) -> Option<usize>;

    /// Sample `index`; `rng` is seeded by seed, split and index, `epoch` counts passes over a finite split.
    fn sample(
        &self,
        split: Split,
        index: usize,
        epoch: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError>;
}

/// Where a loader stands: enough to go on exactly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the split that are complete.
    pub epoch: u64,
    /// Samples given in this pass.
    pub next: u64,
    /// The loader's seed.
    pub seed: u64,
}

/// Gives batches without end: a finite split starts over, its training part in another order.
pub trait Loader: Send {
    /// The next batch.
    fn next_batch(&mut self) -> Result<Batch, DataError>;
    /// Samples left in this pass, of a finite split.
    fn remaining(&self) -> Option<usize>;
    /// Where the next batch begins.
    fn position(&self) -> Position;
    /// Goes to where `position` was taken.
    fn seek(&mut self, position: &Position) -> Result<(), DataError>;
}

/// A named source of data with a metric.
pub trait Task: Send + Sync {
    /// What is true of it.
    fn spec(&self) -> &TaskSpec;
    /// Batches of `batch` rows of a split. `seed` chooses the order and the generated training samples.
    fn loader(
        &self,
        split: Split,
        batch: usize,
        seed: u64,
    ) -> Result<Box<dyn Loader + '_>, DataError>;
    /// The tokenizer of a text task.
    fn tokenizer(&self) -> Option<&Tokenizer> {
        None
    }
    /// Samples of a split; `None` when there is no end.
    fn count(&self, split: Split) -> Option<usize>;
}

/// A task made of numbered samples.
pub(crate) struct Numbered<S> {
    pub(crate) spec: TaskSpec,
    pub(crate) samples: S,
    pub(crate) tokenizer: Option<Tokenizer>,
}

impl<S: Samples> Task for Numbered<S> {
    fn spec(&self) -> &TaskSpec {
        &self.spec
    }

    fn loader(
        &self,
        split: Split,
        batch: usize,
        seed: u64,
    ) -> Result<Box<dyn Loader + '_>, DataError> {
        let fail = |message: String| DataError::Position {
            task: self.spec.name.clone(),
            message,
        };
        if batch == 0 {
            return Err(fail("a batch holds at least one row, got 0".into()));
        }
        let count = self.samples.count(split);
        if count == Some(0) {
            return Err(fail(format!("the {split:?} split is empty")));
        }
        if count.is_some_and(|count| count > u32::MAX as usize) {
            return Err(fail(format!(
                "a split has at most {} samples; 0 means no end",
                u32::MAX
            )));
        }
        let mut loader = NumberedLoader {
            task: self,
            split,
            batch,
            count,
            position: Position {
                epoch: 0,
                next: 0,
                seed,
            },
            order: Vec::new(),
        };
        loader.shuffle();
        Ok(Box::new(loader))
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    fn count(&self, split: Split) -> Option<usize> {
        self.samples.count(split)
    }
}

struct NumberedLoader<'a, S> {
    task: &'a Numbered<S>,
    split: Split,
    batch: usize,
    count: Option<usize>,
    position: Position,
    /// The order of this pass, of a finite training split.
    order: Vec<u32>,
}

/// A generator for one purpose: a hash of all the numbers seeds it.
pub(crate) fn rng_for(numbers: &[u64]) -> ChaCha8Rng {
    let mix = |hash: u64, number: u64| {
        let mut x = hash ^ number.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    ChaCha8Rng::seed_from_u64(
        numbers
            .iter()
            .fold(0x616e_7966, |hash, number| mix(hash, *number)),
    )
}

impl<S: Samples> NumberedLoader<'_, S> {
    fn shuffle(&mut self) {
        if self.split != Split::Train {
            return;
        }
        let Some(count) = self.count else { return };
        self.order = (0..count as u32).collect();
        let mut rng = rng_for(&[self.position.seed, self.position.epoch, 1]);
        self.order.shuffle(&mut rng);
    }

    fn take(&mut self) -> Result<Sample, DataError> {
        let next = self.position.next as usize;
        let index = self.order.get(next).map_or(next, |index| *index as usize);
        // Held-out samples are the same for every seed.
        let seed = match self.split {
            Split::Train => self.position.seed.wrapping_add(1),
            Split::Validation | Split::Test => 0,
        };
        let mut rng = rng_for(&[seed, self.split as u64, index as u64]);
        let epoch = self.position.epoch;
        let sample = self
            .task
            .samples
            .sample(self.split, index, epoch, &mut rng)?;
        self.position.next += 1;
        if self
            .count
            .is_some_and(|count| self.position.next >= count as u64)
        {
            self.position.epoch += 1;
            self.position.next = 0;
            self.shuffle();
        }
        Ok(sample)
    }
}

impl<S: Samples> Loader for NumberedLoader<'_, S> {
    fn next_batch(&mut self) -> Result<Batch, DataError> {
        let rows = (0..self.batch)
            .map(|_| self.take())
            .collect::<Result<Vec<_>, _>>()?;
        Ok(collate(rows))
    }

    fn remaining(&self) -> Option<usize> {
        self.count.map(|count| count - self.position.next as usize)
    }

    fn position(&self) -> Position {
        self.position.clone()
    }

    fn seek(&mut self, position: &Position) -> Result<(), DataError> {
        if let Some(count) = self.count
            && position.next >= count as u64
        {
            return Err(DataError::Position {
                task: self.task.spec.name.clone(),
                message: format!(
                    "expected fewer than {count} samples given, got {}",
                    position.next
                ),
            });
        }
        self.position = position.clone();
        self.shuffle();
        Ok(())
    }
}

/// Puts rows together, padding with token 0 to the longest. A pair of documents becomes two rows.
fn collate(samples: Vec<Sample>) -> Batch {
    let mut rows: Vec<Vec<u32>> = Vec::with_capacity(samples.len());
    let (mut classes, mut wanted, mut pixels) = (Vec::new(), Vec::new(), Vec::new());
    for mut sample in samples {
        match sample.target {
            SampleTarget::Class(class) => classes.push(class),
            SampleTarget::Tokens(targets) => wanted.push(targets),
            SampleTarget::Pair { class, first } => {
                let second = sample.tokens.split_off(first);
                rows.push(std::mem::replace(&mut sample.tokens, second));
                classes.push(class);
            }
        }
        rows.push(sample.tokens);
        pixels.extend(sample.pixels);
    }
    let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
    let time = lengths.iter().copied().max().unwrap_or(0);
    let ragged = lengths.iter().any(|length| *length != time);
    let batch = rows.len();
    let tokens = rows.into_iter().flat_map(|mut row| {
        row.resize(time, 0);
        row
    });
    let tokens = tokens.collect();
    let targets = match wanted.is_empty() {
        true => Targets::Classes(classes),
        false => {
            let padded = wanted.into_iter().flat_map(|mut row: Vec<i64>| {
                row.resize(time, -100);
                row
            });
            Targets::Tokens(padded.collect())
        }
    };
    Batch {
        tokens,
        batch,
        time,
        targets,
        lengths: ragged.then_some(lengths),
        pixels: (!pixels.is_empty()).then_some(pixels),
    }
}

/// Reads a task's options, refusing unknown keys with the nearest one.
pub(crate) fn read<O>(
    task: &'static str,
    options: &Value,
) -> Result<(O, Map<String, Value>), DataError>
where
    O: DeserializeOwned + Serialize + Default,
{
    let wrong = |message: String| DataError::Option { task, message };
    let empty = Map::new();
    let map = match options {
        Value::Object(map) => map,
        Value::Null => &empty,
        other => return Err(wrong(format!("expected a table of options, got {other}"))),
    };
    let to_map = |options: &O| match serde_json::to_value(options) {
        Ok(Value::Object(map)) => map,
        other => panic!("options serialise to a map, not {other:?}"),
    };
    let known = to_map(&O::default());
    if let Some(key) = map.keys().find(|key| !known.contains_key(*key)) {
        return Err(DataError::UnknownOption {
            task,
            key: key.clone(),
            hint: hint(key, known.keys().map(String::as_str)),
            known: known.keys().cloned().collect::<Vec<_>>().join(", "),
        });
    }
    let read: O = serde_json::from_value(Value::Object(map.clone()))
        .map_err(|error| wrong(error.to_string()))?;
    let resolved = to_map(&read);
    Ok((read, resolved))
}

/// `count` distinct numbers of `low..high`, in random order.
pub(crate) fn distinct(rng: &mut ChaCha8Rng, low: u32, high: u32, count: usize) -> Vec<u32> {
    rand::seq::index::sample(rng, (high - low) as usize, count)
        .into_iter()
        .map(|index| low + index as u32)
        .collect()
}

/// A number below `bound`, without bias.
pub(crate) fn below(rng: &mut ChaCha8Rng, bound: u32) -> u32 {
    let bound = u64::from(bound.max(1));
    let zone = u64::MAX - u64::MAX % bound;
    loop {
        let draw = rng.next_u64();
        if draw < zone {
            return (draw % bound) as u32;
        }
    }
}
