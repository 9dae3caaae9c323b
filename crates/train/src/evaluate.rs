//! The score of a model on a task.

use std::collections::HashMap;

use anyformer_data::{Batch, Split, Targets, Task};
use anyformer_models::{Input, Model, Scored, Target};
use anyformer_ops::ParamStore;

use crate::error::TrainError;

/// A score over several batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Mean loss in nats per scored place.
    pub loss: f64,
    /// Part of the scored places that were right.
    pub accuracy: f64,
    /// Part that the best constant answer would have had right: the floor that an accuracy is read against.
    pub constant: f64,
    /// Scored places.
    pub counted: usize,
}

/// Scores `model` on the first `batches` batches of `batch` rows of a split, the same ones at every call, or on as many
/// as the split has. Nothing is recorded for gradients meanwhile.
pub fn evaluate(
    model: &Model,
    task: &dyn Task,
    split: Split,
    batch: usize,
    batches: usize,
) -> Result<Evaluation, TrainError> {
    let _off = TrackingOff::new(model.params());
    let mut loader = task.loader(split, batch, 0)?;
    let (mut loss, mut correct, mut counted) = (0.0, 0, 0);
    let mut answers: HashMap<i64, usize> = HashMap::new();
    for _ in 0..batches {
        let batch = loader.next_batch()?;
        let scored = score(model, &batch)?;
        loss += f64::from(value(&scored)) * scored.counted as f64;
        correct += scored.correct;
        counted += scored.counted;
        let (Targets::Tokens(wanted) | Targets::Classes(wanted)) = &batch.targets;
        for answer in wanted.iter().filter(|answer| **answer >= 0) {
            *answers.entry(*answer).or_default() += 1;
        }
    }
    let places = counted.max(1) as f64;
    Ok(Evaluation {
        loss: loss / places,
        accuracy: correct as f64 / places,
        constant: answers.values().max().map_or(0.0, |most| *most as f64) / places,
        counted,
    })
}

/// The loss of one batch.
pub fn score(model: &Model, batch: &Batch) -> Result<Scored, TrainError> {
    let input = match &batch.pixels {
        Some(values) => Input::Pixels {
            values,
            batch: batch.batch,
        },
        None => Input::Tokens {
            ids: &batch.tokens,
            batch: batch.batch,
        },
    };
    let target = match &batch.targets {
        Targets::Tokens(tokens) => Target::Tokens(tokens),
        Targets::Classes(classes) => Target::Classes(classes),
    };
    Ok(model.loss(input, batch.lengths.as_deref(), target)?)
}

/// The number in a loss.
pub(crate) fn value(scored: &Scored) -> f32 {
    anyformer_ops::tensor_values(scored.loss.clone())[0]
}

/// Keeps the recording of gradients off while it lives, then as it was.
struct TrackingOff<'a> {
    store: &'a ParamStore,
    before: bool,
}

impl<'a> TrackingOff<'a> {
    fn new(store: &'a ParamStore) -> Self {
        let before = store.device().is_autodiff();
        store.set_tracking(false);
        TrackingOff { store, before }
    }
}

impl Drop for TrackingOff<'_> {
    fn drop(&mut self) {
        self.store.set_tracking(self.before);
    }
}
