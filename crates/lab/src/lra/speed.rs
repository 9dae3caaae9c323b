//! Time and memory of one training step against length, as the benchmark's second table has them.
//!
//! The model of the text task reads random bytes; a step is a forward and a backward pass of one sequence. The fastest of a
//! few counts, and the most memory that was allocated at once. What would need more memory or time than allowed, judged
//! by the two lengths before, is not run and says so.

use std::path::Path;
use std::time::Instant;

use anyformer_kernels::memory;
use anyformer_mixers::{MixerSpec, token_mixer};
use anyformer_models::{Input, Model, ModelConfig, Reads, Target};
use anyformer_ops::tensor_values;
use anyformer_train::StopFlag;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::define::knobs;
use super::timing_device;
use crate::compare::{CompareError, Event, TaskPlan, Where, label};
use crate::units::bytes;

/// What is measured.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Lengths {
    /// Tokens of a sequence, rising; empty: nothing.
    pub lengths: Vec<usize>,
    /// Bytes that a step may need.
    pub memory: u64,
    /// Seconds that a step may take.
    pub seconds: f64,
}

/// One model at one length.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Point {
    /// The contender.
    pub mixer: String,
    /// Tokens.
    pub length: usize,
    /// Seconds of a step; absent where it was not run.
    pub seconds: Option<f64>,
    /// Most bytes at once; absent where nothing counts them.
    pub bytes: Option<u64>,
    /// Why it was not run.
    pub skipped: Option<String>,
}

const BYTES: usize = 257;

/// Measures every contender at every length, going on from `speed.json` in the folder.
pub(super) fn measure(
    text: &TaskPlan,
    mixers: &[MixerSpec],
    asked: &Lengths,
    place: &Where,
    stop: &StopFlag,
    events: &mut dyn FnMut(&Event),
) -> Result<Vec<Point>, CompareError> {
    let path = place.folder.join("speed.json");
    let setup = json!({"asked": asked, "model": text.model, "commit": place.commit, "machine": place.machine});
    let mut points = earlier(&path, &setup);
    for mixer in mixers {
        let name = label(mixer);
        if points.iter().any(|point| point.mixer == name) {
            continue;
        }
        if stop.requested() {
            return Err(CompareError::Stopped);
        }
        let mut own: Vec<Point> = Vec::new();
        for length in &asked.lengths {
            let skipped = too_much(&own, *length, asked);
            let (seconds, bytes) = match skipped {
                Some(_) => (None, None),
                None => {
                    let (seconds, bytes) = step(text, mixer, *length)?;
                    (Some(seconds), bytes)
                }
            };
            own.push(Point {
                mixer: name.clone(),
                length: *length,
                seconds,
                bytes,
                skipped,
            });
        }
        events(&Event::Timed {
            mixer: name,
            lengths: own.len(),
        });
        points.extend(own);
        let text = json!({"setup": setup, "points": points}).to_string();
        crate::compare::write(&path, &text)?;
    }
    Ok(points)
}

fn earlier(path: &Path, setup: &Value) -> Vec<Point> {
    let held = std::fs::read_to_string(path).ok();
    let held: Option<Value> = held.and_then(|text| serde_json::from_str(&text).ok());
    match held {
        Some(held) if held.get("setup") == Some(setup) => {
            serde_json::from_value(held["points"].clone()).unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

/// Why a length is not run, judged by the growth between the two before it.
fn too_much(own: &[Point], length: usize, asked: &Lengths) -> Option<String> {
    let last = own.last()?;
    if last.skipped.is_some() {
        return last.skipped.clone();
    }
    let factor = length as f64 / last.length as f64;
    let ahead = |of: &dyn Fn(&Point) -> Option<f64>| {
        let now = of(last)?;
        let before = own.len().checked_sub(2).map(|index| &own[index]);
        let grew = before.and_then(|point| {
            let power = (now / of(point)?).ln() / (last.length as f64 / point.length as f64).ln();
            power.is_finite().then_some(power)
        });
        Some(now * factor.powf(grew.unwrap_or(2.0).clamp(1.0, 2.0)))
    };
    let needed = ahead(&|point| point.bytes.map(|bytes| bytes as f64));
    if let Some(needed) = needed.filter(|needed| *needed > asked.memory as f64) {
        return Some(format!("about {} needed", bytes(needed)));
    }
    let takes = ahead(&|point| point.seconds);
    takes
        .filter(|takes| *takes > asked.seconds)
        .map(|takes| format!("about {takes:.0} s a step"))
}

/// Seconds and bytes of a step.
fn step(
    text: &TaskPlan,
    mixer: &MixerSpec,
    length: usize,
) -> Result<(f64, Option<u64>), CompareError> {
    let mut model: Map<String, Value> = text.model.clone();
    let heads = text.knobs.get("heads").and_then(Value::as_u64).unwrap_or(4);
    let fitted = TaskPlan {
        knobs: knobs(length, heads as usize),
        ..text.clone()
    }
    .contender(mixer)?;
    if token_mixer(&fitted.name)?.causal(&fitted.options) {
        model.extend(text.causal.clone());
    }
    model.insert("max_time".into(), json!(length));
    let config = ModelConfig {
        mixers: vec![fitted],
        reads: Reads::Tokens { vocab: BYTES },
        ..ModelConfig::from_json(&Value::Object(model))?
    };
    let built = Model::new(&config, &timing_device(), 0)?;
    let ids: Vec<u32> = (0..length).map(|at| (at * 97 % BYTES) as u32).collect();
    let mut best = f64::INFINITY;
    let before = memory::allocated();
    memory::reset_peak();
    for round in 0..4 {
        let clock = Instant::now();
        let input = Input::Tokens {
            ids: &ids,
            batch: 1,
        };
        let scored = built.loss(input, None, Target::Classes(&[1]))?;
        scored.loss.clone().backward();
        tensor_values(scored.loss);
        best = best.min(clock.elapsed().as_secs_f64());
        // Long steps repeat well enough without a second look.
        if round == 0 && best > 5.0 {
            break;
        }
    }
    let peak = memory::peak().saturating_sub(before) as u64;
    Ok((best, (peak > 0).then_some(peak)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_would_not_fit_are_told_ahead() {
        let point = |length: usize, seconds: f64, bytes: u64| Point {
            mixer: "attention".into(),
            length,
            seconds: Some(seconds),
            bytes: Some(bytes),
            skipped: None,
        };
        let asked = Lengths {
            lengths: vec![1, 2, 4],
            memory: 900,
            seconds: 10.0,
        };
        let linear = [point(1, 0.1, 100), point(2, 0.2, 200)];
        assert_eq!(too_much(&linear, 4, &asked), None);
        let square = [point(1, 0.1, 100), point(2, 0.4, 400)];
        assert!(too_much(&square, 4, &asked).is_some_and(|why| why.contains("needed")));
        let slow = [point(1, 2.0, 10), point(2, 8.0, 20)];
        assert!(too_much(&slow, 4, &asked).is_some_and(|why| why.contains("32 s")));
        assert_eq!(too_much(&[], 4, &asked), None);
    }
}
