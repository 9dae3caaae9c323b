//! Products of large matrices over all threads: `out = a b`, optionally onto `out` and with a row of biases.
//!
//! Precision is that of the inputs: [`Precision::F32`], or [`Precision::Bf16`], which rounds both operands to bfloat16
//! (nearest, ties to even) as they are packed and sums in f32. Operands are slices of f32 either way, in any of the
//! layouts that a product and its two gradients need, without a copy beside the packing.
//!
//! On AVX-512 the loops are ours (Goto and van de Geijn, 2008): the left operand is packed into panels of 12 rows, the right
//! one into panels of 32 columns, and a tile of 12 x 32 sums stays in registers over a stretch of the inner dimension. The
//! smaller operand is packed once for all threads; tasks take blocks of the larger one and pack them as they go. A packed unit is 32 bits in both precisions, one f32 or two neighbours of bf16, so that they
//! differ in one instruction. Where one matrix is small (the layers of a narrow model) nothing is packed in f32. Elsewhere the `gemm`
//! crate multiplies. Each sum runs over the inner dimension in an order that
//! depends on the sizes alone, so results are the same for any number of threads.
#![allow(unsafe_code)]

use rayon::prelude::*;

use crate::bf16;
use crate::gemm::{Matrix, span};
#[cfg(target_arch = "x86_64")]
use crate::instructions::Instructions;
use crate::quant::Packed;
use crate::simd::{add_partials, block_rows, collect, dispatched, dot, reduction_rows};

#[cfg(target_arch = "x86_64")]
mod blocked;
mod held;
#[cfg(target_arch = "x86_64")]
mod narrow;
#[cfg(target_arch = "x86_64")]
pub(crate) mod pack;
#[cfg(target_arch = "x86_64")]
mod tile;

#[cfg(target_arch = "x86_64")]
use blocked::Right;
pub use held::Panelled;

/// What the operands of a product are rounded to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// bfloat16: 8 bits of mantissa, the range of f32.
    Bf16,
}

/// Which code multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Our loops with AVX-512 (and AVX512-BF16 for [`Precision::Bf16`]).
    Avx512,
    /// The `gemm` crate, with operands rounded beforehand for [`Precision::Bf16`].
    Portable,
}

impl Level {
    /// The fastest that the calling thread may run.
    pub fn best(precision: Precision) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let wide = Instructions::Avx512.usable();
            let brief = precision == Precision::F32 || is_x86_feature_detected!("avx512bf16");
            if wide && brief {
                return Level::Avx512;
            }
        }
        let _ = precision;
        Level::Portable
    }
}

/// What becomes of the sums.
#[derive(Clone, Copy, Debug, Default)]
pub struct Finish<'a> {
    /// Adds to what `out` holds instead of replacing it.
    pub add: bool,
    /// `[n]`, added to every row.
    pub bias: Option<&'a [f32]>,
}

/// `out = a b` for `a [m, k]`, `b [k, n]` of any strides and contiguous `out [m, n]`.
///
/// Panics when an operand reaches past its slice or `out` or the bias have another size.
pub fn matmul(
    precision: Precision,
    size: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    finish: Finish,
) {
    let [m, k, n] = size;
    if (1..=FEW).contains(&m) && k > 0 && b.strides.0 == 1 && a.strides.1 == 1 {
        check(size, a, b, out.len(), finish);
        few_rows(precision, [m, k, n], a, b, out, finish);
        return;
    }
    check(size, a, b, out.len(), finish);
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::F32 && Level::best(precision) == Level::Avx512 {
        // SAFETY: sizes were checked, AVX-512 as well; `out` is ours.
        if unsafe { narrow::multiply(size, a, b, out.as_mut_ptr(), finish) } {
            return;
        }
    }
    matmul_at(Level::best(precision), precision, size, a, b, out, finish);
}

fn check([m, k, n]: [usize; 3], a: Matrix, b: Matrix, out: usize, finish: Finish) {
    assert!(
        span(m, k, a.strides) <= a.data.len() && span(k, n, b.strides) <= b.data.len(),
        "a product reaches past its operands"
    );
    assert_eq!(out, m * n, "the output of a product of {m} x {n}");
    if let Some(bias) = finish.bias {
        assert_eq!(bias.len(), n, "the bias of a product of {m} x {n}");
    }
}

/// As [`matmul`], by the code that `level` names. Panics where the machine lacks it.
pub fn matmul_at(
    level: Level,
    precision: Precision,
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    finish: Finish,
) {
    check([m, k, n], a, b, out.len(), finish);
    if k == 0 || out.is_empty() {
        begin(n, out, finish);
        return;
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => {
            assert_eq!(
                Level::best(precision),
                Level::Avx512,
                "this machine lacks AVX-512"
            );
            // SAFETY: sizes were checked, AVX-512 as well; `out` is ours.
            unsafe {
                let right = Right::Matrix(b);
                blocked::multiply(
                    precision,
                    [m, k, n],
                    a,
                    right,
                    out.as_mut_ptr(),
                    finish,
                    None,
                );
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Level::Avx512 => panic!("this machine lacks AVX-512"),
        Level::Portable => portable(precision, [m, k, n], a, b, out, finish),
    }
}

/// A new `a b`, with a row of biases where one is given; arguments as of [`matmul`].
pub fn product(
    precision: Precision,
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let finish = Finish {
        bias,
        ..Finish::default()
    };
    #[cfg(target_arch = "x86_64")]
    if k > 0 && m > FEW && Level::best(precision) == Level::Avx512 {
        check([m, k, n], a, b, m * n, finish);
        let mut out = Vec::with_capacity(m * n);
        // SAFETY: sizes were checked, AVX-512 as well; without `add` nothing is read from `out`, and every element of it is
        // written.
        unsafe {
            let to = out.as_mut_ptr();
            if precision != Precision::F32 || !narrow::multiply([m, k, n], a, b, to, finish) {
                let right = Right::Matrix(b);
                blocked::multiply(precision, [m, k, n], a, right, to, finish, None);
            }
            out.set_len(m * n);
        }
        return out;
    }
    let mut out = vec![0.0; m * n];
    matmul(precision, [m, k, n], a, b, &mut out, finish);
    out
}

/// `out = a Wᵀ`, and the bias, for a weight `[n, k]` of few bits, which is widened as it is packed; factors of inputs are left out.
/// Returns whether this machine has such a product.
pub(crate) fn brief(
    precision: Precision,
    m: usize,
    a: Matrix,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if Level::best(precision) == Level::Avx512 {
        let [n, k] = weight.shape();
        let finish = Finish { add: false, bias };
        assert!(
            span(m, k, a.strides) <= a.data.len(),
            "a product reaches past its operand"
        );
        assert!(
            out.len() == m * n && bias.is_none_or(|bias| bias.len() == n),
            "the output of a product of {m} x {n}"
        );
        let right = Right::Brief(weight);
        // SAFETY: sizes were checked, AVX-512 as well; `out` is ours.
        unsafe {
            blocked::multiply(
                precision,
                [m, k, n],
                a,
                right,
                out.as_mut_ptr(),
                finish,
                None,
            )
        };
        return true;
    }
    let _ = (precision, m, a, weight, bias, out);
    false
}

/// Up to this many rows are multiplied without packing: the right operand is read once, which then is what takes the time.
const FEW: usize = 8;

/// [`matmul`] of few rows by a matrix whose columns are contiguous, as the weight of a linear layer.
fn few_rows(
    precision: Precision,
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    finish: Finish,
) {
    let left: Vec<f32> = match precision {
        Precision::F32 => (0..m)
            .flat_map(|i| a.data[i * a.strides.0..][..k].iter().copied())
            .collect(),
        Precision::Bf16 => rounded(m, k, a),
    };
    // One value of each row beside its neighbours in a column, so that tasks write apart.
    let columns = block_rows(k);
    let parts = collect((0..n).step_by(columns), n * k, |first| {
        let last = (first + columns).min(n);
        let mut part = vec![0.0; m * (last - first)];
        let right = &b.data[first * b.strides.1..];
        few_columns(precision, [m, k], &left, right, b.strides.1, &mut part);
        part
    });
    for (part, first) in parts.iter().zip((0..n).step_by(columns)) {
        for (j, sums) in part.chunks_exact(m).enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                let to = &mut out[i * n + first + j];
                let held = if finish.add { *to } else { 0.0 };
                *to = held + sum + finish.bias.map_or(0.0, |bias| bias[first + j]);
            }
        }
    }
}

dispatched! {
    /// `part [columns, m]`: each column of `right` with each row of `left`.
    fn few_columns<'a>(
        precision: Precision,
        sizes: [usize; 2],
        left: &'a [f32],
        right: &'a [f32],
        stride: usize,
        part: &'a mut [f32],
    ) {
        let [m, k] = sizes;
        let mut brief = match precision {
            Precision::F32 => Vec::new(),
            Precision::Bf16 => vec![0.0; k],
        };
        for (j, sums) in part.chunks_exact_mut(m).enumerate() {
            let mut column = &right[j * stride..][..k];
            if precision == Precision::Bf16 {
                for (to, from) in brief.iter_mut().zip(column) {
                    *to = bf16::to_f32(bf16::round(*from));
                }
                column = &brief;
            }
            for (sum, row) in sums.iter_mut().zip(left.chunks_exact(k)) {
                *sum = dot(row, column);
            }
        }
    }
}

/// The sum of the rows of `x [rows, width]`: the gradient of a bias.
pub fn column_sums(x: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    if x.is_empty() {
        return sums;
    }
    assert!(
        x.len().is_multiple_of(width),
        "column sums: {} values in rows of {width}",
        x.len()
    );
    let rows = reduction_rows(x.len() / width, width);
    let partials = collect(x.chunks(rows * width), x.len(), |x| {
        let mut sums = vec![0.0; width];
        add_rows(x, &mut sums);
        sums
    });
    add_partials(&mut sums, &partials);
    sums
}

dispatched! {
    fn add_rows<'a>(x: &'a [f32], sums: &'a mut [f32]) {
        for row in x.chunks_exact(sums.len()) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}

/// What `out` holds before anything is summed onto it.
fn begin(n: usize, out: &mut [f32], finish: Finish) {
    if out.is_empty() {
        return;
    }
    if !finish.add {
        out.fill(0.0);
    }
    if let Some(bias) = finish.bias {
        for row in out.chunks_exact_mut(n) {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value += bias;
            }
        }
    }
}

/// The matrix rounded, contiguous rows.
fn rounded(rows: usize, columns: usize, matrix: Matrix) -> Vec<f32> {
    let (down, across) = matrix.strides;
    (0..rows)
        .into_par_iter()
        .flat_map_iter(|i| (0..columns).map(move |j| matrix.data[i * down + j * across]))
        .map(|value| bf16::to_f32(bf16::round(value)))
        .collect()
}

fn portable(
    precision: Precision,
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    finish: Finish,
) {
    if precision == Precision::Bf16 {
        let (a, b) = (rounded(m, k, a), rounded(k, n, b));
        let (a, b) = (Matrix::rows(&a, k), Matrix::rows(&b, n));
        return portable(Precision::F32, [m, k, n], a, b, out, finish);
    }
    let sums_onto = finish.add || finish.bias.is_some();
    if sums_onto {
        begin(n, out, finish);
    }
    let threads = match m * k * n < 128 * 128 * 128 {
        true => gemm::Parallelism::None,
        false => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the caller checked that every element lies within its slice; `out` is borrowed mutably, so it overlaps
    // neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            sums_onto,
            a.data.as_ptr(),
            a.strides.1 as isize,
            a.strides.0 as isize,
            b.data.as_ptr(),
            b.strides.1 as isize,
            b.strides.0 as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            threads,
        );
    }
}

#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;
