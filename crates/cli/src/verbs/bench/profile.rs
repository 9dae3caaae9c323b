//! `anyformer bench --profile`: what each kernel takes of a training step, beside what the machine can do.

use std::time::Instant;

use anyformer_kernels::machine::{product_peak, triad_peak};
use anyformer_kernels::matmul::Precision;
use anyformer_models::{Input, Model, Target};
use anyformer_ops::profile::record;
use serde::Serialize;

use crate::exit::Failure;
use crate::format::table;

/// What the machine can do at most.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peaks {
    f32_flops_per_s: f64,
    bf16_flops_per_s: f64,
    triad_bytes_per_s: f64,
}

impl Peaks {
    /// Measured now, on the current threads.
    pub fn measure() -> Self {
        Peaks {
            f32_flops_per_s: product_peak(Precision::F32),
            bf16_flops_per_s: product_peak(Precision::Bf16),
            triad_bytes_per_s: triad_peak(),
        }
    }

    /// One line.
    pub fn line(&self) -> String {
        format!(
            "this machine: product of 1,024 x 1,024 matrices {:.0} GFLOP/s in f32, {:.0} in bf16; triad {:.0} GB/s\n",
            self.f32_flops_per_s / 1e9,
            self.bf16_flops_per_s / 1e9,
            self.triad_bytes_per_s / 1e9
        )
    }
}

/// One kernel in one direction, per step.
#[derive(Debug, Serialize)]
pub struct Line {
    kernel: &'static str,
    pass: &'static str,
    calls: f64,
    seconds: f64,
    share: f64,
    /// Absent where the kernel does not count its operations.
    flops_per_s: Option<f64>,
    bytes_per_s: f64,
}

/// The lines of a step, longest first.
#[derive(Debug, Serialize)]
pub struct Profile {
    /// One step, mean over the runs.
    step_s: f64,
    lines: Vec<Line>,
    /// Tensor operations outside of kernels, autodiff and the rest.
    other_s: f64,
}

impl Profile {
    /// Runs `runs` updates after one that is not counted.
    pub fn measure(
        model: &Model,
        input: Input,
        target: Target,
        runs: usize,
    ) -> Result<Self, Failure> {
        let mut step = super::updates(model, input, target);
        step()?;
        let began = Instant::now();
        let (done, taken) = record(|| (0..runs).try_for_each(|_| step()));
        let whole = began.elapsed().as_secs_f64();
        done?;
        let per = runs as f64;
        let mut lines: Vec<Line> = taken
            .iter()
            .map(|((kernel, pass), took)| Line {
                kernel,
                pass: pass.name(),
                calls: took.calls as f64 / per,
                seconds: took.seconds / per,
                share: took.seconds / whole,
                flops_per_s: (took.flops > 0).then_some(took.flops as f64 / took.seconds),
                bytes_per_s: took.bytes as f64 / took.seconds,
            })
            .collect();
        lines.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let seen: f64 = lines.iter().map(|line| line.seconds).sum();
        Ok(Profile {
            step_s: whole / per,
            other_s: whole / per - seen,
            lines,
        })
    }

    /// The table of one step.
    pub fn text(&self, name: &str, length: usize) -> String {
        let mut cells: Vec<Vec<String>> = self
            .lines
            .iter()
            .map(|line| {
                vec![
                    line.kernel.to_string(),
                    line.pass.to_string(),
                    format!("{:.0}", line.calls),
                    format!("{:.2}", line.seconds * 1e3),
                    format!("{:.1} %", line.share * 100.0),
                    line.flops_per_s
                        .map_or("-".into(), |rate| format!("{:.0}", rate / 1e9)),
                    format!("{:.1}", line.bytes_per_s / 1e9),
                ]
            })
            .collect();
        let rest = format!("{:.2}", self.other_s * 1e3);
        let share = format!("{:.1} %", self.other_s / self.step_s * 100.0);
        let none = || "-".to_string();
        cells.push(vec![
            "outside of kernels".into(),
            none(),
            none(),
            rest,
            share,
            none(),
            none(),
        ]);
        let header = ["kernel", "pass", "calls", "ms", "share", "GFLOP/s", "GB/s"];
        format!(
            "\n{name} at {length}: one training step, {:.1} ms\n{}",
            self.step_s * 1e3,
            table(&header, &[2, 3, 4, 5, 6], &cells)
        )
    }
}
