//! A few rows against many keys: dot products, no blocks of rows to fill.
//!
//! The keys of a sequence are cut into pieces of [`PIECE`], whatever the number of threads, and the partial results are
//! joined in order, so that one sequence with few heads keeps all cores busy (Sanovar et al., arXiv 2405.10480). Within
//! a piece the heads take turns at each block of keys, which is read once and in order.

use rayon::prelude::*;

use super::block::Tile;
use super::forward::Shared;
use super::{Attention, Group, KEYS, merge};
use crate::gemm::{Matrix, dots, product};
use crate::math::exp;
use crate::simd::{dispatched, max};

/// Most rows of a group handled this way.
pub(super) const ROWS: usize = 4;
/// Keys of a piece.
const PIECE: usize = 8 * KEYS;
const LANES: usize = 16;

/// Running sums of all rows of a sequence over a piece of its keys.
struct Partial {
    /// `[queries, heads, value_dim]`.
    o: Vec<f32>,
    /// `[queries, heads]`.
    largest: Vec<f32>,
    sum: Vec<f32>,
}

/// Sequences given by the groups of their key heads.
pub(super) fn forward(
    attention: &Attention,
    sequences: &[&[Group]],
    shared: &Shared,
    parallel: bool,
) {
    let mut pieces = Vec::new();
    for &groups in sequences {
        let mut bounds = (usize::MAX, 0);
        for query in 0..groups[0].queries {
            let position = attention.position(&groups[0], query * attention.fold());
            let (low, high) = attention.mask.allowed(position, groups[0].keys);
            bounds = (bounds.0.min(low), bounds.1.max(high));
        }
        // Pieces begin where pages do.
        let starts = (bounds.0 / KEYS * KEYS..bounds.1).step_by(PIECE);
        pieces.extend(starts.map(|from| (groups, from, bounds.1.min(from + PIECE))));
    }
    let run = |&(groups, from, to): &(&[Group], usize, usize)| piece(attention, groups, from, to);
    let partials: Vec<(Vec<f32>, Vec<f32>)> = match parallel {
        true => pieces.par_iter().with_max_len(1).map(run).collect(),
        false => pieces.iter().map(run).collect(),
    };
    let mut joined: Option<(usize, Vec<f32>, Vec<f32>)> = None;
    let finish = |joined: Option<(usize, Vec<f32>, Vec<f32>)>| {
        let Some((first_query, o, lse)) = joined else {
            return;
        };
        for (row, (o, lse)) in o.chunks_exact(attention.value_dim).zip(lse).enumerate() {
            shared.write(first_query * attention.heads + row, o, lse);
        }
    };
    for ((groups, ..), (o, lse)) in pieces.iter().zip(partials) {
        let first_query = groups[0].first_query;
        match &mut joined {
            Some((query, sum, sum_lse)) if *query == first_query => {
                merge((sum, sum_lse), (&o, &lse));
            }
            _ => finish(joined.replace((first_query, o, lse))),
        }
    }
    finish(joined);
}

/// `(o, lse)` of all rows over the keys `from..to`.
fn piece(attention: &Attention, groups: &[Group], from: usize, to: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = groups[0].queries * attention.heads;
    let mut partial = Partial {
        o: vec![0.0; rows * attention.value_dim],
        largest: vec![f32::NEG_INFINITY; rows],
        sum: vec![0.0; rows],
    };
    let mut wide = vec![0.0; attention.wide_block()];
    for start in (from..to).step_by(KEYS) {
        let keys = (start, to.min(start + KEYS));
        for group in groups {
            tile(attention, group, keys, &mut partial, &mut wide);
        }
    }
    let Partial {
        mut o,
        mut largest,
        sum,
    } = partial;
    for (row, (largest, sum)) in largest.iter_mut().zip(sum).enumerate() {
        if sum > 0.0 {
            let inverse = 1.0 / sum;
            o[row * attention.value_dim..][..attention.value_dim]
                .iter_mut()
                .for_each(|o| *o *= inverse);
            *largest += sum.ln();
        }
    }
    (o, largest)
}

/// Adds the keys `from..to` to the sums of a group's rows, all rows together: each key and value is read once.
fn tile(
    attention: &Attention,
    group: &Group,
    (from, to): (usize, usize),
    partial: &mut Partial,
    wide: &mut [f32],
) {
    let (head_dim, value_dim) = (attention.head_dim, attention.value_dim);
    let (fold, keys) = (attention.fold(), to - from);
    let rows = group.queries * fold;
    let mut scores = [0.0; KEYS * ROWS];
    let mut q: [&[f32]; ROWS] = [&[]; ROWS];
    for (row, q) in q.iter_mut().enumerate().take(rows) {
        *q = &attention.q[attention.row(group, row) * head_dim..][..head_dim];
    }
    let (k, k_stride) = attention.keys(group, Tile::range(from, to), wide);
    dots(&q[..rows], k, k_stride, keys, &mut scores, KEYS);
    for (row, scores) in scores.chunks_exact_mut(KEYS).enumerate().take(rows) {
        let index = attention.row(group, row);
        let at = index - group.first_query * attention.heads;
        let position = attention.position(group, row);
        let (low, high) = attention.mask.allowed(position, group.keys);
        soften(
            Row {
                scale: attention.scale,
                slope: attention
                    .alibi
                    .map_or(0.0, |slopes| slopes[index % attention.heads]),
                distance: (position - from as isize) as f32,
                allowed: (low.clamp(from, to) - from, high.clamp(from, to) - from),
            },
            &mut scores[..keys],
            &mut partial.largest[at],
            &mut partial.sum[at],
            &mut partial.o[at * value_dim..][..value_dim],
        );
    }
    let (v, v_stride) = attention.values(group, Tile::range(from, to), wide);
    let values = Matrix {
        data: v,
        strides: (v_stride, 1),
    };
    for query in 0..group.queries {
        let p = Matrix::rows(&scores[query * fold * KEYS..], KEYS);
        let at = attention.row(group, query * fold) - group.first_query * attention.heads;
        let o = &mut partial.o[at * value_dim..];
        product(
            [fold, keys, value_dim],
            1.0,
            p,
            values,
            o,
            (value_dim, 1),
            true,
        );
    }
}

/// What a row's scores are made from.
struct Row {
    scale: f32,
    slope: f32,
    /// From the row's position to the first key.
    distance: f32,
    /// Keys that the row may read.
    allowed: (usize, usize),
}

dispatched! {
    /// Dot products become `exp(score - largest)`, zero where the mask forbids; the sum and `o` are brought to the new
    /// largest score.
    fn soften<'a>(row: Row, scores: &'a mut [f32], largest: &'a mut f32, sum: &'a mut f32, o: &'a mut [f32]) {
        let (low, high) = row.allowed;
        scores[..low].fill(0.0);
        scores[high.max(low)..].fill(0.0);
        if low >= high {
            return;
        }
        let scores = &mut scores[low..high];
        let from = row.distance - low as f32;
        for (key, score) in scores.iter_mut().enumerate() {
            *score = row.scale * *score - row.slope * (from - key as f32).abs();
        }
        let highest = max(scores);
        if highest > *largest {
            let factor = exp(*largest - highest);
            *sum *= factor;
            for o in o.iter_mut() {
                *o *= factor;
            }
            *largest = highest;
        }
        let base = *largest;
        let mut sums = [0.0; LANES];
        let (blocks, rest) = scores.as_chunks_mut::<LANES>();
        for block in blocks {
            for l in 0..LANES {
                block[l] = exp(block[l] - base);
                sums[l] += block[l];
            }
        }
        for (value, sum) in rest.iter_mut().zip(&mut sums) {
            *value = exp(*value - base);
            *sum += *value;
        }
        *sum += sums.iter().sum::<f32>();
    }
}
