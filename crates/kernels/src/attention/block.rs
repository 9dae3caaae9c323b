//! A block of rows of one group, and the softmax of a block of scores.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod wide;

use super::plan::Plan;
use super::{Attention, Group, KEYS, LANES, OWN, ROWS};
#[cfg(target_arch = "x86_64")]
use crate::instructions::Instructions;
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
    bias: Option<Biases<'a>>,
    /// Numbers of the rows, and of the sequence's keys.
    ids: Option<([u32; ROWS], &'a [u32])>,
}

/// Biases by distance of the rows of a block.
struct Biases<'a> {
    table: &'a [f32],
    /// Where the row's distances begin in the table.
    start: [usize; ROWS],
    /// The row's place in them for the first key.
    place: [i32; ROWS],
    /// The last place.
    last: i32,
}

impl Biases<'_> {
    /// The place in the table of row `l` and a key.
    #[inline(always)]
    fn at(&self, l: usize, key: usize) -> usize {
        self.start[l] + (self.place[l] - key as i32).clamp(0, self.last) as usize
    }
}

impl<'a> Block<'a> {
    pub(super) fn new(attention: &Attention<'a>, group: &Group, first: usize, rows: usize) -> Self {
        let distances = attention
            .bias
            .map_or(1, |bias| bias.table.len() / attention.heads);
        let mut block = Block {
            plan: attention.plan(group),
            first,
            rows,
            width: rows.next_multiple_of(LANES),
            low: [0; ROWS],
            high: [0; ROWS],
            position: [0.0; ROWS],
            slope: attention.alibi.map(|_| [0.0; ROWS]),
            bias: attention.bias.map(|bias| Biases {
                table: bias.table,
                start: [0; ROWS],
                place: [0; ROWS],
                last: distances as i32 - 1,
            }),
            ids: attention.ids.map(|[_, keys]| {
                let keys = &keys[group.first_key..group.first_key + group.keys];
                ([0; ROWS], keys)
            }),
        };
        for row in 0..rows {
            let position = attention.position(group, first + row);
            let (low, high) = attention.mask.allowed(position, group.keys);
            (block.low[row], block.high[row]) = (low as i32, high as i32);
            block.position[row] = position as f32;
            if let (Some(slope), Some(slopes)) = (&mut block.slope, attention.alibi) {
                slope[row] = slopes[attention.row(group, first + row) % attention.heads];
            }
            if let (Some(held), Some(bias)) = (&mut block.bias, attention.bias) {
                let head = attention.row(group, first + row) % attention.heads;
                held.start[row] = head * distances;
                held.place[row] = (position + bias.zero as isize) as i32;
            }
            if let (Some((rows, _)), Some([ids, _])) = (&mut block.ids, attention.ids) {
                rows[row] = ids[group.first_query + (first + row) / attention.fold()];
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

    /// Sets the values of pairs of a query and a key of one number.
    #[inline(always)]
    fn set_own(&self, values: &mut [f32], from: usize, own: f32) {
        let Some((rows, ids)) = &self.ids else { return };
        for (id, values) in ids[from..].iter().zip(values.chunks_exact_mut(ROWS)) {
            for l in 0..ROWS {
                values[l] = if rows[l] == *id { own } else { values[l] };
            }
        }
    }

    /// Adds gradients `[keys, ROWS]` of the scores of keys from `from` on to that of the table of biases.
    pub(super) fn add_biases(&self, scores: &[f32], from: usize, table: &mut [f32]) {
        let Some(bias) = &self.bias else { return };
        // Forbidden pairs have the gradient 0.
        for (key, scores) in scores.chunks_exact(ROWS).enumerate() {
            for (l, score) in scores.iter().enumerate().take(self.rows) {
                table[bias.at(l, from + key)] += score;
            }
        }
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
        if let Some(bias) = &self.bias {
            for (key, scores) in scores.chunks_exact_mut(ROWS).enumerate() {
                for l in 0..ROWS {
                    scores[l] += bias.table[bias.at(l, from + key)];
                }
            }
        }
        if let Some(slope) = &self.slope {
            for (key, scores) in scores.chunks_exact_mut(ROWS).enumerate() {
                let key = (from + key) as f32;
                for l in 0..ROWS {
                    let distance = (self.position[l] - key).abs();
                    scores[l] = (-slope[l]).mul_add(distance, scores[l]);
                }
            }
        }
        self.set_own(scores, from, OWN);
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

/// Scores `[keys, ROWS]` of a tile become `exp(score - largest)`; the sums and `o`, `[value_dim, ROWS]`, are
/// brought to the new largest scores.
pub(super) fn soften(
    block: &Block,
    tile: Tile,
    scores: &mut [f32],
    running: &mut Running,
    o: &mut [f32],
) {
    adjust(block, tile, scores);
    #[cfg(target_arch = "x86_64")]
    if Instructions::Avx512.usable() {
        // SAFETY: rows are whole and the width is of a block; AVX-512 was detected.
        unsafe { wide::soften(block.width, scores, running, o) };
        return;
    }
    portable_soften(block, scores, running, o);
}

/// Scores `[keys, ROWS]` of a tile become p, and gradients of p become gradients of the scores, `p (dp - delta)`.
pub(super) fn soften_back(
    block: &Block,
    tile: Tile,
    scores: &mut [f32],
    dp: &mut [f32],
    lse: &[f32; ROWS],
    delta: &[f32; ROWS],
) {
    assert_eq!(scores.len(), dp.len(), "attention scores");
    adjust(block, tile, scores);
    #[cfg(target_arch = "x86_64")]
    if Instructions::Avx512.usable() {
        // SAFETY: as above, and there are as many gradients as scores.
        unsafe { wide::soften_back(block.width, scores, dp, lse, delta) };
        stop_own(block, tile, dp);
        return;
    }
    portable_soften_back(block, scores, dp, lse, delta);
    stop_own(block, tile, dp);
}

dispatched! {
    /// Scores of pairs of one number are given: no gradient goes through them.
    fn stop_own<'a>(block: &'a Block<'a>, tile: Tile, dp: &'a mut [f32]) {
        block.set_own(dp, tile.from, 0.0);
    }
}

dispatched! {
    fn adjust<'a>(block: &'a Block<'a>, tile: Tile, scores: &'a mut [f32]) {
        block.adjust(scores, tile);
    }
}

dispatched! {
    /// [`soften`] after biases and mask.
    fn portable_soften<'a>(
        block: &'a Block<'a>,
        scores: &'a mut [f32],
        running: &'a mut Running,
        o: &'a mut [f32],
    ) {
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
    /// [`soften_back`] after biases and mask.
    fn portable_soften_back<'a>(
        block: &'a Block<'a>,
        scores: &'a mut [f32],
        dp: &'a mut [f32],
        lse: &'a [f32; ROWS],
        delta: &'a [f32; ROWS],
    ) {
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    #[test]
    fn both_forms_agree() {
        if !is_x86_feature_detected!("avx512f") {
            return;
        }
        let block = Block {
            plan: None,
            bias: None,
            ids: None,
            first: 0,
            rows: ROWS - 3,
            width: ROWS,
            low: [0; ROWS],
            high: [9; ROWS],
            position: [0.0; ROWS],
            slope: None,
        };
        let (mut running, mut twin) = (Running::new(), Running::new());
        let (mut o, mut twin_o) = (rand_vec(1, 5 * ROWS), rand_vec(1, 5 * ROWS));
        // The third block moves no maximum, the last rows are forbidden throughout.
        for (seed, height) in [(2, 1.0), (3, 30.0), (4, 0.1), (5, 90.0)] {
            let mut scores = rand_vec(seed, 9 * ROWS);
            for (at, score) in scores.iter_mut().enumerate() {
                *score = match at % ROWS >= ROWS - 3 || at % 17 == 0 {
                    true => f32::NEG_INFINITY,
                    false => *score * height,
                };
            }
            let mut twins = scores.clone();
            // SAFETY: whole rows; AVX-512 was detected.
            unsafe { wide::soften(ROWS, &mut scores, &mut running, &mut o) };
            portable_soften(&block, &mut twins, &mut twin, &mut twin_o);
            assert_close("p", &scores, &twins, 1e-5);
            assert_close("o", &o, &twin_o, 1e-5);
            assert_close("sum", &running.sum, &twin.sum, 1e-5);
            assert_eq!(running.largest, twin.largest);
            let mut dp = rand_vec(seed + 10, scores.len());
            let mut twin_dp = dp.clone();
            let (lse, delta) = ([2.0; ROWS], [0.25; ROWS]);
            // SAFETY: as above.
            unsafe { wide::soften_back(ROWS, &mut scores, &mut dp, &lse, &delta) };
            portable_soften_back(&block, &mut twins, &mut twin_dp, &lse, &delta);
            assert_close("p again", &scores, &twins, 1e-5);
            assert_close("ds", &dp, &twin_dp, 1e-5);
        }
    }
}
