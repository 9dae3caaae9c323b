//! `anyformer bench --ops`: each op alone, forward and backward, as a kernel and composed out of tensor operations.

use anyformer_kernels::memory;
use anyformer_lab::units::{bytes, seconds};
use anyformer_ops::profile::record;
use anyformer_ops::{Device, Tensor, portable};
use serde::Serialize;

use super::cases::{Case, cases};
use super::median;
use super::profile::Peaks;
use crate::exit::{Failure, bad_input};
use crate::format::table;

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
