//! Layer norm (Ba et al., 2016) with the biased variance.

use super::{Rows, groups, moments};
use crate::simd::{
    LANES, add_partials, block_rows, collect, dispatched, each, fold, reduction_rows, sum,
};

/// `y = (x - mean) / sqrt(var + eps) * weight + bias`; no weight stands for ones, no bias for zeros.
pub fn layer_norm(
    rows: Rows,
    x: &[f32],
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let dim = rows.dim;
    let ones = vec![1.0; if weight.is_none() { dim } else { 0 }];
    let weight = weight.unwrap_or(&ones);
    let zeros = vec![0.0; if bias.is_none() { weight.len() } else { 0 }];
    let bias = bias.unwrap_or(&zeros);
    assert_eq!(weight.len(), bias.len(), "layer norm: weight and bias");
    groups(rows, x.len(), &[y.len()], weight.len());
    let size = block_rows(dim) * dim;
    let blocks = x.chunks(size).zip(y.chunks_mut(size)).enumerate();
    each(blocks, x.len(), |(index, (x, y))| {
        forward_block(rows, index * size / dim, x, weight, bias, y);
    });
}

/// Gradients of [`layer_norm`]. `dweight` and `dbias` are overwritten.
pub fn layer_norm_backward(
    rows: Rows,
    x: &[f32],
    weight: Option<&[f32]>,
    dy: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    let dim = rows.dim;
    // A bias of a grouped norm without weight has as many groups as its gradient has.
    let bias_len = dbias.as_ref().map_or(dim, |dbias| dbias.len());
    let ones = vec![1.0; if weight.is_none() { bias_len } else { 0 }];
    let weight = weight.unwrap_or(&ones);
    groups(rows, x.len(), &[dy.len(), dx.len()], weight.len());
    let size = reduction_rows(x.len() / dim, dim) * dim;
    let inputs = x.chunks(size).zip(dy.chunks(size));
    let blocks = inputs.zip(dx.chunks_mut(size)).enumerate();
    let partials = collect(blocks, x.len(), |(index, ((x, dy), dx))| {
        let (mut dweight, mut dbias) = (vec![0.0; weight.len()], vec![0.0; weight.len()]);
        let first = index * size / dim;
        backward_block(rows, first, x, weight, dy, dx, &mut dweight, &mut dbias);
        (dweight, dbias)
    });
    let (weights, biases): (Vec<_>, Vec<_>) = partials.into_iter().unzip();
    for (total, partials) in [(dweight, weights), (dbias, biases)] {
        if let Some(total) = total {
            assert_eq!(total.len(), weight.len(), "layer norm: parameter gradient");
            add_partials(total, &partials);
        }
    }
}

/// `sum (x - mean)^2`.
#[inline(always)]
fn spread(mean: f32, x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for l in 0..LANES {
            let c = block[l] - mean;
            lanes[l] = c.mul_add(c, lanes[l]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = (x - mean).mul_add(x - mean, *lane);
    }
    fold(lanes)
}

/// `y = (x - mean) r w + b`.
#[inline(always)]
fn affine(mean: f32, r: f32, x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
    for ((y, x), (w, b)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
        *y = ((x - mean) * r).mul_add(*w, *b);
    }
}

/// `dx = r (dy w - m - c a)`, `dw += dy c r`, `db += dy`, with `c = x - mean`.
#[inline(always)]
fn gradients(
    [mean, r, m, a]: [f32; 4],
    x: &[f32],
    weight: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let outputs = dx.iter_mut().zip(dweight.iter_mut().zip(dbias));
    let inputs = x.iter().zip(weight.iter().zip(dy));
    for ((dx, (dweight, dbias)), (x, (w, dy))) in outputs.zip(inputs) {
        let c = x - mean;
        *dx = r * (dy * w - m - c * a);
        *dweight = (dy * r).mul_add(c, *dweight);
        *dbias += dy;
    }
}

dispatched! {
    pub(super) fn forward_block<'a>(
        rows: Rows,
        first: usize,
        x: &'a [f32],
        weight: &'a [f32],
        bias: &'a [f32],
        y: &'a mut [f32],
    ) {
        let dim = rows.dim;
        let groups = weight.len() / dim;
        for (row, (x, y)) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)).enumerate() {
            let group = (first + row) % groups * dim;
            let (weight, bias) = (&weight[group..][..dim], &bias[group..][..dim]);
            let mean = sum(x) / dim as f32;
            let r = 1.0 / (spread(mean, x) / dim as f32 + rows.eps).sqrt();
            affine(mean, r, x, weight, bias, y);
        }
    }
}

dispatched! {
    /// With `x^ = (x - mean) r`: `dx = r (dy w - mean(dy w) - x^ mean(dy w x^))`, `dw += dy x^`, `db += dy`.
    pub(super) fn backward_block<'a>(
        rows: Rows,
        first: usize,
        x: &'a [f32],
        weight: &'a [f32],
        dy: &'a [f32],
        dx: &'a mut [f32],
        dweight: &'a mut [f32],
        dbias: &'a mut [f32],
    ) {
        let dim = rows.dim;
        let groups = weight.len() / dim;
        let pairs = x.chunks_exact(dim).zip(dy.chunks_exact(dim));
        for (row, ((x, dy), dx)) in pairs.zip(dx.chunks_exact_mut(dim)).enumerate() {
            let group = (first + row) % groups * dim;
            let weight = &weight[group..][..dim];
            let (dweight, dbias) = (&mut dweight[group..][..dim], &mut dbias[group..][..dim]);
            let mean = sum(x) / dim as f32;
            let [squares, m, along] = moments(mean, x, weight, dy);
            let r = 1.0 / (squares / dim as f32 + rows.eps).sqrt();
            let a = along * r * r / dim as f32;
            gradients([mean, r, m / dim as f32, a], x, weight, dy, dx, dweight, dbias);
        }
    }
}
