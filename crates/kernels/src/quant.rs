//! Products with quantised weights: rows of f32 times a matrix `[out, in]` of 8 or 4 bits per weight.
//!
//! A weight is `scale q`, or `scale q + zero`, with one scale (and zero) for `group` neighbours of a row, both f16. Of 8
//! bits `q` is in -128..=127; of 4 bits it is -8..=7 without zeros and 0..=15 with them. [`Quants`] holds them row by row, as
//! files do; [`Packed`] in the order in which products read them.
//!
//! Weights of 16 bits (f16, bfloat16) may be packed, too: they are read as they are and take half the memory of f32.
//!
//! Four ways to multiply, the first three by [`product`]:
//! - few rows (decoding): every quantised byte is read once and widened in registers; activations stay f32, so that the
//!   result is that of the widened weights;
//! - many rows (a prompt): the weight is widened into the panels that [`crate::matmul`] multiplies; weights and rounded inputs
//!   that are both bfloat16 are multiplied as they are;
//! - 8 bits on both sides (w8a8; Xiao et al., SmoothQuant, 2022, arXiv 2211.10438): each row of activations is rounded to 8
//!   bits with a scale of its own and the sums are those of integers;
//! - [`rounded_product`]: inputs are rounded to 8 bits for every group of the weight, and the sums are those of integers.
#![allow(unsafe_code)]

use std::ops::Range;

use rayon::prelude::*;

use crate::disjoint::Disjoint;
use crate::gemm::Matrix;
#[cfg(target_arch = "x86_64")]
use crate::instructions::Instructions;
use crate::matmul::{self, Precision};

mod brief;
pub mod gptq;
mod packed;
mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod repacked;
pub mod round;
pub mod search;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod wide;

use brief::Scales;
#[cfg(target_arch = "x86_64")]
pub(crate) use packed::Line;
pub use packed::{Bits, Packed, QuantError, Quants};
pub(crate) use packed::{Panel, Rows};

/// Outputs that stand side by side in a [`Packed`] weight.
pub(crate) const LANES: usize = 16;
/// Most rows that are multiplied while a weight is widened once.
const ROWS: usize = 8;
/// Up to this many rows weights are widened in registers.
const FEW: usize = 32;
/// The same where products are those of bfloat16: from here on they are faster than registers of f32.
const FEW_BRIEF: usize = 8;
/// Values of a weight that are widened at once for many rows: 8 MiB.
const BLOCK: usize = 2 << 20;
/// Below this many bytes of weights the threads cost more than they bring.
const PARALLEL: usize = 1 << 16;

/// Which code multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Our loops with AVX-512 (VNNI where inputs are of 8 bits).
    Avx512,
    /// Plain loops, compiled for AVX2 where the machine has it.
    Portable,
}

impl Level {
    /// The fastest that the calling thread may run.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if Instructions::Avx512.usable() && is_x86_feature_detected!("avx512vnni") {
            return Level::Avx512;
        }
        Level::Portable
    }
}

/// `x Wᵀ + bias` for `x [m, in]` and `weight [out, in]`. For many rows the widened operands are rounded as `precision` says.
///
/// Panics when lengths do not fit.
pub fn product(precision: Precision, x: &[f32], weight: &Packed, bias: Option<&[f32]>) -> Vec<f32> {
    product_at(Level::best(), precision, x, weight, bias)
}

/// As [`product`], by the code that `level` names. Panics where the machine lacks it.
pub fn product_at(
    level: Level,
    precision: Precision,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    multiply_at(level, false, precision, x, weight, bias)
}

/// As [`product`], each group of the inputs rounded to 8 bits; weights of 16 bits are multiplied as they are.
pub fn rounded_product(
    precision: Precision,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    multiply_at(Level::best(), true, precision, x, weight, bias)
}

fn multiply_at(
    level: Level,
    rounds: bool,
    precision: Precision,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let [n, k] = weight.shape();
    assert!(
        k > 0 && x.len().is_multiple_of(k),
        "a product of {} values with a weight of {n} x {k}",
        x.len()
    );
    assert!(
        level == Level::Portable || level == Level::best(),
        "this machine lacks AVX-512"
    );
    assert!(
        bias.is_none_or(|bias| bias.len() == n),
        "the bias of a product with a weight of {n} x {k}"
    );
    let m = x.len() / k;
    let mut out = vec![0.0; m * n];
    if m == 0 || n == 0 {
        return out;
    }
    let (values, stride) = weight.prepared(x);
    if weight.brief_inputs {
        brief::multiply(level, Scales::Rows, &values, stride, weight, bias, &mut out);
    } else if rounds && weight.bits.count() < 16 {
        brief::multiply(
            level,
            Scales::Groups,
            &values,
            stride,
            weight,
            bias,
            &mut out,
        );
    } else if m <= few(level, precision) {
        few_rows(level, &values, stride, weight, bias, &mut out);
    } else {
        many_rows(level, precision, &values, stride, weight, bias, &mut out);
    }
    out
}

/// Most rows for which weights are widened in registers.
fn few(level: Level, precision: Precision) -> usize {
    let brief = precision == Precision::Bf16 && level == Level::Avx512;
    match brief && matmul::Level::best(precision) == matmul::Level::Avx512 {
        true => FEW_BRIEF,
        false => FEW,
    }
}

/// Runs `work` for every panel, on the threads where there is enough to read.
fn each_panel(weight: &Packed, rows: usize, work: impl Fn(usize) + Sync) {
    let panels = weight.rows.div_ceil(LANES);
    if 64 * weight.lines.len() * rows.div_ceil(ROWS) < PARALLEL {
        (0..panels).for_each(work);
        return;
    }
    let tasks = 2 * rayon::current_num_threads();
    let each = panels.div_ceil(tasks);
    (0..panels.div_ceil(each))
        .into_par_iter()
        .with_max_len(1)
        .for_each(|task| (task * each..((task + 1) * each).min(panels)).for_each(&work));
}

/// Adds the bias to the sums of a panel for the rows from `first` on, and writes them.
fn give(
    out: &Disjoint,
    n: usize,
    panel: usize,
    first: usize,
    sums: &[[f32; LANES]],
    bias: Option<&[f32]>,
) {
    let columns = panel * LANES..((panel + 1) * LANES).min(n);
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: each panel writes columns of its own, and each call rows of its own.
        let to = unsafe { out.part((first + row) * n + columns.start, columns.len()) };
        to.copy_from_slice(&sums[..columns.len()]);
        if let Some(bias) = bias {
            for (to, bias) in to.iter_mut().zip(&bias[columns.clone()]) {
                *to += bias;
            }
        }
    }
}

/// Fills the outputs of `m` rows: `work` gets a panel of the weight, the rows of a block and their sums, all zero, to fill.
fn each_block(
    weight: &Packed,
    m: usize,
    bias: Option<&[f32]>,
    out: &mut [f32],
    work: impl Fn(Panel, Range<usize>, &mut [[f32; LANES]]) + Sync,
) {
    let out = Disjoint::new(out);
    // As even blocks of rows as there can be.
    let block = m.div_ceil(m.div_ceil(ROWS));
    each_panel(weight, m, |index| {
        for first in (0..m).step_by(block) {
            let rows = first..m.min(first + block);
            let mut sums = [[0.0; LANES]; ROWS];
            let sums = &mut sums[..rows.len()];
            work(weight.panel(index), rows, sums);
            give(&out, weight.rows, index, first, sums, bias);
        }
    });
}

fn few_rows(
    level: Level,
    x: &[f32],
    stride: usize,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let m = x.len() / stride;
    let sums: Vec<f32> = match weight.zeros {
        None => Vec::new(),
        Some(_) => x
            .chunks_exact(stride)
            .flat_map(|row| row.chunks(weight.group).take(weight.groups()))
            .map(|group| group.iter().sum())
            .collect(),
    };
    let groups = weight.groups();
    each_block(weight, m, bias, out, |panel, block, totals| {
        let rows = Rows {
            values: &x[block.start * stride..block.end * stride],
            stride,
            sums: sums
                .get(block.start * groups..block.end * groups)
                .unwrap_or_default(),
        };
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level was checked to run on this machine.
            Level::Avx512 => unsafe { wide::multiply(weight.bits, panel, rows, totals) },
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx512 => unreachable!("levels are checked"),
            Level::Portable => portable::multiply(weight.bits, panel, rows, totals),
        }
    });
}

/// Multiplies with the weight as panels of products pack it, or, without such products, widens blocks of outputs to
/// `[in, outputs]` and multiplies those.
fn many_rows(
    level: Level,
    precision: Precision,
    x: &[f32],
    stride: usize,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (n, k, m) = (weight.rows, weight.columns, x.len() / stride);
    let a = Matrix {
        data: x,
        strides: (stride, 1),
    };
    if level == Level::Avx512 && matmul::brief(precision, m, a, weight, bias, out) {
        return;
    }
    let most = (BLOCK / stride / LANES).max(1) * LANES;
    let width = most.min(n.next_multiple_of(LANES));
    let mut wide = vec![0.0; stride * width];
    for first in (0..n).step_by(width) {
        let count = width.min(n - first);
        let parts = Disjoint::new(&mut wide);
        (0..count.div_ceil(LANES)).into_par_iter().for_each(|at| {
            let panel = weight.panel(first / LANES + at);
            for line in 0..panel.lines.len() {
                let mut values = [[0.0; LANES]; 8];
                portable::widen(weight.bits, panel, line, &mut values);
                let per = weight.bits.per_word();
                for (unit, values) in values[..per].iter().enumerate() {
                    // SAFETY: each panel has columns of its own.
                    let to = unsafe { parts.part((line * per + unit) * width + at * LANES, LANES) };
                    to.copy_from_slice(values);
                }
            }
        });
        let b = Matrix {
            data: &wide,
            strides: (width, 1),
        };
        let bias = bias.map(|bias| &bias[first..first + count]);
        let part = matmul::product(precision, [m, k, count], a, b, bias);
        for (to, from) in out.chunks_exact_mut(n).zip(part.chunks_exact(count)) {
            to[first..first + count].copy_from_slice(from);
        }
    }
}

#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;
