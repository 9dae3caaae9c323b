//! A few rows against many keys: dot products, no blocks of rows to fill.
//!
//! The keys of a sequence are cut into pieces of [`PIECE`], whatever the number of threads, and the partial results are
//! joined in order, so that one sequence with few heads keeps all cores busy (Sanovar et al., arXiv 2405.10480). Within
//! a piece the heads take turns at each block of keys, which is read once and in order.

use rayon::prelude::*;

use super::forward::Shared;
use super::{Attention, Group, KEYS, merge};
use crate::math::exp;
use crate::simd::dispatched;

/// Most rows of a group handled this way.
pub(super) const ROWS: usize = 4;
/// Keys of a piece.
const PIECE: usize = 1024;
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
        let starts = (bounds.0..bounds.1).step_by(PIECE);
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
    for start in (from..to).step_by(KEYS) {
        for group in groups {
            tile(attention, group, start, to.min(start + KEYS), &mut partial);
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

dispatched! {
    /// Adds the keys `from..to` to the sums of a group's rows.
    fn tile<'a>(
        attention: &'a Attention<'a>,
        group: &'a Group,
        from: usize,
        to: usize,
        partial: &'a mut Partial,
    ) {
        let (head_dim, value_dim) = (attention.head_dim, attention.value_dim);
        let mut scores = [f32::NEG_INFINITY; KEYS];
        for row in 0..group.queries * attention.fold() {
            let index = attention.row(group, row);
            let q = &attention.q[index * head_dim..][..head_dim];
            let slope = match attention.alibi {
                Some(slopes) => slopes[index % attention.heads],
                None => 0.0,
            };
            let position = attention.position(group, row);
            let (low, high) = attention.mask.allowed(position, group.keys);
            let (low, high) = (low.max(from), high.min(to));
            if low >= high {
                continue;
            }
            let keys = high - low;
            let (k, k_stride) = attention.keys(group, low);
            let (v, v_stride) = attention.values(group, low);
            let mut largest = f32::NEG_INFINITY;
            for key in 0..keys {
                let distance = (position - (low + key) as isize).unsigned_abs() as f32;
                let score = attention.scale * dot(q, &k[key * k_stride..][..head_dim]) - slope * distance;
                largest = if score > largest { score } else { largest };
                scores[key] = score;
            }
            scores[keys..].fill(f32::NEG_INFINITY);
            let at = index - group.first_query * attention.heads;
            let o = &mut partial.o[at * value_dim..][..value_dim];
            if largest > partial.largest[at] {
                let factor = exp(partial.largest[at] - largest);
                partial.sum[at] *= factor;
                for o in o.iter_mut() {
                    *o *= factor;
                }
                partial.largest[at] = largest;
            }
            let base = partial.largest[at];
            let mut sums = [0.0; LANES];
            for lanes in scores.as_chunks_mut::<LANES>().0 {
                for l in 0..LANES {
                    lanes[l] = exp(lanes[l] - base);
                    sums[l] += lanes[l];
                }
            }
            partial.sum[at] += fold(sums);
            // Four keys at a time: o is read and written once for them.
            let (fours, _) = scores.as_chunks::<4>();
            for (four, p) in fours.iter().enumerate().take(keys.div_ceil(4)) {
                let last = keys - 1;
                let v: [&[f32]; 4] = [
                    &v[(4 * four).min(last) * v_stride..][..value_dim],
                    &v[(4 * four + 1).min(last) * v_stride..][..value_dim],
                    &v[(4 * four + 2).min(last) * v_stride..][..value_dim],
                    &v[(4 * four + 3).min(last) * v_stride..][..value_dim],
                ];
                for c in 0..value_dim {
                    let low = v[0][c].mul_add(p[0], v[1][c] * p[1]);
                    let high = v[2][c].mul_add(p[2], v[3][c] * p[3]);
                    o[c] += low + high;
                }
            }
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for l in 0..LANES {
            sums[l] = a[l].mul_add(b[l], sums[l]);
        }
    }
    let mut rest = 0.0;
    for (a, b) in a_rest.iter().zip(b_rest) {
        rest = a.mul_add(*b, rest);
    }
    fold(sums) + rest
}

/// The sum of all lanes, in halves.
#[inline(always)]
fn fold(a: [f32; LANES]) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for l in 0..8 {
        eight[l] = a[l] + a[l + 8];
    }
    for l in 0..4 {
        four[l] = eight[l] + eight[l + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}
