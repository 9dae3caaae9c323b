//! Laws of whole models: one small model around each registered mixer.

use anyformer_kernels::adamw::AdamW;
use anyformer_mixers::{Options, TokenEntry};
use anyformer_models::{Gives, Input, Model, ModelConfig, Target};
use anyformer_ops::{Device, tensor_values};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::tolerance::{GRADIENT, SELF, check};

type Law = fn(&TokenEntry) -> Result<(), String>;

/// Every law with its name.
pub const LAWS: &[(&str, Law)] = &[
    ("every parameter gets a gradient", every_gradient),
    ("poisoned padding reaches nothing", padding_is_not_read),
    ("learns to copy", learns_to_copy),
];

const DIM: usize = 32;
const VOCAB: usize = 8;
/// An id that stands in padding only.
const PAD: u32 = VOCAB as u32 - 1;
const TIME: usize = 9;

/// A model with positions, so that mixers which know none can copy too: it gives the next token or, where the mixer looks
/// ahead, one class.
fn model(entry: &TokenEntry, layers: usize) -> Result<Model, String> {
    let gives = match causal(entry) {
        true => json!({"next_token": {"tied": false}}),
        false => json!({"class": {"classes": VOCAB, "pool": "mean"}}),
    };
    let config = json!({
        "dim": DIM,
        "layers": layers,
        "mixers": [{"name": entry.card.name}],
        "positions": "learned",
        "max_time": TIME,
        "reads": {"tokens": {"vocab": VOCAB}},
        "gives": gives,
    });
    let config = ModelConfig::from_json(&config).map_err(|error| error.to_string())?;
    let device = Device::flex().autodiff();
    Model::new(&config, &device, 3).map_err(|error| error.to_string())
}

fn causal(entry: &TokenEntry) -> bool {
    entry.causal(&Options::new())
}

/// What is to be copied: at every place the token before; as a class, the first token.
fn copied(entry: &TokenEntry, ids: &[u32]) -> Vec<i64> {
    let before = |at: usize| match at % TIME {
        0 => -100,
        _ => i64::from(ids[at - 1]),
    };
    match causal(entry) {
        true => (0..ids.len()).map(before).collect(),
        false => ids.iter().step_by(TIME).map(|id| i64::from(*id)).collect(),
    }
}

/// Loss and the gradient of every trainable parameter; a parameter without one is an error.
fn gradients(
    model: &Model,
    ids: &[u32],
    lengths: Option<&[usize]>,
    targets: &[i64],
) -> Result<Vec<(String, Vec<f32>)>, String> {
    let batch = ids.len() / TIME;
    let input = Input::Tokens { ids, batch };

    let target = match model.config().gives {
        Gives::Class { .. } => Target::Classes(targets),
        _ => Target::Tokens(targets),
    };
    let scored = model
        .loss(input, lengths, target)
        .map_err(|error| error.to_string())?;
    let mut all = vec![("loss".to_string(), tensor_values(scored.loss.clone()))];
    let mut grads = scored.loss.backward();
    for param in model.params().params().iter().filter(|p| p.trainable()) {
        let grad = param
            .gradient(&mut grads)
            .ok_or_else(|| format!("{} has no gradient", param.name()))?;
        all.push((param.name().to_string(), grad));
    }
    Ok(all)
}

fn rows(seed: u64, batch: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..batch * TIME)
        .map(|_| rng.random_range(0..PAD))
        .collect()
}

fn every_gradient(entry: &TokenEntry) -> Result<(), String> {
    let ids = rows(1, 2);
    let all = gradients(&model(entry, 2)?, &ids, None, &copied(entry, &ids))?;
    let still = |(_, grad): &&(String, Vec<f32>)| grad.iter().all(|value| *value == 0.0);
    match all.iter().find(still) {
        Some((name, _)) => Err(format!("the gradient of {name} is zero")),
        None => Ok(()),
    }
}

fn padding_is_not_read(entry: &TokenEntry) -> Result<(), String> {
    let lengths = [5, TIME, 1];
    let mut ids = rows(2, lengths.len());
    let mut targets = copied(entry, &ids);
    for (row, length) in lengths.iter().enumerate() {
        for at in row * TIME + length..(row + 1) * TIME {
            ids[at] = PAD;
            if causal(entry) {
                targets[at] = -100;
            }
        }
    }
    let model = model(entry, 2)?;
    let clean = gradients(&model, &ids, Some(&lengths), &targets)?;
    let embed = model
        .params()
        .get("embed.weight")
        .ok_or("no parameter embed.weight")?;
    embed.update(|values| values[PAD as usize * DIM..].fill(f32::NAN));
    let poisoned = gradients(&model, &ids, Some(&lengths), &targets)?;
    for ((name, got), (_, want)) in poisoned.iter().zip(&clean) {
        if got.iter().any(|value| !value.is_finite()) {
            return Err(format!("{name} is not finite"));
        }
        let tolerance = match name == "loss" {
            true => SELF,
            false => GRADIENT,
        };
        check(name, got, want, tolerance)?;
    }
    Ok(())
}

fn learns_to_copy(entry: &TokenEntry) -> Result<(), String> {
    const STEPS: u64 = 150;
    let model = model(entry, 1)?;
    let params: Vec<_> = model.params().params().iter().collect();
    let mut moments: Vec<[Vec<f32>; 2]> = params
        .iter()
        .map(|param| [vec![0.0; param.count()], vec![0.0; param.count()]])
        .collect();
    let mut last = f32::NAN;
    for step in 1..=STEPS {
        let ids = rows(100 + step, 8);
        let mut all = gradients(&model, &ids, None, &copied(entry, &ids))?.into_iter();
        last = all.next().map_or(f32::NAN, |(_, loss)| loss[0]);
        let trained = params
            .iter()
            .zip(&mut moments)
            .filter(|(p, _)| p.trainable());
        for ((param, [first, second]), (_, grad)) in trained.zip(all) {
            let rule = AdamW {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.0,
                step,
                gradient_scale: 1.0,
            };
            param.update(|values| rule.update(values, &grad, first, second));
        }
    }
    let chance = (PAD as f32).ln();
    match last < 0.5 * chance {
        true => Ok(()),
        false => Err(format!(
            "loss {last} after {STEPS} steps; knowing nothing costs {chance}"
        )),
    }
}
