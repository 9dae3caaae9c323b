//! CIFAR-10 as a sequence of grey pixels, as Long Range Arena uses it.
//!
//! Krizhevsky (2009); Tay et al. (2021), arXiv 2011.04006: colours become grey by 0.2989 red + 0.5870 green + 0.1140 blue,
//! rounded; a picture is its 1,024 pixels row by row, each a token from 0 to 255. The first 45,000 training pictures are to
//! train on, the last 5,000 for validation.

use std::path::PathBuf;

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::DataError;
use crate::pictures::{Pictures, cifar};
use crate::task::{Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, read};

const NAME: &str = "sequential_cifar10";
/// Pixels of a picture.
const AREA: usize = 32 * 32;

/// Options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SequentialCifarOptions {
    /// The folder of the binary batches; there is no default (`anyformer data get cifar10`). Without it: task images with
    /// as_sequence, which is another data set.
    pub path: Option<PathBuf>,
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (SequentialCifarOptions, _) = read(NAME, options)?;
    let Some(path) = &o.path else {
        return Err(DataError::Option {
            task: NAME,
            message: "give path = the folder of CIFAR-10's binary batches (`anyformer data get cifar10` fetches them), or take the task images with as_sequence = true".into(),
        });
    };
    let (train, test) = cifar(path)?;
    if train.labels.len() < 10 {
        return Err(DataError::Format {
            path: path.clone(),
            message: format!(
                "expected at least 10 training pictures, got {}",
                train.labels.len()
            ),
        });
    }
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: NAME.into(),
            description: format!(
                "CIFAR-10 pixel by pixel, grey: {} + {} pictures of 32 x 32 in 10 classes.",
                train.labels.len(),
                test.labels.len()
            ),
            source: "Krizhevsky (2009); Long Range Arena, arXiv 2011.04006".into(),
            kind: TaskKind::Classify,
            time: AREA,
            vocab: 256,
            classes: 10,
            floor: Some(0.1),
            options: resolved,
        },
        samples: Grey { train, test },
        tokenizer: None,
    }))
}

struct Grey {
    train: Pictures,
    test: Pictures,
}

fn grey(pixel: &[u8]) -> u32 {
    let [red, green, blue] = [0, 1, 2].map(|channel| f64::from(pixel[channel]));
    (0.2989 * red + 0.5870 * green + 0.1140 * blue).round() as u32
}

impl Samples for Grey {
    fn count(&self, split: Split) -> Option<usize> {
        let all = self.train.labels.len();
        Some(match split {
            Split::Train => all / 10 * 9,
            Split::Validation => all - all / 10 * 9,
            Split::Test => self.test.labels.len(),
        })
    }

    fn sample(
        &self,
        split: Split,
        index: usize,
        _: u64,
        _: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let (set, place) = match split {
            Split::Train => (&self.train, index),
            Split::Validation => (&self.train, self.train.labels.len() / 10 * 9 + index),
            Split::Test => (&self.test, index),
        };
        let pixels = &set.pixels[place * 3 * AREA..(place + 1) * 3 * AREA];
        Ok(Sample {
            tokens: pixels.chunks(3).map(grey).collect(),
            target: SampleTarget::Class(i64::from(set.labels[place])),
            pixels: Vec::new(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// Six batches of four pictures each.
    pub(crate) fn folder(root: &std::path::Path) {
        let names = (1..=5).map(|part| format!("data_batch_{part}.bin"));
        for (batch, name) in names.chain(["test_batch.bin".to_string()]).enumerate() {
            let record = |row: usize| {
                let mut record = vec![row as u8];
                record.extend((0..3 * AREA).map(|at| (at * 7 + 31 * batch + 101 * row) as u8));
                record
            };
            let bytes: Vec<u8> = (0..4).flat_map(record).collect();
            std::fs::write(root.join(name), bytes).expect("written");
        }
    }

    #[test]
    fn colours_become_the_published_grey() {
        let levels =
            [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]].map(|pixel| grey(&pixel));
        assert_eq!(levels, [76, 150, 29, 255]);
        let root = tempfile::tempdir().expect("a folder");
        folder(root.path());
        let made = task(&json!({"path": root.path()})).expect("whole");
        let counts = [Split::Train, Split::Validation, Split::Test].map(|split| made.count(split));
        assert_eq!(counts, [Some(18), Some(2), Some(4)]);
        std::fs::write(root.path().join("data_batch_3.bin"), [0; 99]).expect("written");
        let error = task(&json!({"path": root.path()}))
            .err()
            .expect("cut")
            .to_string();
        assert!(
            error.contains("data_batch_3.bin") && error.contains("truncated"),
            "{error}"
        );
    }
}
