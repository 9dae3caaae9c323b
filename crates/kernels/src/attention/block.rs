//! A block of rows of one group, and the softmax of a block of scores.

use super::plan::Plan;
use super::{Attention, Group, KEYS, LANES, ROWS};
use crate::math::exp;
use crate::simd::dispatched;
use crate::transpose::transpose;

/// Keys that a block of rows reads at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    /// The first key; of a listed tile whose keys do not lie together, without meaning.
    pub(super) from: usize,
    pub(super) keys: usize,
    /// Its number, where a plan lists it.
    pub(super) listed: Option<usize>,
}

impl Tile {
    /// Keys `from..to`.
    pub(super) fn range(from: usize, to: usize) -> Self {
        Tile {
            from,
            keys: to - from,
            listed: None,
        }
    }
}

/// Up to [`ROWS`] rows of a group: what the mask and the biases need to know about each.
pub(super) struct Block<'a> {
    pub(super) first: usize,
    pub(super) rows: usize,
    /// `rows`, padded to whole lanes.
    pub(super) width: usize,
    /// Allowed keys `low..high` of each row; empty for padding.
    low: [i32; ROWS],
    high: [i32; ROWS],
    position: [f32; ROWS],
    slope: Option<[f32; ROWS]>,
    plan: Option<&'a Plan>,
}

impl<'a> Block<'a> {
    pub(super) fn new(attention: &Attention<'a>, group: &Group, first: usize, rows: usize) -> Self {
        let mut block = Block {
            plan: attention.plan(group),
            first,
            rows,
            width: rows.next_multiple_of(LANES),
            low: [0; ROWS],
            high: [0; ROWS],
            position: [0.0; ROWS],
            slope: attention.alibi.map(|_| [0.0; ROWS]),
        };
        for row in 0..rows {
            let position = attention.position(group, first + row);
            let (low, high) = attention.mask.allowed(position, group.keys);
            (block.low[row], block.high[row]) = (low as i32, high as i32);
            block.position[row] = position as f32;
            if let (Some(slope), Some(slopes)) = (&mut block.slope, attention.alibi) {
                slope[row] = slopes[attention.row(group, first + row) % attention.heads];
            }
        }
        block
    }

    /// The tiles of keys that some row may read.
    pub(super) fn tiles(&self, head: usize) -> impl Iterator<Item = Tile> + use<'a> {
        // Later rows stand later: the first has the lowest bound, the last the highest.
        let (low, end) = (self.low[0] as usize, self.high[self.rows - 1] as usize);
        // Blocks begin where pages do.
        let start = low / KEYS * KEYS;
        let plan = self.plan;
        let tiles = match plan {
            Some(plan) => plan.tiles(head, self.first),
            None => 0..end.saturating_sub(start).div_ceil(KEYS),
        };
        tiles.map(move |at| match plan {
            Some(plan) => Tile {
                from: plan.pieces(at)[0].start,
                keys: plan.keys(at),
                listed: Some(at),
            },
            None => Tile::range(start + at * KEYS, end.min(start + (at + 1) * KEYS)),
        })
    }

    /// True when every row may read every key of `from..to`.
    fn open(&self, from: usize, to: usize) -> bool {
        self.low[self.rows - 1] as usize <= from && to <= self.high[0] as usize
    }

    /// Adds biases to the scores `[keys, ROWS]` of a tile and sets those that the mask or the plan forbids to -inf.
    #[inline(always)]
    fn adjust(&self, scores: &mut [f32], tile: Tile) {
        if let (Some(plan), Some(at)) = (self.plan, tile.listed) {
            if let Some(mask) = plan.mask(at) {
                forbid(scores, mask);
            }
            return;
        }
        let Tile { from, keys, .. } = tile;
        if let Some(slope) = &self.slope {
            for (key, scores) in scores.chunks_exact_mut(ROWS).enumerate() {
                let key = (from + key) as f32;
                for l in 0..ROWS {
                    let distance = (self.position[l] - key).abs();
                    scores[l] = (-slope[l]).mul_add(distance, scores[l]);
                }
            }
        }
        if !self.open(from, from + keys) {
            for (key, scores) in scores.chunks_exact_mut(ROWS).enumerate() {
                let key = (from + key) as i32;
                for l in 0..ROWS {
                    let allowed = (self.low[l] <= key) & (key < self.high[l]);
                    scores[l] = if allowed {
                        scores[l]
                    } else {
                        f32::NEG_INFINITY
                    };
                }
            }
        }
    }
}

/// Scores of pairs whose bit is not set become -inf.
#[inline(always)]
fn forbid(scores: &mut [f32], mask: &[u64]) {
    for (scores, word) in scores.chunks_exact_mut(ROWS).zip(mask) {
        for lane in (0..ROWS).step_by(LANES) {
            let bits = (word >> lane) as u32;
            let scores = &mut scores[lane..lane + LANES];
            for l in 0..LANES {
                let read = bits >> l & 1 == 1;
                scores[l] = if read { scores[l] } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// Running softmax of a block of rows.
pub(super) struct Running {
    pub(super) largest: [f32; ROWS],
    pub(super) sum: [f32; ROWS],
}

impl Running {
    pub(super) fn new() -> Self {
        Running {
            largest: [f32::NEG_INFINITY; ROWS],
            sum: [0.0; ROWS],
        }
    }
}

dispatched! {
    /// Scores `[keys, ROWS]` become `exp(score - largest)`; the sums and `o`, `[value_dim, ROWS]`, are brought to the
    /// new largest scores.
    pub(super) fn soften<'a>(
        block: &'a Block<'a>,
        tile: Tile,
        scores: &'a mut [f32],
        running: &'a mut Running,
        o: &'a mut [f32],
    ) {
        block.adjust(scores, tile);
        let mut factor = [1.0; ROWS];
        for lane in (0..block.width).step_by(LANES) {
            let mut largest = [f32::NEG_INFINITY; LANES];
            largest.copy_from_slice(&running.largest[lane..lane + LANES]);
            let before = largest;
            for row in scores.chunks_exact(ROWS) {
                let row = &row[lane..lane + LANES];
                for l in 0..LANES {
                    largest[l] = if row[l] > largest[l] { row[l] } else { largest[l] };
                }
            }
            // Rows that no key has reached yet keep zero sums; -inf must not meet -inf.
            let mut base = [0.0; LANES];
            for l in 0..LANES {
                base[l] = if largest[l] == f32::NEG_INFINITY { 0.0 } else { largest[l] };
            }
            let mut sum = [0.0; LANES];
            for row in scores.chunks_exact_mut(ROWS) {
                let row = &mut row[lane..lane + LANES];
                let mut p = [0.0; LANES];
                for l in 0..LANES {
                    p[l] = exp(row[l] - base[l]);
                    sum[l] += p[l];
                }
                row.copy_from_slice(&p);
            }
            for l in 0..LANES {
                let scale = exp(before[l] - base[l]);
                factor[lane + l] = scale;
                running.sum[lane + l] = scale.mul_add(running.sum[lane + l], sum[l]);
                running.largest[lane + l] = largest[l];
            }
        }
        for o in o.chunks_exact_mut(ROWS) {
            for l in 0..ROWS {
                o[l] *= factor[l];
            }
        }
    }
}

dispatched! {
    /// Scores `[keys, ROWS]` become p, and gradients of p become gradients of the scores, `p (dp - delta)`.
    pub(super) fn soften_back<'a>(
        block: &'a Block<'a>,
        tile: Tile,
        scores: &'a mut [f32],
        dp: &'a mut [f32],
        lse: &'a [f32; ROWS],
        delta: &'a [f32; ROWS],
    ) {
        block.adjust(scores, tile);
        let (lse, delta) = (*lse, *delta);
        for (p, dp) in scores.chunks_exact_mut(ROWS).zip(dp.chunks_exact_mut(ROWS)) {
            for lane in (0..block.width).step_by(LANES) {
                let (mut p_here, mut dp_here) = ([0.0; LANES], [0.0; LANES]);
                let (p, dp) = (&mut p[lane..lane + LANES], &mut dp[lane..lane + LANES]);
                for l in 0..LANES {
                    p_here[l] = exp(p[l] - lse[lane + l]);
                    dp_here[l] = p_here[l] * (dp[l] - delta[lane + l]);
                }
                p.copy_from_slice(&p_here);
                dp.copy_from_slice(&dp_here);
            }
        }
    }
}

/// Rows of a block out of `[total_q, heads, dim]` times `factor`, as `[dim, ROWS]`; padding stays as it is.
pub(super) fn gather_transposed(
    attention: &Attention,
    group: &Group,
    block: &Block,
    values: &[f32],
    dim: usize,
    factor: f32,
    out: &mut [f32],
) {
    // Rows of one query lie beside each other, those of the next one `heads` further.
    let fold = attention.fold();
    let mut row = 0;
    while row < block.rows {
        let at = attention.row(group, block.first + row) * dim;
        let (count, stride) = match fold {
            1 => (block.rows, attention.heads * dim),
            _ => (
                (fold - (block.first + row) % fold).min(block.rows - row),
                dim,
            ),
        };
        transpose(
            [count, dim],
            factor,
            &values[at..],
            stride,
            &mut out[row..],
            ROWS,
        );
        row += count;
    }
}

/// As [`gather_transposed`], as `[ROWS, dim]`.
pub(super) fn gather(
    attention: &Attention,
    group: &Group,
    block: &Block,
    values: &[f32],
    dim: usize,
    factor: f32,
    out: &mut [f32],
) {
    for row in 0..block.rows {
        let at = attention.row(group, block.first + row) * dim;
        for (out, value) in out[row * dim..][..dim]
            .iter_mut()
            .zip(&values[at..at + dim])
        {
            *out = value * factor;
        }
    }
}
