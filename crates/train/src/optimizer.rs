//! AdamW over the parameters of a model, with decay for those that decay, and gradients accumulated over batches.
//!
//! Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2:
//! `m = β₁m + (1-β₁)g`, `v = β₂v + (1-β₂)g²`, `p = p - lr (m/(1-β₁ᵗ) / (sqrt(v/(1-β₂ᵗ)) + eps) + λp)`.

use std::collections::HashMap;

use anyformer_hub::NamedTensor;
use anyformer_kernels::adamw::{self, sum_of_squares};
use anyformer_ops::profile::{self, Pass};
use anyformer_ops::{Gradients, Param, ParamStore};

use crate::config::TrainConfig;

struct Moments {
    param: Param,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// The optimiser: two moments for each trainable parameter, and the number of updates made.
pub struct AdamW {
    updates: u64,
    moments: Vec<Moments>,
}

/// The gradient of one update: the sum over several batches, each weighted by the places that it scored, so that
/// dividing by all places gives the gradient of one large batch.
pub struct Gradient {
    /// `None`: the parameter had no part in the loss.
    sums: Vec<Option<Vec<f32>>>,
    weight: f64,
}

impl AdamW {
    /// An optimiser that has made no update. Buffers are left alone.
    pub fn new(store: &ParamStore) -> Self {
        let trainable = store.params().iter().filter(|param| param.trainable());
        let moments = |param: &Param| Moments {
            param: param.clone(),
            first: vec![0.0; param.count()],
            second: vec![0.0; param.count()],
        };
        AdamW {
            updates: 0,
            moments: trainable.map(moments).collect(),
        }
    }

    /// An empty gradient.
    pub fn gradient(&self) -> Gradient {
        Gradient {
            sums: self.moments.iter().map(|_| None).collect(),
            weight: 0.0,
        }
    }

    /// Adds the gradients of one batch's mean loss to `sum`, with a weight.
    pub fn accumulate(&self, sum: &mut Gradient, gradients: &mut Gradients, weight: f64) {
        sum.weight += weight;
        for (sum, held) in sum.sums.iter_mut().zip(&self.moments) {
            let Some(mut gradient) = held.param.gradient(gradients) else {
                continue;
            };
            let weight = weight as f32;
            match sum {
                Some(sum) => sum
                    .iter_mut()
                    .zip(&gradient)
                    .for_each(|(sum, value)| *sum += weight * value),
                None => {
                    if weight != 1.0 {
                        gradient.iter_mut().for_each(|value| *value *= weight);
                    }
                    *sum = Some(gradient);
                }
            }
        }
    }

    /// The first parameter, in order of construction, whose gradient is not finite.
    pub fn first_not_finite(&self, gradient: &Gradient) -> Option<&str> {
        let mut pairs = self.moments.iter().zip(&gradient.sums);
        let bad = |sum: &Option<Vec<f32>>| {
            sum.as_ref()
                .is_some_and(|sum| sum.iter().any(|value| !value.is_finite()))
        };
        pairs
            .find(|(_, sum)| bad(sum))
            .map(|(held, _)| held.param.name())
    }

    /// Makes one update; a gradient of a `norm` (see [`Gradient::norm`]) above `config.clip` is scaled down to it.
    pub fn update(&mut self, gradient: &Gradient, norm: f64, rate: f64, config: &TrainConfig) {
        self.updates += 1;
        let mut scale = 1.0 / gradient.weight;
        if config.clip > 0.0 && norm > config.clip {
            scale *= config.clip / norm;
        }
        let kernel = |weight_decay: f64| adamw::AdamW {
            learning_rate: rate,
            beta1: config.betas[0],
            beta2: config.betas[1],
            eps: config.eps,
            weight_decay,
            step: self.updates,
            gradient_scale: scale as f32,
        };
        for (held, sum) in self.moments.iter_mut().zip(&gradient.sums) {
            let Some(sum) = sum else {
                continue;
            };
            let decay = if held.param.decays() {
                config.weight_decay
            } else {
                0.0
            };
            let (first, second) = (&mut held.first, &mut held.second);
            // Seven arrays of f32: four are read, three written.
            let size = |_: &()| [7 * 4 * sum.len() as u64, 0];
            profile::span("AdamW", Pass::Update, size, || {
                held.param
                    .update(|values| kernel(decay).update(values, sum, first, second));
            });
        }
    }

    /// The moments as tensors: `NAME.first_moment` and `NAME.second_moment`.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        let tensor = |held: &Moments, which: &str, values: &[f32]| NamedTensor {
            name: format!("{}.{which}", held.param.name()),
            shape: held.param.shape().to_vec(),
            values: values.to_vec(),
        };
        let pair = |held| {
            [
                tensor(held, "first_moment", &held.first),
                tensor(held, "second_moment", &held.second),
            ]
        };
        self.moments.iter().flat_map(pair).collect()
    }

    /// Puts back what [`AdamW::tensors`] gave after `updates` updates.
    pub fn restore(&mut self, updates: u64, tensors: Vec<NamedTensor>) -> Result<(), String> {
        let mut held: HashMap<String, NamedTensor> = tensors
            .into_iter()
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect();
        let mut problems = Vec::new();
        for moments in &mut self.moments {
            let shape = moments.param.shape();
            let slots = [
                ("first_moment", &mut moments.first),
                ("second_moment", &mut moments.second),
            ];
            for (which, slot) in slots {
                let name = format!("{}.{which}", moments.param.name());
                match held.remove(&name) {
                    Some(tensor) if tensor.shape == shape => *slot = tensor.values,
                    Some(tensor) => {
                        problems.push(format!("{name} should be {shape:?}, is {:?}", tensor.shape))
                    }
                    None => problems.push(format!("{name} is missing")),
                }
            }
        }
        problems.extend(
            held.into_keys()
                .map(|name| format!("{name} is not in the optimiser")),
        );
        if !problems.is_empty() {
            problems.sort();
            return Err(format!(
                "the optimiser's moments do not fit: {}",
                problems.join(", ")
            ));
        }
        self.updates = updates;
        Ok(())
    }
}

impl Gradient {
    /// The norm of the whole averaged gradient.
    pub fn norm(&self) -> f64 {
        let squares = self.sums.iter().flatten().map(|sum| sum_of_squares(sum));
        squares.sum::<f64>().sqrt() / self.weight
    }
}
