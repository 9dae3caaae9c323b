//! A task small enough for tests, in shuffled order: the next token is the one after this one.

#![allow(dead_code)] // each test file uses its part

use anyformer_data::{
    Batch, DataError, Loader, Position, Split, Targets, Task, TaskKind, TaskSpec,
};
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::Device;
use anyformer_train::{TrainConfig, training_device};
use serde_json::{Value, json};

pub const VOCAB: u64 = 13;
pub const TIME: usize = 7;

pub struct Successor {
    pub examples: u64,
    spec: TaskSpec,
}

impl Successor {
    pub fn new(examples: u64) -> Self {
        let options = json!({"examples": examples});
        Successor {
            examples,
            spec: TaskSpec {
                name: "successor".into(),
                description: "the next token is the one after this one".into(),
                source: "this test".into(),
                kind: TaskKind::NextToken,
                time: TIME,
                vocab: VOCAB as usize,
                classes: 0,
                floor: None,
                options: options.as_object().cloned().unwrap_or_default(),
            },
        }
    }
}

impl Default for Successor {
    fn default() -> Self {
        Successor::new(40)
    }
}

/// Splitmix64.
pub fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Shuffled {
    examples: u64,
    batch: usize,
    seed: u64,
    next: u64,
}

impl Shuffled {
    /// The example at place `place`: every epoch has its own order.
    fn example(&self, place: u64) -> u64 {
        let epoch = place / self.examples;
        let mut order: Vec<u64> = (0..self.examples).collect();
        order.sort_by_key(|example| mix(mix(self.seed ^ epoch << 32) ^ example));
        order[(place % self.examples) as usize]
    }
}

impl Loader for Shuffled {
    fn next_batch(&mut self) -> Result<Batch, DataError> {
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..self.batch {
            let start = mix(self.example(self.next)) % VOCAB;
            self.next += 1;
            tokens.extend((0..TIME as u64).map(|step| ((start + step * step) % VOCAB) as u32));
        }
        targets.extend(
            tokens
                .iter()
                .map(|token| i64::from(*token + 1) % VOCAB as i64),
        );
        Ok(Batch {
            tokens,
            batch: self.batch,
            time: TIME,
            targets: Targets::Tokens(targets),
            lengths: None,
            pixels: None,
        })
    }

    fn remaining(&self) -> Option<usize> {
        None
    }

    fn position(&self) -> Position {
        Position {
            epoch: 0,
            next: self.next,
            seed: self.seed,
        }
    }

    fn seek(&mut self, position: &Position) -> Result<(), DataError> {
        self.next = position.next;
        Ok(())
    }
}

impl Task for Successor {
    fn spec(&self) -> &TaskSpec {
        &self.spec
    }

    fn count(&self, _: Split) -> Option<usize> {
        None
    }

    fn loader(
        &self,
        split: Split,
        batch: usize,
        seed: u64,
    ) -> Result<Box<dyn Loader + '_>, DataError> {
        Ok(Box::new(Shuffled {
            examples: self.examples,
            batch,
            seed: seed + 1000 * split as u64,
            next: 0,
        }))
    }
}

pub fn config() -> TrainConfig {
    TrainConfig {
        steps: 8,
        batch: 4,
        lr: 0.01,
        min_lr: 1e-4,
        warmup: 2,
        log_every: 1,
        eval_every: 0,
        eval_batches: 2,
        checkpoint_every: 0,
        ..TrainConfig::default()
    }
}

pub fn tiny_model(config: &TrainConfig) -> Model {
    model_with(config, json!({}))
}

/// The same with other values for some keys.
pub fn model_with(config: &TrainConfig, changes: Value) -> Model {
    let mut model = json!({
        "dim": 16, "layers": 2, "mixers": [{"name": "attention", "heads": 2}],
        "reads": {"tokens": {"vocab": VOCAB}}, "gives": {"next_token": {"tied": false}},
    });
    for (key, value) in changes.as_object().unwrap() {
        model[key] = value.clone();
    }
    let model = ModelConfig::from_json(&model).unwrap();
    Model::new(
        &model,
        &training_device(&Device::flex(), config),
        config.seed,
    )
    .unwrap()
}
