//! Norms over the last dimension: RMS norm, its gated forms, L2 normalisation, layer norm.
//!
//! Every array is `[rows, dim]`. A weight holds `dim` values, or `groups * dim`: then row `r` uses the slice of group
//! `r % groups`, so that a norm over groups of channels (Mamba-2 with several groups) or over heads is the same call with
//! more rows. Backwards recompute the statistics of a row from the input and save nothing. Weight gradients are summed
//! over fixed blocks of rows, in order.

mod add;
mod layer;
#[cfg(any(test, fuzzing))]
mod naive;
#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

pub use add::{After, add_norm, add_norm_backward};
pub use layer::{layer_norm, layer_norm_backward};

use std::iter::repeat_with;

use crate::activation::{Pointwise, Silu};
use crate::simd::{
    LANES, add_partials, block_rows, collect, dispatched, dot, each, fold, reduction_rows,
};

/// How a row is normalised: `x / sqrt(sum x^2 / divisor + eps)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows {
    /// Values that are normalised together.
    pub dim: usize,
    /// Added under the root.
    pub eps: f32,
    /// Divides the sum of squares; layer norm does not use it.
    pub divisor: f32,
}

impl Rows {
    /// By the root mean square (Zhang and Sennrich, 2019), or by the deviation in layer norm.
    pub fn mean(dim: usize, eps: f32) -> Self {
        Rows {
            dim,
            eps,
            divisor: dim as f32,
        }
    }

    /// By the Euclidean length: `x / sqrt(sum x^2 + eps)`.
    pub fn length(dim: usize, eps: f32) -> Self {
        Rows {
            dim,
            eps,
            divisor: 1.0,
        }
    }
}

/// Where the gate of a gated RMS norm acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `norm(x silu(z)) w`: Mamba-2.
    BeforeNorm,
    /// `norm(x) w silu(z)`: GLA, Gated DeltaNet.
    AfterNorm,
}

/// `y = x / rms(x) * weight`; no weight stands for ones.
pub fn rms_norm(rows: Rows, x: &[f32], weight: Option<&[f32]>, y: &mut [f32]) {
    forward(rows, x, None, weight, y);
}

/// Gradients of [`rms_norm`]. `dweight` is overwritten.
pub fn rms_norm_backward(
    rows: Rows,
    x: &[f32],
    weight: Option<&[f32]>,
    dy: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    backward(rows, x, None, weight, dy, dx, &mut [], dweight);
}

/// RMS norm with a SiLU gate `z` of the shape of `x`, before or after the norm.
pub fn gated_rms_norm(
    rows: Rows,
    gate: Gate,
    x: &[f32],
    z: &[f32],
    weight: Option<&[f32]>,
    y: &mut [f32],
) {
    assert_eq!(x.len(), z.len(), "gated norm: x and z");
    forward(rows, x, Some((gate, z)), weight, y);
}

/// Gradients of [`gated_rms_norm`]. `dweight` is overwritten.
pub fn gated_rms_norm_backward(
    rows: Rows,
    gate: Gate,
    x: &[f32],
    z: &[f32],
    weight: Option<&[f32]>,
    dy: &[f32],
    dx: &mut [f32],
    dz: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    assert_eq!(x.len(), z.len(), "gated norm: x and z");
    assert_eq!(x.len(), dz.len(), "gated norm: x and dz");
    backward(rows, x, Some((gate, z)), weight, dy, dx, dz, dweight);
}

/// Checks the extents and returns the number of groups of the weight.
fn groups(rows: Rows, x: usize, others: &[usize], weight: usize) -> usize {
    assert!(rows.dim > 0, "norm: dim is zero");
    assert_eq!(x % rows.dim, 0, "norm: {x} values in rows of {}", rows.dim);
    assert!(
        weight > 0 && weight.is_multiple_of(rows.dim),
        "norm: weight of {weight} values for rows of {}",
        rows.dim
    );
    for other in others {
        assert_eq!(x, *other, "norm: lengths differ");
    }
    weight / rows.dim
}

type Gated<'a> = Option<(Gate, &'a [f32])>;

fn part<'a>(gate: Gated<'a>, from: usize, to: usize) -> Gated<'a> {
    gate.map(|(kind, z)| (kind, &z[from..to]))
}

fn forward(rows: Rows, x: &[f32], gate: Gated, weight: Option<&[f32]>, y: &mut [f32]) {
    let ones = vec![1.0; if weight.is_none() { rows.dim } else { 0 }];
    let weight = weight.unwrap_or(&ones);
    groups(rows, x.len(), &[y.len()], weight.len());
    let size = block_rows(rows.dim) * rows.dim;
    let blocks = x.chunks(size).zip(y.chunks_mut(size)).enumerate();
    each(blocks, x.len(), |(index, (x, y))| {
        let start = index * size;
        let gate = part(gate, start, start + x.len());
        forward_block(rows, start / rows.dim, x, gate, weight, y);
    });
}

fn backward(
    rows: Rows,
    x: &[f32],
    gate: Gated,
    weight: Option<&[f32]>,
    dy: &[f32],
    dx: &mut [f32],
    dz: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    let ones = vec![1.0; if weight.is_none() { rows.dim } else { 0 }];
    let weight = weight.unwrap_or(&ones);
    groups(rows, x.len(), &[dy.len(), dx.len()], weight.len());
    let size = reduction_rows(x.len() / rows.dim, rows.dim) * rows.dim;
    // Without a gate dz is empty, and so is each of its parts.
    let dz = dz.chunks_mut(size).chain(repeat_with(Default::default));
    let inputs = x.chunks(size).zip(dy.chunks(size));
    let blocks = inputs.zip(dx.chunks_mut(size).zip(dz)).enumerate();
    let partials = collect(blocks, x.len(), |(index, ((x, dy), (dx, dz)))| {
        let start = index * size;
        let gate = part(gate, start, start + x.len());
        let mut dweight = vec![0.0; weight.len()];
        let first = start / rows.dim;
        backward_block(rows, first, x, gate, weight, dy, dx, dz, &mut dweight);
        dweight
    });
    if let Some(dweight) = dweight {
        assert_eq!(dweight.len(), weight.len(), "norm: weight and its gradient");
        add_partials(dweight, &partials);
    }
}

/// `1 / sqrt(sum x^2 / divisor + eps)`.
#[inline(always)]
fn scale(rows: Rows, x: &[f32]) -> f32 {
    1.0 / (dot(x, x) / rows.divisor + rows.eps).sqrt()
}

// Each loop is a function of its own: LLVM then knows that the slices do not overlap.

/// `y = x r w`.
#[inline(always)]
fn scale_by(r: f32, x: &[f32], weight: &[f32], y: &mut [f32]) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * r * w;
    }
}

/// `y = y r w`.
#[inline(always)]
fn rescale_by(r: f32, weight: &[f32], y: &mut [f32]) {
    for (y, w) in y.iter_mut().zip(weight) {
        *y *= r * w;
    }
}

/// `y = x silu(z)`.
#[inline(always)]
fn gate_by(x: &[f32], z: &[f32], y: &mut [f32]) {
    for ((y, x), z) in y.iter_mut().zip(x).zip(z) {
        *y = x * Silu.value(*z);
    }
}

/// `y = x r w silu(z)`.
#[inline(always)]
fn scale_and_gate(r: f32, x: &[f32], weight: &[f32], z: &[f32], y: &mut [f32]) {
    for ((y, x), (w, z)) in y.iter_mut().zip(x).zip(weight.iter().zip(z)) {
        *y = x * r * w * Silu.value(*z);
    }
}

dispatched! {
    fn forward_block<'a>(
        rows: Rows,
        first: usize,
        x: &'a [f32],
        gate: Option<(Gate, &'a [f32])>,
        weight: &'a [f32],
        y: &'a mut [f32],
    ) {
        let dim = rows.dim;
        let groups = weight.len() / dim;
        for (row, (x, y)) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)).enumerate() {
            let group = (first + row) % groups * dim;
            let weight = &weight[group..][..dim];
            match gate {
                None => scale_by(scale(rows, x), x, weight, y),
                Some((Gate::BeforeNorm, z)) => {
                    gate_by(x, &z[row * dim..][..dim], y);
                    rescale_by(scale(rows, y), weight, y);
                }
                Some((Gate::AfterNorm, z)) => {
                    scale_and_gate(scale(rows, x), x, weight, &z[row * dim..][..dim], y);
                }
            }
        }
    }
}

/// `[sum c c, sum dy w, sum dy w c]` with `c = x - mean`.
#[inline(always)]
fn moments(mean: f32, x: &[f32], weight: &[f32], dy: &[f32]) -> [f32; 3] {
    let mut lanes = [[0.0f32; LANES]; 3];
    let (blocks, rest) = x.as_chunks::<LANES>();
    let (w_blocks, w_rest) = weight.as_chunks::<LANES>();
    let (dy_blocks, dy_rest) = dy.as_chunks::<LANES>();
    for ((x, w), dy) in blocks.iter().zip(w_blocks).zip(dy_blocks) {
        for l in 0..LANES {
            let c = x[l] - mean;
            let g = dy[l] * w[l];
            lanes[0][l] = c.mul_add(c, lanes[0][l]);
            lanes[1][l] += g;
            lanes[2][l] = g.mul_add(c, lanes[2][l]);
        }
    }
    for (l, ((x, w), dy)) in rest.iter().zip(w_rest).zip(dy_rest).enumerate() {
        let (c, g) = (x - mean, dy * w);
        lanes[0][l] = c.mul_add(c, lanes[0][l]);
        lanes[1][l] += g;
        lanes[2][l] = g.mul_add(c, lanes[2][l]);
    }
    [fold(lanes[0]), fold(lanes[1]), fold(lanes[2])]
}

/// With `r` the row's scale: `dx = r (dy w - x r^2 / divisor sum(dy w x))`, `dw += dy x r`.
#[inline(always)]
fn row_backward(
    rows: Rows,
    x: &[f32],
    weight: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
) {
    let [squares, _, along] = moments(0.0, x, weight, dy);
    let r = 1.0 / (squares / rows.divisor + rows.eps).sqrt();
    let along = along * r * r / rows.divisor;
    let dx = dx.iter_mut().zip(dweight);
    for ((dx, dweight), (x, (w, dy))) in dx.zip(x.iter().zip(weight.iter().zip(dy))) {
        *dx = r * (dy * w - x * along);
        *dweight = (dy * r).mul_add(*x, *dweight);
    }
}

/// From the gradient `dx` of `x silu(z)` to those of `x` (in place) and `z`.
#[inline(always)]
fn gate_backward(x: &[f32], z: &[f32], dx: &mut [f32], dz: &mut [f32]) {
    for ((dx, dz), (x, z)) in dx.iter_mut().zip(dz).zip(x.iter().zip(z)) {
        let gradient = *dx;
        *dz = gradient * x * Silu.slope(*z);
        *dx = gradient * Silu.value(*z);
    }
}

/// `dz = dy x r w silu'(z)`.
#[inline(always)]
fn gate_gradient(r: f32, x: &[f32], weight: &[f32], z: &[f32], dy: &[f32], dz: &mut [f32]) {
    let inputs = x.iter().zip(weight).zip(z.iter().zip(dy));
    for (dz, ((x, w), (z, dy))) in dz.iter_mut().zip(inputs) {
        *dz = dy * x * r * w * Silu.slope(*z);
    }
}

dispatched! {
    fn backward_block<'a>(
        rows: Rows,
        first: usize,
        x: &'a [f32],
        gate: Option<(Gate, &'a [f32])>,
        weight: &'a [f32],
        dy: &'a [f32],
        dx: &'a mut [f32],
        dz: &'a mut [f32],
        dweight: &'a mut [f32],
    ) {
        let dim = rows.dim;
        let groups = weight.len() / dim;
        let mut scratch = vec![0.0; dim];
        let scratch = &mut scratch[..dim];
        let pairs = x.chunks_exact(dim).zip(dy.chunks_exact(dim));
        for (row, ((x, dy), dx)) in pairs.zip(dx.chunks_exact_mut(dim)).enumerate() {
            let group = (first + row) % groups * dim;
            let weight = &weight[group..][..dim];
            let dweight = &mut dweight[group..][..dim];
            match gate {
                None => row_backward(rows, x, weight, dy, dx, dweight),
                Some((Gate::BeforeNorm, z)) => {
                    let z = &z[row * dim..][..dim];
                    gate_by(x, z, scratch);
                    row_backward(rows, scratch, weight, dy, dx, dweight);
                    gate_backward(x, z, dx, &mut dz[row * dim..][..dim]);
                }
                Some((Gate::AfterNorm, z)) => {
                    let z = &z[row * dim..][..dim];
                    gate_by(dy, z, scratch);
                    gate_gradient(scale(rows, x), x, weight, z, dy, &mut dz[row * dim..][..dim]);
                    row_backward(rows, x, weight, scratch, dx, dweight);
                }
            }
        }
    }
}
