//! The score of a model on a task.

use std::collections::HashMap;

use anyformer_data::{Batch, Split, Targets, Task};
use anyformer_models::{Input, Model, ModelError, Pass, Scored, Target};
use anyformer_ops::{ParamStore, Tensor};

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

/// What a classifier that may stop early did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Early {
    /// Part of the answers that were right.
    pub accuracy: f64,
    /// Layers that ran, on average.
    pub layers: f64,
    /// Answers.
    pub counted: usize,
}

/// Scores a classifier example by example, each stopping at the first exit whose likeliest class has a probability above
/// `threshold`; at 1 none stops.
pub fn evaluate_early(
    model: &Model,
    task: &dyn Task,
    split: Split,
    batch: usize,
    batches: usize,
    threshold: f32,
) -> Result<Early, TrainError> {
    let _off = TrackingOff::new(model.params());
    let mut loader = task.loader(split, batch, 0)?;
    let (mut right, mut layers, mut counted) = (0, 0, 0);
    for _ in 0..batches {
        let batch = loader.next_batch()?;
        let Targets::Classes(classes) = &batch.targets else {
            return Err(ModelError::Input(
                "leaving at an exit is for models that give a class; this task wants tokens".into(),
            )
            .into());
        };
        // A pair is two rows.
        let rows = batch.batch / classes.len().max(1);
        let part = |values: usize| values / batch.batch * rows;
        for (at, class) in classes.iter().enumerate() {
            let input = match &batch.pixels {
                Some(values) => Input::Pixels {
                    values: &values[at * part(values.len())..][..part(values.len())],
                    batch: rows,
                },
                None => Input::Tokens {
                    ids: &batch.tokens[at * part(batch.tokens.len())..][..part(batch.tokens.len())],
                    batch: rows,
                },
            };
            let lengths = batch.lengths.as_ref();
            let lengths = lengths.map(|lengths| &lengths[at * rows..][..rows]);
            let (scores, ran) = model.forward_early(input, lengths, threshold)?;
            let scores = anyformer_ops::tensor_values(scores);
            let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            right += usize::from(best == Some(*class as usize));
            layers += ran;
            counted += 1;
        }
    }
    let places = counted.max(1) as f64;
    Ok(Early {
        accuracy: right as f64 / places,
        layers: layers as f64 / places,
        counted,
    })
}

/// The loss of one batch.
pub fn score(model: &Model, batch: &Batch) -> Result<Scored, TrainError> {
    score_with(model, batch, &Pass::default())
}

/// The loss of one batch with what a pass of training adds to it.
pub(crate) fn score_with(model: &Model, batch: &Batch, pass: &Pass) -> Result<Scored, TrainError> {
    let lengths = batch.lengths.as_deref();
    Ok(model.loss_with(input(batch), lengths, target(batch), pass)?)
}

/// What a model reads of a batch.
pub(crate) fn input(batch: &Batch) -> Input<'_> {
    match &batch.pixels {
        Some(values) => Input::Pixels {
            values,
            batch: batch.batch,
        },
        None => Input::Tokens {
            ids: &batch.tokens,
            batch: batch.batch,
        },
    }
}

/// What it should give.
pub(crate) fn target(batch: &Batch) -> Target<'_> {
    match &batch.targets {
        Targets::Tokens(tokens) => Target::Tokens(tokens),
        Targets::Classes(classes) => Target::Classes(classes),
    }
}

/// The number in a loss.
pub(crate) fn value(scored: &Scored) -> f32 {
    number(&scored.loss)
}

/// The one number of a tensor `[1]`.
pub(crate) fn number(tensor: &Tensor<1>) -> f32 {
    anyformer_ops::tensor_values(tensor.clone())[0]
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
