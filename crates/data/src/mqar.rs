//! Multi-query associative recall, as zoology defines it.
//!
//! Arora et al., Zoology (2023), arXiv 2312.04927. A row is `pairs` keys with their values, then a tail in which every key
//! comes once more, at even distances drawn from a power law; at each of those places the answer is the key's value. Keys
//! are below `vocab/2`, values at or above it. Places without a query hold random tokens (or 0).
//!
//! The training, validation and test rows come from separate random streams. `mixture` is zoology's standard study of many
//! sizes: rows of 64 to 256 tokens to train on, 64 to 1,024 to be tested on, in one order.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::DataError;
use crate::task::{
    MAX_TIME, Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, below,
    distinct, read,
};

const NAME: &str = "mqar";

/// Options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct MqarOptions {
    /// Number of token ids.
    pub vocab: u32,
    /// Tokens of a row; even.
    pub time: usize,
    /// Keys to remember; at most `time / 4`.
    pub pairs: usize,
    /// Exponent of the power law of distances; smaller is nearer.
    pub power: f64,
    /// Random tokens where no key is asked; otherwise 0.
    pub random_non_queries: bool,
    /// Training rows; 0 for no end.
    pub train_rows: usize,
    /// Validation and test rows, each.
    pub test_rows: usize,
    /// The standard study of many sizes; it settles `time`, `pairs`, `train_rows` and `test_rows` itself.
    pub mixture: bool,
}

impl Default for MqarOptions {
    fn default() -> Self {
        MqarOptions {
            vocab: 8192,
            time: 512,
            pairs: 64,
            power: 0.01,
            random_non_queries: true,
            train_rows: 100_000,
            test_rows: 3000,
            mixture: false,
        }
    }
}

/// Rows of one size.
#[derive(Clone, Copy, Debug)]
struct Segment {
    time: usize,
    pairs: usize,
    /// 0 for no end.
    rows: usize,
}

const fn segment(time: usize, pairs: usize, rows: usize) -> Segment {
    Segment { time, pairs, rows }
}

const MIXTURE_TRAIN: [Segment; 5] = [
    segment(64, 4, 100_000),
    segment(128, 8, 20_000),
    segment(256, 16, 20_000),
    segment(256, 32, 20_000),
    segment(256, 64, 20_000),
];

const MIXTURE_TEST: [Segment; 7] = [
    segment(64, 4, 1000),
    segment(64, 8, 1000),
    segment(64, 16, 1000),
    segment(128, 32, 1000),
    segment(256, 64, 1000),
    segment(512, 128, 1000),
    segment(1024, 256, 1000),
];

/// The training rows, and the validation and test rows.
fn segments(o: &MqarOptions) -> [Vec<Segment>; 2] {
    match o.mixture {
        true => [MIXTURE_TRAIN.to_vec(), MIXTURE_TEST.to_vec()],
        false => [o.train_rows, o.test_rows].map(|rows| vec![segment(o.time, o.pairs, rows)]),
    }
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (MqarOptions, _) = read(NAME, options)?;
    let wrong = |message: String| {
        Err(DataError::Option {
            task: NAME,
            message,
        })
    };
    let fixed = MqarOptions {
        vocab: o.vocab,
        power: o.power,
        random_non_queries: o.random_non_queries,
        ..Default::default()
    };
    if o.mixture
        && (o.time, o.pairs, o.train_rows, o.test_rows)
            != (fixed.time, fixed.pairs, fixed.train_rows, fixed.test_rows)
    {
        return wrong(
            "mixture settles time, pairs, train_rows and test_rows itself; leave them out".into(),
        );
    }
    let parts = segments(&o);
    let sizes = || parts.iter().flatten();
    if let Some(bad) = sizes().find(|size| {
        !size.time.is_multiple_of(2)
            || size.pairs == 0
            || size.pairs > size.time / 4
            || size.time > MAX_TIME
    }) {
        return wrong(format!(
            "expected an even time of at least 4 times pairs ({}) and at most {MAX_TIME}, got time {}",
            bad.pairs, bad.time
        ));
    }
    let pairs = sizes().map(|size| size.pairs).max().unwrap_or(0);
    if (o.vocab / 2) as usize <= pairs + 1 || o.power.is_nan() || o.power <= 0.0 {
        return wrong(format!(
            "expected a vocab of more than {} for {pairs} pairs and a power above 0, got vocab {} and power {}",
            2 * (pairs + 1),
            o.vocab,
            o.power
        ));
    }
    let time = sizes().map(|size| size.time).max().unwrap_or(0);
    let what = match o.mixture {
        true => "4 to 64 keys and values in 64 to 256 tokens to train on, 4 to 256 in 64 to 1024 to be tested on".into(),
        false => format!("{pairs} keys and values, then each key again within {time} tokens"),
    };
    let spec = TaskSpec {
        name: NAME.into(),
        description: format!(
            "Multi-query associative recall: {what}; answer each key's second coming with its value. Vocabulary {}.",
            o.vocab
        ),
        source: "Arora et al.: Zoology (2023), arXiv 2312.04927; generated".into(),
        kind: TaskKind::NextToken,
        time,
        vocab: o.vocab as usize,
        classes: 0,
        floor: Some(1.0 / f64::from(o.vocab - o.vocab / 2)),
        options: resolved,
    };
    Ok(Box::new(Numbered {
        spec,
        samples: Mqar { options: o, parts },
        tokenizer: None,
    }))
}

struct Mqar {
    options: MqarOptions,
    /// To train on, and to be tested on.
    parts: [Vec<Segment>; 2],
}

impl Mqar {
    fn part(&self, split: Split) -> &[Segment] {
        &self.parts[usize::from(split != Split::Train)]
    }
}

impl Samples for Mqar {
    fn count(&self, split: Split) -> Option<usize> {
        let rows: usize = self.part(split).iter().map(|size| size.rows).sum();
        (split != Split::Train || rows > 0).then_some(rows)
    }

    fn sample(
        &self,
        split: Split,
        index: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let mut before = 0;
        let size = self.part(split).iter().find(|size| {
            before += size.rows;
            size.rows == 0 || index < before
        });
        Ok(row(
            &self.options,
            *size.unwrap_or(&self.part(split)[0]),
            rng,
        ))
    }
}

/// One row.
fn row(o: &MqarOptions, size: Segment, rng: &mut ChaCha8Rng) -> Sample {
    let half = o.vocab / 2;
    let keys = distinct(rng, 1, half, size.pairs);
    let values = distinct(rng, half, o.vocab, size.pairs);
    let places = (size.time - 2 * size.pairs) / 2;
    // Weighted draws without replacement: the largest of u^(1/weight), here as logarithms.
    let mut draws: Vec<(f64, usize)> = (0..places)
        .map(|gap| {
            let weight = o.power * ((gap + 1) as f64).powf(o.power - 1.0);
            ((1.0 - rng.random::<f64>()).ln() / weight, gap)
        })
        .collect();
    draws.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut tokens = vec![0; size.time];
    let mut targets = vec![-100; size.time];
    for pair in 0..size.pairs {
        tokens[2 * pair] = keys[pair];
        tokens[2 * pair + 1] = values[pair];
        let place = 2 * size.pairs + 2 * draws[pair].1;
        tokens[place] = keys[pair];
        targets[place] = i64::from(values[pair]);
    }
    if o.random_non_queries {
        for token in tokens.iter_mut().filter(|token| **token == 0) {
            *token = below(rng, o.vocab);
        }
    }
    Sample {
        tokens,
        target: SampleTarget::Tokens(targets),
        pixels: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Targets;
    use serde_json::json;

    #[test]
    fn every_query_is_answered_by_its_key_s_value() {
        let task = task(&json!({"vocab": 64, "time": 64, "pairs": 8})).expect("options fit");
        let mut loader = task.loader(Split::Train, 16, 3).expect("a loader");
        let batch = loader.next_batch().expect("a batch");
        let Targets::Tokens(targets) = &batch.targets else {
            panic!("tokens")
        };
        for (row, wanted) in batch.tokens.chunks(64).zip(targets.chunks(64)) {
            assert_eq!(wanted.iter().filter(|wanted| **wanted >= 0).count(), 8);
            for (place, wanted) in wanted
                .iter()
                .enumerate()
                .filter(|(_, wanted)| **wanted >= 0)
            {
                assert!(place >= 16 && place % 2 == 0);
                let key = row[..16].chunks(2).find(|pair| pair[0] == row[place]);
                assert_eq!(key.map(|pair| i64::from(pair[1])), Some(*wanted));
                assert!(*wanted >= 32 && row[place] < 32);
            }
        }
    }

    #[test]
    fn distances_follow_the_power_law() {
        // With power 0.01 the weight of a gap is nearly 1/(gap + 1): the first gap is far likelier than the last.
        let task = task(&json!({"vocab": 64, "time": 64, "pairs": 1})).expect("options fit");
        let mut loader = task.loader(Split::Train, 500, 3).expect("a loader");
        let batch = loader.next_batch().expect("a batch");
        let Targets::Tokens(targets) = &batch.targets else {
            panic!("tokens")
        };
        let first = targets.chunks(64).filter(|wanted| wanted[2] >= 0).count();
        let total: f64 = (0..31).map(|gap| (gap as f64 + 1.0).powf(-0.99)).sum();
        assert!((first as f64 / 500.0 - 1.0 / total).abs() < 0.08, "{first}");
    }

    #[test]
    fn the_mixture_has_its_sizes_in_their_shares() {
        let made = task(&json!({"mixture": true})).expect("options fit");
        assert_eq!(
            (made.count(Split::Train), made.count(Split::Test)),
            (Some(180_000), Some(7000))
        );
        assert_eq!(made.spec().time, 1024);
        let mut loader = made.loader(Split::Train, 500, 0).expect("a loader");
        let batch = loader.next_batch().expect("a batch");
        let lengths = batch.lengths.expect("ragged");
        let Targets::Tokens(targets) = &batch.targets else {
            panic!("tokens")
        };
        let short = lengths.iter().filter(|length| **length == 64).count();
        assert!(
            (short as f64 / 500.0 - 100.0 / 180.0).abs() < 0.1,
            "{short}"
        );
        for (length, wanted) in lengths.iter().zip(targets.chunks(batch.time)) {
            let pairs = wanted.iter().filter(|wanted| **wanted >= 0).count();
            assert!(
                MIXTURE_TRAIN
                    .iter()
                    .any(|size| (size.time, size.pairs) == (*length, pairs))
            );
        }
        // Held-out rows come size by size.
        let batch = made
            .loader(Split::Test, 1001, 0)
            .and_then(|mut loader| loader.next_batch());
        let Targets::Tokens(targets) = &batch.expect("a batch").targets else {
            panic!("tokens")
        };
        let pairs = |row: &[i64]| row.iter().filter(|wanted| **wanted >= 0).count();
        let rows: Vec<usize> = targets.chunks(64).map(pairs).collect();
        assert_eq!((rows[999], rows[1000]), (4, 8));
        assert!(task(&json!({"mixture": true, "time": 64})).is_err());
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(task(&json!({"pairs": u64::MAX})).is_err());
        assert!(task(&json!({"time": 1u64 << 60, "pairs": 4})).is_err());
        assert!(task(&json!({"power": 0.0})).is_err());
        assert!(task(&json!({"time": 63, "pairs": 4})).is_err());
        assert!(task(&json!({"time": 64, "pairs": 17})).is_err());
        assert!(task(&json!({"vocab": 8, "time": 64, "pairs": 8})).is_err());
        assert!(task(&json!({"pears": 8})).is_err());
    }
}
