//! Multi-query associative recall, as zoology defines it.
//!
//! Arora et al., Zoology (2023), arXiv 2312.04927. A row is `pairs` keys with their values, then a tail in which every key
//! comes once more, at even distances drawn from a power law; at each of those places the answer is the key's value. Keys
//! are below `vocab/2`, values at or above it. Places without a query hold random tokens (or 0).

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::DataError;
use crate::task::{
    Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, below, distinct, read,
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
        }
    }
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (MqarOptions, _) = read(NAME, options)?;
    let wrong = |message: String| Err(DataError::Option { task: NAME, message });
    if !o.time.is_multiple_of(2) || o.pairs == 0 || o.time < 4 * o.pairs {
        return wrong(format!(
            "expected an even time of at least 4 times pairs ({}), got time {}",
            o.pairs, o.time
        ));
    }
    if (o.vocab / 2) as usize <= o.pairs + 1 || !(o.power > 0.0) {
        return wrong(format!(
            "expected a vocab of more than {} for {} pairs and a power above 0, got vocab {} and power {}",
            2 * (o.pairs + 1),
            o.pairs,
            o.vocab,
            o.power
        ));
    }
    let spec = TaskSpec {
        name: NAME.into(),
        description: format!(
            "Multi-query associative recall: {} keys and values, then each key again within {} tokens; answer with its value. Vocabulary {}.",
            o.pairs, o.time, o.vocab
        ),
        source: "Arora et al.: Zoology (2023), arXiv 2312.04927; generated".into(),
        kind: TaskKind::NextToken,
        time: o.time,
        vocab: o.vocab as usize,
        classes: 0,
        floor: Some(1.0 / f64::from(o.vocab - o.vocab / 2)),
        options: resolved,
    };
    Ok(Box::new(Numbered {
        spec,
        samples: Mqar(o),
        tokenizer: None,
    }))
}

struct Mqar(MqarOptions);

impl Samples for Mqar {
    fn count(&self, split: Split) -> Option<usize> {
        match split {
            Split::Train => (self.0.train_rows > 0).then_some(self.0.train_rows),
            Split::Validation | Split::Test => Some(self.0.test_rows),
        }
    }

    fn sample(
        &self,
        _: Split,
        _: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let o = &self.0;
        let half = o.vocab / 2;
        let keys = distinct(rng, 1, half, o.pairs);
        let values = distinct(rng, half, o.vocab, o.pairs);
        let places = (o.time - 2 * o.pairs) / 2;
        // Weighted draws without replacement: the largest of u^(1/weight), here as logarithms.
        let mut draws: Vec<(f64, usize)> = (0..places)
            .map(|gap| {
                let weight = o.power * ((gap + 1) as f64).powf(o.power - 1.0);
                ((1.0 - rng.random::<f64>()).ln() / weight, gap)
            })
            .collect();
        draws.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut tokens = vec![0; o.time];
        let mut targets = vec![-100; o.time];
        for pair in 0..o.pairs {
            tokens[2 * pair] = keys[pair];
            tokens[2 * pair + 1] = values[pair];
            let place = 2 * o.pairs + 2 * draws[pair].1;
            tokens[place] = keys[pair];
            targets[place] = i64::from(values[pair]);
        }
        if o.random_non_queries {
            for token in tokens.iter_mut().filter(|token| **token == 0) {
                *token = below(rng, o.vocab);
            }
        }
        Ok(Sample {
            tokens,
            target: SampleTarget::Tokens(targets),
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
    fn every_query_is_answered_by_its_key_s_value() {
        let task = task(&json!({"vocab": 64, "time": 64, "pairs": 8})).expect("options fit");
        let mut loader = task.loader(Split::Train, 16, 3).expect("a loader");
        let batch = loader.next_batch().expect("a batch");
        let Targets::Tokens(targets) = &batch.targets else { panic!("tokens") };
        for (row, wanted) in batch.tokens.chunks(64).zip(targets.chunks(64)) {
            assert_eq!(wanted.iter().filter(|wanted| **wanted >= 0).count(), 8);
            for (place, wanted) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted >= 0) {
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
        let Targets::Tokens(targets) = &batch.targets else { panic!("tokens") };
        let first = targets.chunks(64).filter(|wanted| wanted[2] >= 0).count();
        let total: f64 = (0..31).map(|gap| (gap as f64 + 1.0).powf(-0.99)).sum();
        assert!((first as f64 / 500.0 - 1.0 / total).abs() < 0.08, "{first}");
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(task(&json!({"time": 63, "pairs": 4})).is_err());
        assert!(task(&json!({"time": 64, "pairs": 17})).is_err());
        assert!(task(&json!({"vocab": 8, "time": 64, "pairs": 8})).is_err());
        assert!(task(&json!({"pears": 8})).is_err());
    }
}
