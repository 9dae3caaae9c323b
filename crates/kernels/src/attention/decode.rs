//! A few rows against many keys: dot products, no blocks of rows to fill.
//!
//! The keys of a sequence are cut into pieces, whatever the number of threads, and the partial results are
//! joined in order, so that one sequence with few heads keeps all cores busy (Sanovar et al., arXiv 2405.10480). Within
//! a piece the heads take turns at each block of keys, and then at each block of values: each is read once and in order.

use rayon::prelude::*;

use super::forward::Shared;
use super::{Attention, Group, KEYS, merge};
use crate::gemm::{Matrix, Next, dots, weigh};
use crate::math::exp;
use crate::simd::{LANES, dispatched, fold, max};

/// Most rows of a group handled this way.
pub(super) const ROWS: usize = 4;
/// Most keys of a piece.
const PIECE: usize = 8 * KEYS;
/// So many pieces a sequence has where they are not too short.
const FEWEST: usize = 4;

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
        // Pieces begin where pages do; a short sequence has a few, too.
        let first = bounds.0 / KEYS * KEYS;
        let even = bounds.1.saturating_sub(first).div_ceil(FEWEST);
        let each = even.next_multiple_of(KEYS).clamp(2 * KEYS, PIECE);
        let starts = (first..bounds.1).step_by(each);
        pieces.extend(starts.map(|from| (groups, from, bounds.1.min(from + each))));
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

/// `(o, lse)` of all rows over the keys `from..to`: first the scores of all keys, then the sums of all values, so that either
/// are read from one end of their pages to the other. While a block is multiplied the one after it is asked for.
fn piece(attention: &Attention, groups: &[Group], from: usize, to: usize) -> (Vec<f32>, Vec<f32>) {
    let (head_dim, value_dim, fold) = (attention.head_dim, attention.value_dim, attention.fold());
    let shapes = [head_dim, value_dim].map(|dim| [attention.kv_heads, dim]);
    let keys_at = |at: (usize, usize)| attention.k.held(&groups[at.1], shapes[0], at.0);
    let values_at = |at: (usize, usize)| attention.v.held(&groups[at.1], shapes[1], at.0);
    let blocks = (from..to).step_by(KEYS);
    let blocks = blocks.flat_map(|start| (0..groups.len()).map(move |group| (start, group)));
    let blocks: Vec<(usize, usize)> = blocks.collect();
    // Of a group, `[rows, keys]`.
    let (count, rows) = (to - from, groups[0].queries * fold);
    let mut scores = vec![0.0; groups.len() * rows * count];
    for (at, &(start, group)) in blocks.iter().enumerate() {
        let mut q: [&[f32]; ROWS] = [&[]; ROWS];
        for (row, q) in q.iter_mut().enumerate().take(rows) {
            *q = &attention.q[attention.row(&groups[group], row) * head_dim..][..head_dim];
        }
        let (k, stride) = keys_at((start, group));
        let next = match blocks.get(at + 1) {
            Some(&next) => Next::new(keys_at(next), head_dim),
            None => Next::new(values_at(blocks[0]), value_dim),
        };
        let to_score = &mut scores[group * rows * count + start - from..];
        let keys = KEYS.min(to - start);
        dots(&q[..rows], k, stride, keys, to_score, count, Some(next));
    }
    let mut lse = vec![f32::NEG_INFINITY; groups[0].queries * attention.heads];
    let mut o = vec![0.0; lse.len() * value_dim];
    // Where a row of a group stands in both.
    let place =
        |group: &Group, row| attention.row(group, row) - group.first_query * attention.heads;
    let mut sums = vec![0.0; lse.len()];
    for (group, scores) in groups.iter().zip(scores.chunks_exact_mut(rows * count)) {
        for (row, scores) in scores.chunks_exact_mut(count).enumerate() {
            let head = attention.row(group, row) % attention.heads;
            let position = attention.position(group, row);
            let (low, high) = attention.mask.allowed(position, group.keys);
            let row_of = Row {
                scale: attention.scale,
                slope: attention.alibi.map_or(0.0, |slopes| slopes[head]),
                distance: (position - from as isize) as f32,
                allowed: (low.clamp(from, to) - from, high.clamp(from, to) - from),
            };
            let at = place(group, row);
            soften(row_of, scores, &mut lse[at], &mut sums[at]);
        }
    }
    for (at, &(start, group)) in blocks.iter().enumerate() {
        let (v, stride) = values_at((start, group));
        let mut next = blocks.get(at + 1);
        for query in 0..groups[group].queries {
            let first = (group * rows + query * fold) * count + start - from;
            let p = Matrix::rows(&scores[first..], count);
            let o = &mut o[place(&groups[group], query * fold) * value_dim..];
            let sizes = [fold, KEYS.min(to - start), value_dim];
            let next = next
                .take()
                .map(|&next| Next::new(values_at(next), value_dim));
            weigh(sizes, p, v, stride, o, value_dim, next);
        }
    }
    for (o, (lse, sum)) in o.chunks_exact_mut(value_dim).zip(lse.iter_mut().zip(sums)) {
        if sum > 0.0 {
            let inverse = 1.0 / sum;
            o.iter_mut().for_each(|o| *o *= inverse);
            *lse += sum.ln();
        }
    }
    (o, lse)
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
    /// Dot products become `exp(score - largest)`, zero where the mask forbids; tells the largest score and the sum.
    fn soften<'a>(row: Row, scores: &'a mut [f32], largest: &'a mut f32, sum: &'a mut f32) {
        let (low, high) = row.allowed;
        scores[..low].fill(0.0);
        scores[high.max(low)..].fill(0.0);
        if low >= high {
            return;
        }
        let scores = &mut scores[low..high];
        let from = row.distance - low as f32;
        if row.slope == 0.0 {
            scores.iter_mut().for_each(|score| *score *= row.scale);
        } else {
            for (key, score) in scores.iter_mut().enumerate() {
                *score = row.scale * *score - row.slope * (from - key as f32).abs();
            }
        }
        let base = max(scores);
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
        (*largest, *sum) = (base, fold(sums));
    }
}
