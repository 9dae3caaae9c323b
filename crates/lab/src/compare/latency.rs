//! What inference costs against length: the prompt at once, then one token more, with state and memory.

use std::time::Instant;

use anyformer_kernels::memory;
use anyformer_models::{Gives, Input, Model, ModelConfig, Pool, Reads};
use anyformer_ops::{Device, tensor_values};

use super::CompareError;
use crate::stats::median;
use crate::trial::LatencyPoint;

/// Repetitions of a prompt; the median counts.
const PROMPTS: usize = 3;
/// Tokens generated after a prompt; the median counts.
const TOKENS: usize = 9;
/// Vocabulary of the measured model: bytes.
const VOCAB: usize = 256;

/// Measures a language model of the contender's size, batch 1, at each length.
pub(super) fn measure(
    config: &ModelConfig,
    lengths: &[usize],
) -> Result<Vec<LatencyPoint>, CompareError> {
    let gives = match config.causal() {
        true => Gives::NextToken { tied: true },
        false => Gives::class(VOCAB, Pool::Mean),
    };
    let config = ModelConfig {
        reads: Reads::Tokens { vocab: VOCAB },
        gives,
        max_time: lengths.iter().max().map_or(0, |most| most + TOKENS),
        ..config.clone()
    };
    let model = Model::new(&config, &Device::flex(), 0)?;
    lengths.iter().map(|length| at(&model, *length)).collect()
}

fn at(model: &Model, length: usize) -> Result<LatencyPoint, CompareError> {
    let ids: Vec<u32> = (0..length)
        .map(|place| (place * 97 % VOCAB) as u32)
        .collect();
    let mut prompts = Vec::new();
    let mut state = None;
    let before = memory::allocated();
    memory::reset_peak();
    for _ in 0..PROMPTS {
        state = None;
        let clock = Instant::now();
        if model.config().streams() {
            let (scores, next) = model.prefill(&ids, 1, None, None)?;
            tensor_values(scores);
            state = Some(next);
        } else {
            tensor_values(model.forward(
                Input::Tokens {
                    ids: &ids,
                    batch: 1,
                },
                None,
            )?);
        }
        prompts.push(clock.elapsed().as_secs_f64());
    }
    let peak = memory::peak().saturating_sub(before) as u64;
    let state_bytes = state.as_ref().map(|state| state.bytes());
    let mut steps = Vec::new();
    if let Some(mut held) = state {
        for token in 0..TOKENS {
            let clock = Instant::now();
            let (scores, next) = model.step(&[(token % VOCAB) as u32], &held)?;
            tensor_values(scores);
            held = next;
            steps.push(clock.elapsed().as_secs_f64());
        }
    }
    Ok(LatencyPoint {
        length: length as u64,
        prefill_seconds: median(&prompts).unwrap_or(f64::NAN),
        step_seconds: median(&steps),
        state_bytes,
        memory_bytes: (peak > 0).then_some(peak),
    })
}
