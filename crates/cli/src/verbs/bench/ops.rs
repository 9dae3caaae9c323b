//! `anyformer bench --ops`: each op alone, forward and backward, as a kernel and composed out of tensor operations.

use std::sync::Arc;

use anyformer_kernels::memory;
use anyformer_lab::units::{bytes, seconds};
use anyformer_ops::activation::{gelu, silu, softmax, swiglu};
use anyformer_ops::attention::{AttentionOptions, flash_attention};
use anyformer_ops::conv::causal_conv1d;
use anyformer_ops::linear::{Precision, linear};
use anyformer_ops::loss::cross_entropy;
use anyformer_ops::norm::{layer_norm, rms_norm};
use anyformer_ops::profile::record;
use anyformer_ops::recurrence::{Gate, RecurrenceOptions, Write, linear_recurrence};
use anyformer_ops::scan::{ScanInputs, selective_scan};
use anyformer_ops::{Device, Tensor, portable};
use serde::Serialize;

use super::median;
use super::profile::Peaks;
use crate::exit::{Failure, bad_input};
use crate::format::table;

/// One op at one size.
struct Case {
    name: &'static str,
    /// What the table calls the size; scripts read the numbers.
    size: Vec<usize>,
    /// Counts of the inputs, given to `run` flat.
    inputs: Vec<usize>,
    run: fn(&[usize], &[Tensor<1>]) -> Tensor<1>,
    /// Inference only: no gradients.
    forward_only: bool,
    /// The composed form takes too long, or too much memory.
    kernel_only: bool,
}

/// A measured case.
#[derive(Debug, Serialize)]
pub struct Measured {
    op: &'static str,
    size: Vec<usize>,
    /// Forward and backward, or forward alone.
    backward: bool,
    kernel_s: f64,
    composed_s: Option<f64>,
    peak_bytes: usize,
    flops_per_s: Option<f64>,
    bytes_per_s: f64,
}

fn count(size: &[usize]) -> usize {
    size.iter().product()
}

fn pointwise(
    name: &'static str,
    run: fn(&[usize], &[Tensor<1>]) -> Tensor<1>,
    inputs: usize,
) -> Case {
    let size = vec![4096, 1024];
    Case {
        name,
        inputs: vec![count(&size); inputs],
        size,
        run,
        forward_only: false,
        kernel_only: false,
    }
}

fn rows(name: &'static str, run: fn(&[usize], &[Tensor<1>]) -> Tensor<1>, weights: usize) -> Case {
    let mut case = pointwise(name, run, 1);
    case.size = vec![8192, 512];
    case.inputs = [vec![count(&case.size)], vec![512; weights]].concat();
    case
}

fn two(size: &[usize], x: &Tensor<1>) -> Tensor<2> {
    x.clone().reshape([size[0], size[1]])
}

/// `[batch, time, heads, head_dim]` of a size that starts with these.
fn four(size: &[usize], x: &Tensor<1>) -> Tensor<4> {
    x.clone().reshape([size[0], size[1], size[2], size[3]])
}

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let count = x.dims().iter().product::<usize>();
    x.reshape([count])
}

fn product(size: &[usize], x: &[Tensor<1>], precision: Precision) -> Tensor<1> {
    let a = x[0].clone().reshape([size[0], size[1]]);
    let b = x[1].clone().reshape([size[2], size[1]]);
    flat(linear(a, b, None, precision))
}

fn attention(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let options = AttentionOptions {
        causal: true,
        ..AttentionOptions::default()
    };
    flat(flash_attention(
        four(size, &x[0]),
        four(size, &x[1]),
        four(size, &x[2]),
        &options,
    ))
}

/// Contexts of one batch of [`decode`], in tokens.
const CONTEXTS: [usize; 6] = [4096, 8192, 16384, 32768, 65536, 131_072];

/// One new token for each of [`CONTEXTS`]: size is query heads, key heads, features.
fn decode(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let mut ends = vec![0];
    for context in CONTEXTS {
        ends.push(ends[ends.len() - 1] + context);
    }
    let total = ends[ends.len() - 1];
    let options = AttentionOptions {
        causal: true,
        q_offsets: Some(Arc::new((0..=CONTEXTS.len()).collect())),
        k_offsets: Some(Arc::new(ends)),
        ..AttentionOptions::default()
    };
    let keys = |x: &Tensor<1>| x.clone().reshape([1, total, size[1], size[2]]);
    let q = x[0].clone().reshape([1, CONTEXTS.len(), size[0], size[2]]);
    flat(flash_attention(q, keys(&x[1]), keys(&x[2]), &options))
}

/// Size is batch, time, heads, head_dim; the state of a step follows the four inputs of the engine.
fn recurrence(
    size: &[usize],
    x: &[Tensor<1>],
    gate: Gate,
    write: Write,
    state: Option<&Tensor<1>>,
) -> Tensor<1> {
    let initial = state.map(|state| state.clone().reshape([size[0], size[2], size[3], size[3]]));
    let k = four(size, &x[1]).mul_scalar((size[3] as f32).powf(-0.5));
    let (y, last) = linear_recurrence(
        four(size, &x[0]),
        k,
        four(size, &x[2]),
        gate,
        write,
        initial,
        &RecurrenceOptions::default(),
    );
    match state {
        // A step hands its state on: it must be made.
        Some(_) => flat(y) + last.slice([0..1, 0..1, 0..1, 0..1]).reshape([1]),
        None => flat(y),
    }
}

/// Values in (-1, 1) as decays of at most one.
fn decay(x: &Tensor<1>) -> Tensor<1> {
    x.clone().mul_scalar(0.05).sub_scalar(0.06)
}

fn per_head(size: &[usize], x: &Tensor<1>) -> Tensor<3> {
    x.clone().reshape([size[0], size[1], size[2]])
}

fn share(size: &[usize], x: &Tensor<1>) -> Write {
    Write::Delta(per_head(size, &x.clone().mul_scalar(0.4).add_scalar(0.5)))
}

fn gla(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(
        size,
        x,
        Gate::Vector(four(size, &decay(&x[3]))),
        Write::Additive,
        x.get(4),
    )
}

fn delta(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(size, x, Gate::None, share(size, &x[3]), x.get(4))
}

fn gated_delta(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let gate = Gate::Scalar(per_head(size, &decay(&x[3])));
    recurrence(size, x, gate, share(size, &x[4]), x.get(5))
}

fn ssd(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(
        size,
        x,
        Gate::Scalar(per_head(size, &decay(&x[3]))),
        Write::Additive,
        x.get(4),
    )
}

/// Size is batch, time, channels, state.
fn scan(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let [batch, time, channels, state] = [size[0], size[1], size[2], size[3]];
    let wide = |x: &Tensor<1>| x.clone().reshape([batch, time, channels]);
    let shared = |x: &Tensor<1>| x.clone().reshape([batch, time, state]);
    let inputs = ScanInputs {
        u: wide(&x[0]),
        delta: wide(&x[1]),
        delta_bias: x[2].clone(),
        a: x[3].clone().reshape([channels, state]).abs().neg(),
        b: shared(&x[4]),
        c: shared(&x[5]),
        d: x[6].clone(),
    };
    let initial = x
        .get(7)
        .map(|x| x.clone().reshape([batch, channels, state]));
    flat(selective_scan(inputs, initial, None).0)
}

/// Size is batch, time, channels, width.
fn conv(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let input = x[0].clone().reshape([size[0], size[1], size[2]]);
    let weight = x[1].clone().reshape([size[2], size[3]]);
    flat(causal_conv1d(input, weight, None, true, None, None).0)
}

/// An engine over one sequence of `time` tokens, or (`time` 1) a step of `batch` sequences from their states.
fn engine(
    name: &'static str,
    run: fn(&[usize], &[Tensor<1>]) -> Tensor<1>,
    batch: usize,
    time: usize,
) -> Case {
    let (heads, dim) = (4, 128);
    let (all, few) = (batch * time * heads * dim, batch * time * heads);
    let mut inputs = vec![all; 3];
    inputs.extend(match name.trim_end_matches(" step") {
        "gla" => vec![all],
        "gated_delta" => vec![few, few],
        _ => vec![few],
    });
    if time == 1 {
        inputs.push(batch * heads * dim * dim);
    }
    Case {
        name,
        size: vec![batch, time, heads, dim],
        inputs,
        run,
        forward_only: time == 1,
        kernel_only: time > 512 || time == 1,
    }
}

fn scan_case(name: &'static str, batch: usize, time: usize) -> Case {
    let (channels, state) = (1024, 16);
    let (wide, narrow) = (batch * time * channels, batch * time * state);
    let mut inputs = vec![
        wide,
        wide,
        channels,
        channels * state,
        narrow,
        narrow,
        channels,
    ];
    if time == 1 {
        inputs.push(batch * channels * state);
    }
    Case {
        name,
        size: vec![batch, time, channels, state],
        inputs,
        run: scan,
        forward_only: time == 1,
        kernel_only: time > 512 || time == 1,
    }
}

fn cases() -> Vec<Case> {
    let mut all = vec![
        pointwise("gelu", |s, x| flat(gelu(two(s, &x[0]))), 1),
        pointwise("silu", |s, x| flat(silu(two(s, &x[0]))), 1),
        pointwise(
            "swiglu",
            |s, x| flat(swiglu(two(s, &x[0]), two(s, &x[1]))),
            2,
        ),
        rows(
            "rms_norm",
            |s, x| flat(rms_norm(two(s, &x[0]), x[1].clone(), 1e-5)),
            1,
        ),
        rows(
            "layer_norm",
            |s, x| {
                flat(layer_norm(
                    two(s, &x[0]),
                    x[1].clone(),
                    Some(x[2].clone()),
                    1e-5,
                ))
            },
            2,
        ),
        rows("softmax", |s, x| flat(softmax(two(s, &x[0]))), 0),
    ];
    let mut entropy = rows(
        "cross_entropy",
        |s, x| {
            let targets = (0..s[0] as i64).map(|row| row % s[1] as i64).collect();
            cross_entropy(two(s, &x[0]), Arc::new(targets)).loss
        },
        0,
    );
    (entropy.size, entropy.inputs) = (vec![2048, 8192], vec![2048 * 8192]);
    all.push(entropy);
    for size in [[1024, 1024, 1024], [4096, 256, 1024]] {
        for (name, run) in [
            (
                "matmul f32",
                (|s, x| product(s, x, Precision::F32)) as fn(&[usize], &[Tensor<1>]) -> Tensor<1>,
            ),
            ("matmul bf16", |s, x| product(s, x, Precision::Bf16)),
        ] {
            all.push(Case {
                name,
                size: size.to_vec(),
                inputs: vec![size[0] * size[1], size[2] * size[1]],
                run,
                forward_only: false,
                kernel_only: false,
            });
        }
    }
    for time in [512, 2048, 8192] {
        all.push(Case {
            name: "attention",
            size: vec![1, time, 8, 64],
            inputs: vec![time * 8 * 64; 3],
            run: attention,
            forward_only: false,
            kernel_only: time > 2048,
        });
    }
    let held: usize = CONTEXTS.iter().sum();
    all.push(Case {
        name: "decode",
        size: vec![8, 2, 64],
        inputs: vec![CONTEXTS.len() * 8 * 64, held * 2 * 64, held * 2 * 64],
        run: decode,
        forward_only: true,
        kernel_only: true,
    });
    for time in [512, 2048, 8192, 16384] {
        all.push(engine("gla", gla, 1, time));
        all.push(engine("delta", delta, 1, time));
        all.push(engine("gated_delta", gated_delta, 1, time));
        all.push(engine("ssd", ssd, 1, time));
        all.push(scan_case("scan", 1, time));
    }
    all.push(engine("gla step", gla, 128, 1));
    all.push(engine("delta step", delta, 128, 1));
    all.push(engine("gated_delta step", gated_delta, 128, 1));
    all.push(engine("ssd step", ssd, 128, 1));
    all.push(scan_case("scan step", 512, 1));
    let channels = 1024;
    all.push(Case {
        name: "conv",
        size: vec![1, 4096, channels, 4],
        inputs: vec![4096 * channels, channels * 4],
        run: conv,
        forward_only: false,
        kernel_only: false,
    });
    all
}

/// Names that `--only` can take.
fn names() -> Vec<&'static str> {
    let mut names: Vec<&str> = cases().iter().map(|case| case.name).collect();
    names.dedup();
    names.sort_unstable();
    names.dedup();
    names
}

/// Deterministic values in (-1, 1).
fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

impl Case {
    fn measure(&self, runs: usize, composed: bool) -> Result<Measured, Failure> {
        let device = match self.forward_only {
            true => Device::flex(),
            false => Device::flex().autodiff(),
        };
        let leaves: Vec<Tensor<1>> = self
            .inputs
            .iter()
            .enumerate()
            .map(|(index, count)| {
                let leaf = Tensor::from_data(values(index as u64 + 1, *count).as_slice(), &device);
                if self.forward_only {
                    leaf
                } else {
                    leaf.require_grad()
                }
            })
            .collect();
        let once = || {
            let y = (self.run)(&self.size, &leaves);
            if self.forward_only {
                std::hint::black_box(y);
            } else {
                let grads = y.backward();
                std::hint::black_box(
                    leaves
                        .iter()
                        .map(|leaf| leaf.grad(&grads))
                        .collect::<Vec<_>>(),
                );
            }
            Ok(())
        };
        let held = memory::allocated();
        memory::reset_peak();
        let kernel_s = median(runs, once)?;
        let peak_bytes = memory::peak().saturating_sub(held);
        let (_, taken) = record(once);
        let moved: u64 = taken.values().map(|took| took.bytes).sum();
        let flops: u64 = taken.values().map(|took| took.flops).sum();
        let composed_s = match composed && !self.kernel_only {
            true => Some(portable(|| median(1, once))?),
            false => None,
        };
        Ok(Measured {
            op: self.name,
            size: self.size.clone(),
            backward: !self.forward_only,
            kernel_s,
            composed_s,
            peak_bytes,
            flops_per_s: (flops > 0).then_some(flops as f64 / kernel_s),
            bytes_per_s: moved as f64 / kernel_s,
        })
    }
}

/// Measures the ops named by `only` (all where empty).
pub fn measure(
    only: &[String],
    runs: usize,
    composed: bool,
    note: impl Fn(String),
) -> Result<Vec<Measured>, Failure> {
    let known = names();
    if let Some(wrong) = only.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(bad_input(format!(
            "measure the op {wrong:?}: expected one of {}",
            known.join(", ")
        )));
    }
    cases()
        .iter()
        .filter(|case| only.is_empty() || only.iter().any(|name| name == case.name))
        .map(|case| {
            note(format!("{} {:?}", case.name, case.size));
            case.measure(runs, composed)
        })
        .collect()
}

/// The table.
pub fn text(measured: &[Measured], peaks: &Peaks) -> String {
    let cells: Vec<Vec<String>> = measured
        .iter()
        .map(|row| {
            let size: Vec<String> = row.size.iter().map(usize::to_string).collect();
            let none = || "-".to_string();
            vec![
                row.op.to_string(),
                size.join(" x "),
                if row.backward { "both" } else { "forward" }.into(),
                seconds(row.kernel_s),
                row.composed_s.map_or_else(none, seconds),
                row.composed_s
                    .map_or_else(none, |s| format!("{:.2}", row.kernel_s / s)),
                bytes(row.peak_bytes as f64),
                row.flops_per_s
                    .map_or_else(none, |rate| format!("{:.0}", rate / 1e9)),
                format!("{:.1}", row.bytes_per_s / 1e9),
            ]
        })
        .collect();
    let header = [
        "op",
        "size",
        "passes",
        "kernel",
        "composed",
        "ratio",
        "peak memory",
        "GFLOP/s",
        "GB/s",
    ];
    let mut text = table(&header, &[3, 4, 5, 6, 7, 8], &cells);
    text += &peaks.line();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_runs_small_and_gives_a_time() {
        let small = |case: &Case| match case.name {
            "gla" | "delta" | "gated_delta" | "ssd" | "scan" => case.size[1] == 512,
            "attention" => case.size[1] == 512,
            "gelu" | "rms_norm" => true,
            _ => false,
        };
        for case in cases().iter().filter(|case| small(case)) {
            let measured = case.measure(1, false);
            assert!(
                measured.is_ok_and(|row| row.kernel_s > 0.0 && row.bytes_per_s > 0.0),
                "{}",
                case.name
            );
        }
        assert!(measure(&["gellu".into()], 1, false, |_| ()).is_err());
    }
}
