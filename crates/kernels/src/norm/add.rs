//! A residual sum and its norm in one pass over memory: `s = x + r`, `y = norm(s)`, and back.
//!
//! Every bit is that of the sum and the norm one after the other; they are taken block by block, so that the norm finds the
//! sum in the cache, and the gradient that comes past the norm is added while that of the norm is there.

use super::{Rows, groups, layer};
use crate::simd::{add_partials, block_rows, collect, dispatched, each, reduction_rows};

/// The norm after the sum.
#[derive(Clone, Copy, Debug)]
pub struct After<'a> {
    /// How a row is normalised.
    pub rows: Rows,
    /// `[dim]`.
    pub weight: &'a [f32],
    /// `[dim]`: layer norm; none: RMS norm.
    pub bias: Option<&'a [f32]>,
}

/// `s = x + r` and `y = norm(s)`.
///
/// Panics when lengths do not fit.
pub fn add_norm(after: After, x: &[f32], r: &[f32], s: &mut [f32], y: &mut [f32]) {
    let After { rows, weight, bias } = after;
    groups(rows, x.len(), &[r.len(), s.len(), y.len()], weight.len());
    assert!(
        bias.is_none_or(|bias| bias.len() == weight.len()),
        "norm: bias"
    );
    let size = block_rows(rows.dim) * rows.dim;
    let inputs = x.chunks(size).zip(r.chunks(size));
    let outputs = s.chunks_mut(size).zip(y.chunks_mut(size));
    each(
        inputs.zip(outputs).enumerate(),
        x.len(),
        |(index, ((x, r), (s, y)))| {
            add_to(x, r, s);
            let first = index * size / rows.dim;
            match bias {
                None => super::forward_block(rows, first, s, None, weight, y),
                Some(bias) => layer::forward_block(rows, first, s, weight, bias, y),
            }
        },
    );
}

/// The gradient of `x`, which is that of `r`, from those of `s` and `y`; `dweight` and `dbias` are overwritten.
pub fn add_norm_backward(
    after: After,
    s: &[f32],
    ds: Option<&[f32]>,
    dy: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let After { rows, weight, bias } = after;
    let dim = rows.dim;
    groups(rows, s.len(), &[dy.len(), dx.len()], weight.len());
    assert!(
        ds.is_none_or(|ds| ds.len() == s.len()),
        "norm: lengths differ"
    );
    let size = reduction_rows(s.len() / dim, dim) * dim;
    let piece = block_rows(dim) * dim;
    let inputs = s.chunks(size).zip(dy.chunks(size));
    let blocks = inputs.zip(dx.chunks_mut(size)).enumerate();
    let partials = collect(blocks, s.len(), |(index, ((s, dy), dx))| {
        let (mut dweight, mut dbias) = (vec![0.0; weight.len()], vec![0.0; weight.len()]);
        let pieces = s.chunks(piece).zip(dy.chunks(piece));
        for (part, ((s, dy), dx)) in pieces.zip(dx.chunks_mut(piece)).enumerate() {
            let start = index * size + part * piece;
            let first = start / dim;
            match bias {
                None => super::backward_block(
                    rows,
                    first,
                    s,
                    None,
                    weight,
                    dy,
                    dx,
                    &mut [],
                    &mut dweight,
                ),
                Some(_) => {
                    layer::backward_block(rows, first, s, weight, dy, dx, &mut dweight, &mut dbias)
                }
            }
            if let Some(ds) = ds {
                add_onto(&ds[start..start + dx.len()], dx);
            }
        }
        (dweight, dbias)
    });
    let (weights, biases): (Vec<_>, Vec<_>) = partials.into_iter().unzip();
    assert_eq!(dweight.len(), weight.len(), "norm: gradient of the weight");
    add_partials(dweight, &weights);
    if let Some(dbias) = dbias {
        assert_eq!(dbias.len(), weight.len(), "norm: gradient of the bias");
        add_partials(dbias, &biases);
    }
}

dispatched! {
    fn add_to<'a>(x: &'a [f32], r: &'a [f32], s: &'a mut [f32]) {
        for (s, (x, r)) in s.iter_mut().zip(x.iter().zip(r)) {
            *s = x + r;
        }
    }
}

dispatched! {
    fn add_onto<'a>(from: &'a [f32], to: &'a mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    }
}
