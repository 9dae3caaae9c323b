//! The backward pass: the sums before SiLU are computed again, nothing but the arguments is needed.
//!
//! With `dz = dy act'(z)`: `dx[t] = sum_j w[j] dz[t + width - 1 - j]`, `dw[j] = sum_t dz[t] x[t - width + 1 + j]`,
//! `dbias = sum_t dz[t]`, and the initial state is input before the first token.

use std::borrow::Cow;

use rayon::prelude::*;

use super::forward::sums;
use super::{Conv, Rows, Segment, cut, segments, transposed, with_width};
use crate::math::sigmoid;
use crate::simd::{add_partials, dispatched};

/// Segments whose weight gradients one task adds up; a fixed number, so that sums do not depend on the threads.
const GROUP: usize = 16;

/// Gradients in the shapes of the arguments.
#[derive(Clone, Debug)]
pub struct Grads {
    /// `[total, channels]`.
    pub x: Vec<f32>,
    /// `[channels, width]`.
    pub weight: Vec<f32>,
    /// `[channels]`, of a bias whether there was one or not.
    pub bias: Vec<f32>,
    /// `[sequences, channels, width - 1]`, of an initial state whether there was one or not.
    pub initial: Vec<f32>,
}

/// Gradients from those of the output, `dy`, and of the final state, where it was used.
pub fn backward(conv: &Conv, dy: &[f32], dlast: Option<&[f32]>) -> Grads {
    conv.check();
    let (channels, width) = (conv.channels, conv.width);
    assert_eq!(dy.len(), conv.x.len(), "conv dy");
    let weight = transposed(conv.weight, channels, width);
    let rows = Rows::new(conv);
    let segments = segments(conv.offsets);
    let dz = match conv.silu {
        true => Cow::Owned(before_silu(conv, &rows, &weight, &segments, dy)),
        false => Cow::Borrowed(dy),
    };
    let mut dx = vec![0.0; conv.x.len()];
    let mut rest = &mut dx[..];
    let mut tasks = Vec::new();
    for group in segments.chunks(GROUP) {
        let count: usize = group.iter().map(|segment| segment.to - segment.from).sum();
        let (head, tail) = rest.split_at_mut(count * channels);
        tasks.push((group, head));
        rest = tail;
    }
    let partial: Vec<Vec<f32>> = tasks
        .into_par_iter()
        .map(|(group, dx)| {
            let mut dw = vec![0.0; (width + 1) * channels];
            group_gradients(conv, &rows, &weight, &dz, group, dx, &mut dw);
            dw
        })
        .collect();
    let mut dw = vec![0.0; (width + 1) * channels];
    add_partials(&mut dw, &partial);
    let initial = edges(conv, &dz, &weight, dlast, &mut dx);
    let bias = dw.split_off(width * channels);
    Grads {
        x: dx,
        weight: transposed(&dw, width, channels),
        bias,
        initial,
    }
}

/// `dy act'(z)`, with z computed again.
fn before_silu(
    conv: &Conv,
    rows: &Rows,
    weight: &[f32],
    segments: &[Segment],
    dy: &[f32],
) -> Vec<f32> {
    let mut dz = vec![0.0; dy.len()];
    let tasks = cut(segments, conv.channels, &mut dz);
    tasks.into_par_iter().for_each(|(segment, dz)| {
        through_silu(conv, rows, weight, segment, dy, dz);
    });
    dz
}

dispatched! {
    /// Fills `dz` for the rows of a segment.
    fn through_silu<'a>(
        conv: &'a Conv<'a>,
        rows: &'a Rows<'a>,
        weight: &'a [f32],
        segment: Segment,
        dy: &'a [f32],
        dz: &'a mut [f32],
    ) {
        for (row, dz) in (segment.from..segment.to).zip(dz.chunks_exact_mut(conv.channels)) {
            with_width!(conv.width, W => {
                sums(rows.taps::<W>(segment.sequence, row), weight, conv.bias, dz)
            });
            let dy = &dy[row * conv.channels..][..conv.channels];
            for (z, dy) in dz.iter_mut().zip(dy) {
                let gate = sigmoid(*z);
                *z = dy * gate * (*z).mul_add(1.0 - gate, 1.0);
            }
        }
    }
}

dispatched! {
    /// Fills `dx` for the rows of a group and adds their shares to `dw`, `[width + 1, channels]`.
    fn group_gradients<'a>(
        conv: &'a Conv<'a>,
        rows: &'a Rows<'a>,
        weight: &'a [f32],
        dz: &'a [f32],
        group: &'a [Segment],
        dx: &'a mut [f32],
        dw: &'a mut [f32],
    ) {
        let mut dx = dx.chunks_exact_mut(conv.channels);
        for segment in group {
            for (row, dx) in (segment.from..segment.to).zip(&mut dx) {
                let sequence = segment.sequence;
                let dz_row = &dz[row * conv.channels..][..conv.channels];
                with_width!(conv.width, W => {
                    weight_gradient(rows.taps::<W>(sequence, row), dz_row, dw);
                    sums(later::<W>(conv, dz, &rows.zeros, sequence, row), weight, None, dx)
                });
            }
        }
    }
}

/// The rows of dz that read input `row`, in the order of the taps; zeros past the end of the sequence.
#[inline(always)]
fn later<'a, const W: usize>(
    conv: &Conv,
    dz: &'a [f32],
    zeros: &'a [f32],
    sequence: usize,
    row: usize,
) -> [&'a [f32]; W] {
    let end = conv.offsets[sequence + 1];
    std::array::from_fn(|j| {
        let reader = row + W - 1 - j;
        if reader < end {
            &dz[reader * conv.channels..][..conv.channels]
        } else {
            zeros
        }
    })
}

/// Adds a row's share to `dw`, `[width + 1, channels]`, the last row being the bias.
#[inline(always)]
fn weight_gradient<const W: usize>(taps: [&[f32]; W], dz: &[f32], dw: &mut [f32]) {
    let channels = dz.len();
    for (tap, dw) in taps.into_iter().zip(dw.chunks_exact_mut(channels)) {
        for ((dw, x), dz) in dw.iter_mut().zip(tap).zip(dz) {
            *dw = x.mul_add(*dz, *dw);
        }
    }
    let dbias = &mut dw[W * channels..][..channels];
    for (sum, dz) in dbias.iter_mut().zip(dz) {
        *sum += dz;
    }
}

/// The gradient of the initial state, and the share of the final state's gradient in `dx`.
fn edges(
    conv: &Conv,
    dz: &[f32],
    weight: &[f32],
    dlast: Option<&[f32]>,
    dx: &mut [f32],
) -> Vec<f32> {
    let (channels, width) = (conv.channels, conv.width);
    let held = width - 1;
    let mut initial = vec![0.0; conv.sequences() * channels * held];
    for (sequence, pair) in conv.offsets.windows(2).enumerate() {
        let (start, len) = (pair[0], pair[1] - pair[0]);
        let at = |c: usize, k: usize| (sequence * channels + c) * held + k;
        // Column k of the state is the input `held - k` tokens before the first; tap j of row t reads it when
        // t + j = k.
        for k in 0..held {
            for t in 0..len.min(k + 1) {
                let tap = &weight[(k - t) * channels..][..channels];
                let dz = &dz[(start + t) * channels..][..channels];
                for c in 0..channels {
                    initial[at(c, k)] += tap[c] * dz[c];
                }
            }
        }
        let Some(dlast) = dlast else { continue };
        for k in 0..held {
            for c in 0..channels {
                match (len + k).checked_sub(held) {
                    Some(t) => dx[(start + t) * channels + c] += dlast[at(c, k)],
                    None => initial[at(c, k + len)] += dlast[at(c, k)],
                }
            }
        }
    }
    initial
}
