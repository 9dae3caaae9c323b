//! Loops over rows of features: sums along a row, and rows with a number each.
//!
//! Rows are taken [`LANES`] values at a time, so that a row of a narrow head is an instruction or two. Numbers of a row and
//! what is written are copied first: behind a reference the compiler would read them again after each value that it writes.

use crate::math::exp;
use crate::simd::{dispatched, max, sum};

/// Values that are taken at a time.
pub(super) const LANES: usize = 16;

dispatched! {
    /// Each row of `dim` values times its factor.
    pub(super) fn scale<'a>(rows: &'a mut [f32], dim: usize, factors: &'a [f32]) {
        for (row, factor) in rows.chunks_exact_mut(dim).zip(factors) {
            let factor = *factor;
            let (lanes, rest) = row.as_chunks_mut::<LANES>();
            for lanes in lanes {
                for value in lanes {
                    *value *= factor;
                }
            }
            for value in rest {
                *value *= factor;
            }
        }
    }
}

dispatched! {
    /// `to += factor from`, row by row of `dim` values.
    pub(super) fn add<'a>(to: &'a mut [f32], dim: usize, from: &'a [f32], factors: &'a [f32]) {
        let rows = to.chunks_exact_mut(dim).zip(from.chunks_exact(dim));
        for ((to, from), factor) in rows.zip(factors) {
            let factor = *factor;
            let (lanes, rest) = to.as_chunks_mut::<LANES>();
            let (from_lanes, from_rest) = from.as_chunks::<LANES>();
            for (to, from) in lanes.iter_mut().zip(from_lanes) {
                let mut own = *to;
                for l in 0..LANES {
                    own[l] = factor.mul_add(from[l], own[l]);
                }
                *to = own;
            }
            for (to, from) in rest.iter_mut().zip(from_rest) {
                *to = factor.mul_add(*from, *to);
            }
        }
    }
}

dispatched! {
    /// Adds `factor from` to each row.
    pub(super) fn add_row<'a>(rows: &'a mut [f32], factor: f32, from: &'a [f32]) {
        for row in rows.chunks_exact_mut(from.len()) {
            for (to, from) in row.iter_mut().zip(from) {
                *to = factor.mul_add(*from, *to);
            }
        }
    }
}

dispatched! {
    /// Adds each row to `sums`.
    pub(super) fn total<'a>(rows: &'a [f32], sums: &'a mut [f32]) {
        for row in rows.chunks_exact(sums.len()) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}

dispatched! {
    /// `dphi = (dphi + through z) inverse` for rows of `width` values with two numbers each; `z` are the rows of the first token.
    pub(super) fn divide<'a>(
        dphi: &'a mut [f32],
        width: usize,
        z: &'a [f32],
        through: &'a [f32],
        inverse: &'a [f32],
    ) {
        let numbers = through.iter().zip(inverse);
        let rows = dphi.chunks_exact_mut(width).zip(z.chunks_exact(width).cycle());
        for ((row, z), (through, inverse)) in rows.zip(numbers) {
            let (through, inverse) = (*through, *inverse);
            let (lanes, rest) = row.as_chunks_mut::<LANES>();
            let (z_lanes, z_rest) = z.as_chunks::<LANES>();
            for (row, z) in lanes.iter_mut().zip(z_lanes) {
                let mut own = *row;
                for l in 0..LANES {
                    own[l] = through.mul_add(z[l], own[l]) * inverse;
                }
                *row = own;
            }
            for (value, z) in rest.iter_mut().zip(z_rest) {
                *value = through.mul_add(*z, *value) * inverse;
            }
        }
    }
}

dispatched! {
    /// `phi *= inverse`, then `sums += through phi`, for rows of `width` values; `sums` are as the rows of one token.
    pub(super) fn weigh<'a>(
        phi: &'a mut [f32],
        width: usize,
        inverse: &'a [f32],
        through: &'a [f32],
        sums: &'a mut [f32],
    ) {
        let heads = sums.len() / width;
        let tokens = phi.chunks_exact_mut(sums.len());
        let numbers = inverse.chunks_exact(heads).zip(through.chunks_exact(heads));
        for (token, (inverse, through)) in tokens.zip(numbers) {
            let rows = token.chunks_exact_mut(width).zip(sums.chunks_exact_mut(width));
            for ((row, sums), (inverse, through)) in rows.zip(inverse.iter().zip(through)) {
                let (inverse, through) = (*inverse, *through);
                let (lanes, rest) = row.as_chunks_mut::<LANES>();
                let (sum_lanes, sum_rest) = sums.as_chunks_mut::<LANES>();
                for (row, sums) in lanes.iter_mut().zip(sum_lanes) {
                    let (mut own, mut all) = (*row, *sums);
                    for l in 0..LANES {
                        own[l] *= inverse;
                        all[l] = through.mul_add(own[l], all[l]);
                    }
                    (*row, *sums) = (own, all);
                }
                for (value, sum) in rest.iter_mut().zip(sum_rest) {
                    *value *= inverse;
                    *sum = through.mul_add(*value, *sum);
                }
            }
        }
    }
}

/// How many of the lanes of a vector of a row are features, or more.
#[inline(always)]
fn there(features: usize, vector: usize) -> i32 {
    features.saturating_sub(vector * LANES) as i32
}

dispatched! {
    /// The largest of the first `features` values of each row, of which there are whole [`LANES`].
    pub(super) fn largest<'a>(
        phi: &'a [f32],
        width: usize,
        features: usize,
        most: &'a mut [f32],
    ) {
        for (row, most) in phi.chunks_exact(width).zip(most) {
            let mut lanes = [f32::NEG_INFINITY; 2 * LANES];
            for (index, values) in row.as_chunks::<LANES>().0.iter().enumerate() {
                let there = there(features, index);
                for l in 0..LANES {
                    let larger = values[l] > lanes[l] && (l as i32) < there;
                    lanes[l] = if larger { values[l] } else { lanes[l] };
                }
            }
            *most = max(&lanes);
        }
    }
}

dispatched! {
    /// `phi = factor (exp(phi - base) + eps)` for the first `features` values of each row, zero for the others.
    pub(super) fn exponentials<'a>(
        phi: &'a mut [f32],
        width: usize,
        features: usize,
        base: &'a [f32],
        eps: f32,
        factor: f32,
    ) {
        for (row, base) in phi.chunks_exact_mut(width).zip(base) {
            let base = *base;
            for (index, values) in row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let there = there(features, index);
                for l in 0..LANES {
                    let value = factor * (exp(values[l] - base) + eps);
                    values[l] = if (l as i32) < there { value } else { 0.0 };
                }
            }
        }
    }
}

dispatched! {
    /// Gradients of features become those of exponents: `dphi (phi - least)` for the first `features` values of each row, zero
    /// for the others; `sums` are those of the rows.
    pub(super) fn exponentials_back<'a>(
        phi: &'a [f32],
        dphi: &'a mut [f32],
        width: usize,
        features: usize,
        least: f32,
        sums: &'a mut [f32],
    ) {
        let rows = phi.chunks_exact(width).zip(dphi.chunks_exact_mut(width));
        for ((phi, dphi), total) in rows.zip(sums) {
            let mut lanes = [0.0; 2 * LANES];
            let phi = phi.as_chunks::<LANES>().0.iter();
            for (index, (phi, dphi)) in phi.zip(dphi.as_chunks_mut::<LANES>().0).enumerate() {
                let there = there(features, index);
                let mut own = *dphi;
                for l in 0..LANES {
                    let value = own[l] * (phi[l] - least);
                    own[l] = if (l as i32) < there { value } else { 0.0 };
                    lanes[l] += own[l];
                }
                *dphi = own;
            }
            *total = sum(&lanes);
        }
    }
}
