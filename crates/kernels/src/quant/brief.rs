//! Products whose inputs are rounded to 8 bits, so that sums are those of integers.
//!
//! With a scale for every group of the weight, as llama.cpp multiplies its quantised blocks, whose weights may be of 4 bits; or
//! with one scale for a row, as SmoothQuant's w8a8. Less near to the model than inputs in f32: whoever wants it asks for it.

use rayon::prelude::*;

use super::{Bits, Level, PARALLEL, Packed, each_block, portable};
use crate::math::ROUND;
use crate::simd::dispatched;

/// Rounded rows of inputs.
#[derive(Clone, Copy)]
pub(super) struct Brief<'a> {
    /// `[rows, stride]`; for weights of 4 bits those of even columns first, then those of odd ones, in every eight.
    pub(super) bytes: &'a [i8],
    pub(super) stride: usize,
    /// `[rows, groups]`: what a number stands for, the same in a row where it has one scale.
    pub(super) factors: &'a [f32],
    /// `[rows, groups]`: the sums of the numbers.
    pub(super) sums: &'a [i32],
    pub(super) groups: usize,
}

/// What the sum of a group is taken too high for every one of the sum of its inputs: stored numbers are never negative.
pub(super) fn offset(bits: Bits, zeros: bool) -> i32 {
    match (bits, zeros) {
        (Bits::Four, false) => 8,
        (Bits::Four, true) => 0,
        _ => 128,
    }
}

/// What inputs share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    /// Those of a group of the weight.
    Groups,
    /// A row.
    Rows,
}

/// `x [m, stride]` in -127..=127: numbers, and for each group the scale and the sum.
fn rounded(
    scales: Scales,
    x: &[f32],
    stride: usize,
    group: usize,
    groups: usize,
) -> (Vec<i8>, Vec<f32>, Vec<i32>) {
    let rows = x.len() / stride.max(1);
    let mut bytes = vec![0; x.len()];
    let (mut factors, mut sums) = (vec![0.0; rows * groups], vec![0; rows * groups]);
    let parts = x
        .par_chunks_exact(stride)
        .zip(bytes.par_chunks_exact_mut(stride))
        .zip(factors.par_chunks_exact_mut(groups))
        .zip(sums.par_chunks_exact_mut(groups));
    parts
        .with_min_len((PARALLEL / stride).max(1))
        .for_each(|(((x, bytes), factors), sums)| {
            round_row(scales, x, group, bytes, factors, sums)
        });
    (bytes, factors, sums)
}

/// The largest magnitude. As whole numbers magnitudes have the same order, and their largest is found side by side.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let bits = x
        .iter()
        .fold(0, |most, x| (x.to_bits() & 0x7fff_ffff).max(most));
    f32::from_bits(bits)
}

dispatched! {
    fn round_row<'a>(
        scales: Scales,
        x: &'a [f32],
        group: usize,
        bytes: &'a mut [i8],
        factors: &'a mut [f32],
        sums: &'a mut [i32],
    ) {
        let of_row = match scales {
            Scales::Rows => Some(largest(x)),
            Scales::Groups => None,
        };
        let parts = x.chunks(group).zip(bytes.chunks_mut(group));
        for ((x, bytes), (factor, sum)) in parts.zip(factors.iter_mut().zip(sums)) {
            let largest = of_row.unwrap_or_else(|| largest(x));
            // A group of zeros stays one; of one with a number that is none the scale is none.
            let up = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            let mut total = 0i32;
            for (byte, x) in bytes.iter_mut().zip(x) {
                *byte = (x * up + ROUND).to_bits() as i8;
                total += i32::from(*byte);
            }
            *sum = total;
            *factor = largest / 127.0;
        }
    }
}

/// `x Wᵀ + bias` for prepared `x [m, stride]`, rounded; of weights of 8 or 4 bits.
pub(super) fn multiply(
    level: Level,
    scales: Scales,
    x: &[f32],
    stride: usize,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (groups, bits) = (weight.groups(), weight.bits);
    let (mut bytes, factors, sums) = rounded(scales, x, stride, weight.group, groups);
    if bits == Bits::Four {
        for eight in bytes.as_chunks_mut::<8>().0 {
            let [a, b, c, d, e, f, g, h] = *eight;
            *eight = [a, c, e, g, b, d, f, h];
        }
    }
    let m = x.len() / stride;
    each_block(weight, m, bias, out, |panel, block, totals| {
        let of_groups = block.start * groups..block.end * groups;
        let rows = Brief {
            bytes: &bytes[block.start * stride..block.end * stride],
            stride,
            factors: &factors[of_groups.clone()],
            sums: &sums[of_groups],
            groups,
        };
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level was checked to run on this machine.
            Level::Avx512 => unsafe { super::vnni::multiply(bits, panel, rows, totals) },
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx512 => unreachable!("levels are checked"),
            Level::Portable => portable::brief(bits, panel, rows, totals),
        }
    });
}
