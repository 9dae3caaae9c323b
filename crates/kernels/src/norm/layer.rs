//! Layer norm (Ba et al., 2016) with the biased variance.

use super::{Rows, groups};
use crate::simd::{
    add_partials, block_rows, collect, dispatched, dot, dot3, each, reduction_rows, sum,
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

/// Writes `x - mean` and returns `1 / sqrt(var + eps)`.
#[inline(always)]
fn centre(rows: Rows, x: &[f32], centred: &mut [f32]) -> f32 {
    let mean = sum(x) / rows.dim as f32;
    for (centred, x) in centred.iter_mut().zip(x) {
        *centred = x - mean;
    }
    1.0 / (dot(centred, centred) / rows.dim as f32 + rows.eps).sqrt()
}

/// `y = y r w + b`.
#[inline(always)]
fn affine(r: f32, weight: &[f32], bias: &[f32], y: &mut [f32]) {
    for ((y, w), b) in y.iter_mut().zip(weight).zip(bias) {
        *y = (*y * r).mul_add(*w, *b);
    }
}

#[inline(always)]
fn row_gradient(
    r: f32,
    [mean, along]: [f32; 2],
    centred: &[f32],
    weight: &[f32],
    dy: &[f32],
    dx: &mut [f32],
) {
    for ((dx, c), (w, dy)) in dx.iter_mut().zip(centred).zip(weight.iter().zip(dy)) {
        *dx = r * (dy * w - mean - c * along);
    }
}

#[inline(always)]
fn parameter_gradients(
    r: f32,
    centred: &[f32],
    dy: &[f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    for ((dweight, dbias), (c, dy)) in dweight.iter_mut().zip(dbias).zip(centred.iter().zip(dy)) {
        *dweight += dy * c * r;
        *dbias += dy;
    }
}

dispatched! {
    fn forward_block<'a>(
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
            let r = centre(rows, x, y);
            affine(r, weight, bias, y);
        }
    }
}

dispatched! {
    /// With `x^ = (x - mean) r`: `dx = r (dy w - mean(dy w) - x^ mean(dy w x^))`, `dw += dy x^`, `db += dy`.
    fn backward_block<'a>(
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
        let mut scratch = vec![0.0; dim];
        let centred = &mut scratch[..dim];
        let pairs = x.chunks_exact(dim).zip(dy.chunks_exact(dim));
        for (row, ((x, dy), dx)) in pairs.zip(dx.chunks_exact_mut(dim)).enumerate() {
            let group = (first + row) % groups * dim;
            let weight = &weight[group..][..dim];
            let (dweight, dbias) = (&mut dweight[group..][..dim], &mut dbias[group..][..dim]);
            let r = centre(rows, x, centred);
            let mean = dot(dy, weight) / dim as f32;
            let along = dot3(dy, weight, centred) * r * r / dim as f32;
            row_gradient(r, [mean, along], centred, weight, dy, dx);
            parameter_gradients(r, centred, dy, dweight, dbias);
        }
    }
}
