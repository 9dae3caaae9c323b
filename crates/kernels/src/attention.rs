//! Exact softmax attention in blocks: memory linear in time, forward and backward.
//!
//! `o_i = sum_j p_ij v_j`, `p_ij = exp(s_ij - lse_i)`, `s_ij = scale q_i . k_j - slope |pos_i - pos_j|`,
//! `lse_i = ln sum_j exp(s_ij)` over the keys that the mask allows; a query without any gives o = 0, lse = -inf and no
//! gradient. The backward pass computes p again from lse (Dao et al., FlashAttention, arXiv 2205.14135). Partial results
//! over different keys are joined by [`merge`] (Sanovar et al., arXiv 2405.10480).
//!
//! Shapes: q `[total_q, heads, head_dim]`, k `[total_k, kv_heads, head_dim]`, v `[total_k, kv_heads, value_dim]`,
//! o `[total_q, heads, value_dim]`, lse `[total_q, heads]`. Query head `h` reads key head `h / (heads / kv_heads)`.
//! Sequences are packed; the last query of a sequence stands at its last key, so that queries may follow a cache of
//! keys, unless it is said where the first one stands.
//!
//! Inside, the query heads of a key head are rows of one problem, and rows fill the lanes: scores are held transposed,
//! `[keys, rows]`, so that softmax needs no sum across lanes and every product reads its operands as they lie.

mod backward;
mod block;
pub mod cache;
mod decode;
mod dropped;
mod forward;
mod merge;
pub mod naive;
mod plan;
#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

pub use backward::{Grads, backward};
pub use dropped::factors;
pub use forward::{Output, forward};
pub use merge::merge;
pub use plan::Plan;

use std::ops::Range;
use std::sync::Arc;

use self::block::Tile;
use self::cache::{Element, Table};
use crate::bf16::{self, Held};
use crate::dropout::Dropout;
use crate::matmul::Precision;

/// Rows (query heads of a group, times queries) per block.
const ROWS: usize = 64;
/// Keys per block.
const KEYS: usize = 64;
/// Rows are padded to a multiple of this.
const LANES: usize = 16;

/// Which keys a query may read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Only keys at or before the query.
    pub causal: bool,
    /// Only keys nearer than this: `pos_q - pos_k < window`, in both directions where not causal.
    pub window: Option<usize>,
}

impl Mask {
    /// The allowed keys of a query at `position`, of `keys` keys.
    fn allowed(self, position: isize, keys: usize) -> (usize, usize) {
        let clip = |at: isize| at.clamp(0, keys as isize) as usize;
        let end = isize::MAX - 1;
        let window = self
            .window
            .map_or(end, |window| isize::try_from(window).unwrap_or(end));
        let low = clip(position.saturating_sub(window).saturating_add(1));
        let high = match self.causal {
            true => clip(position.saturating_add(1)),
            false => clip(position.saturating_add(window)),
        };
        (low, if window == 0 { low } else { high.max(low) })
    }
}

/// Keys or values of all sequences.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// `[total_k, kv_heads, dim]`.
    Flat(&'a [f32]),
    /// A table for each sequence.
    Paged(&'a [Table]),
}

impl<'a> Rows<'a> {
    /// Rows of a head of a sequence from row `from` on, as they are held, and their stride; of pages, rows of one block of
    /// [`KEYS`].
    #[inline(always)]
    fn held(self, group: &Group, [kv_heads, dim]: [usize; 2], from: usize) -> (Held<'a>, usize) {
        match self {
            Rows::Flat(values) => {
                let at = ((group.first_key + from) * kv_heads + group.kv_head) * dim;
                (Held::F32(&values[at..]), kv_heads * dim)
            }
            Rows::Paged(tables) => (tables[group.sequence].page(group.kv_head, from), dim),
        }
    }

    /// As [`Rows::held`], `keys` rows; those that are held in bf16 are widened into `scratch`.
    #[inline(always)]
    fn rows<'s>(
        self,
        group: &Group,
        shape: [usize; 2],
        from: usize,
        keys: usize,
        scratch: &'s mut [f32],
    ) -> (&'s [f32], usize)
    where
        'a: 's,
    {
        match self.held(group, shape, from) {
            (Held::F32(values), stride) => (values, stride),
            (Held::Bf16(values), stride) => {
                bf16::widen(&values[..keys * shape[1]], scratch);
                (scratch, stride)
            }
        }
    }

    /// True when no row has to be widened.
    fn is_wide(self) -> bool {
        match self {
            Rows::Flat(_) => true,
            Rows::Paged(tables) => tables.iter().all(|table| table.element() == Element::F32),
        }
    }

    /// Panics unless there are `rows` rows of `[kv_heads, dim]`.
    fn check(self, offsets: &[usize], kv_heads: usize, dim: usize, what: &str) {
        match self {
            Rows::Flat(values) => {
                let rows = offsets[offsets.len() - 1];
                assert_eq!(values.len(), rows * kv_heads * dim, "attention {what}");
            }
            Rows::Paged(tables) => {
                assert_eq!(tables.len() + 1, offsets.len(), "attention {what}");
                for (table, ends) in tables.iter().zip(offsets.windows(2)) {
                    assert_eq!(table.shape(), [kv_heads, dim], "attention {what}");
                    assert_eq!(table.len(), ends[1] - ends[0], "attention {what}");
                }
            }
        }
    }
}

/// The score of a query and a key of one number, see [`Attention::ids`].
pub const OWN: f32 = -1e5;

/// A number added to the score of each pair, by head and distance.
#[derive(Clone, Copy, Debug)]
pub struct Bias<'a> {
    /// `[heads, distances]`.
    pub table: &'a [f32],
    /// Where the distance 0 stands; a query `d` after its key reads place `zero + d`, or the nearest that there is.
    pub zero: usize,
}

/// The arguments.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `[total_q, heads, head_dim]`.
    pub q: &'a [f32],
    /// `head_dim` features for each key head.
    pub k: Rows<'a>,
    /// `value_dim` features for each key head.
    pub v: Rows<'a>,
    /// Cumulative query counts of the packed sequences.
    pub q_offsets: &'a [usize],
    /// Cumulative key counts, one sequence for each of the queries.
    pub k_offsets: &'a [usize],
    /// Query heads.
    pub heads: usize,
    /// Key heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of queries and keys.
    pub head_dim: usize,
    /// Features of values.
    pub value_dim: usize,
    /// Where the first query of each sequence stands among its keys; without, the last stands at the last.
    pub starts: Option<&'a [usize]>,
    /// Which keys count.
    pub mask: Mask,
    /// One for each sequence, in place of the mask: which keys count, where these are lists. As many queries as keys, as many
    /// key heads as query heads, no biases, and keys and values that lie flat.
    pub plans: Option<&'a [Arc<Plan>]>,
    /// Slopes of linear biases, one per query head (Press et al., arXiv 2108.12409).
    pub alibi: Option<&'a [f32]>,
    /// Biases by distance.
    pub bias: Option<Bias<'a>>,
    /// Numbers of queries `[total_q]` and of keys `[total_k]`: a pair of equal numbers has the score [`OWN`], so that a query
    /// reads a key of its own number only where it has no other.
    pub ids: Option<[&'a [u32]; 2]>,
    /// Weights are dropped and the others scaled up; `lse` is that of all of them.
    pub dropout: Option<Dropout>,
    /// Factor of the dot products, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// What operands of products are rounded to where a sequence has more than a few rows (backward always); softmax and sums stay f32.
    pub precision: Precision,
}

/// Where query `query` of `queries` of a sequence stands among `keys` keys.
fn position(
    starts: Option<&[usize]>,
    sequence: usize,
    query: usize,
    queries: usize,
    keys: usize,
) -> isize {
    match starts {
        Some(starts) => (starts[sequence] + query) as isize,
        None => (keys + query) as isize - queries as isize,
    }
}

/// Operations of a forward pass that skips what the mask forbids: two per multiply-add of the allowed pairs. `dims` are
/// the features of keys and of values.
pub fn flops(
    q_offsets: &[usize],
    k_offsets: &[usize],
    starts: Option<&[usize]>,
    heads: usize,
    [head_dim, value_dim]: [usize; 2],
    mask: Mask,
) -> u64 {
    let mut pairs = 0;
    let ends = q_offsets.windows(2).zip(k_offsets.windows(2));
    for (sequence, (q, k)) in ends.enumerate() {
        let (queries, keys) = (q[1] - q[0], k[1] - k[0]);
        for t in 0..queries {
            let (low, high) = mask.allowed(position(starts, sequence, t, queries, keys), keys);
            pairs += (high - low) as u64;
        }
    }
    2 * pairs * (heads * (head_dim + value_dim)) as u64
}

/// Operations of a forward pass over the pairs that plans list.
pub fn listed_flops(plans: &[Arc<Plan>], heads: usize, [head_dim, value_dim]: [usize; 2]) -> u64 {
    let one = |plan: &Arc<Plan>| plan.flops(heads, head_dim, value_dim);
    plans.iter().map(one).sum()
}

/// One key head of one sequence, with the query heads that read it.
#[derive(Clone, Copy, Debug)]
struct Group {
    sequence: usize,
    kv_head: usize,
    first_query: usize,
    queries: usize,
    first_key: usize,
    keys: usize,
}

impl<'a> Attention<'a> {
    /// Query heads per key head.
    fn fold(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn groups(&self) -> Vec<Group> {
        let mut groups = Vec::new();
        let ends = self.q_offsets.windows(2).zip(self.k_offsets.windows(2));
        for (sequence, (q, k)) in ends.enumerate() {
            for kv_head in 0..self.kv_heads {
                groups.push(Group {
                    sequence,
                    kv_head,
                    first_query: q[0],
                    queries: q[1] - q[0],
                    first_key: k[0],
                    keys: k[1] - k[0],
                });
            }
        }
        groups
    }

    /// Index of row `row` of a group among all `[total_q, heads]`.
    #[inline(always)]
    fn row(&self, group: &Group, row: usize) -> usize {
        let fold = self.fold();
        (group.first_query + row / fold) * self.heads + group.kv_head * fold + row % fold
    }

    /// Position among the keys of the sequence.
    fn position(&self, group: &Group, row: usize) -> isize {
        let query = row / self.fold();
        position(
            self.starts,
            group.sequence,
            query,
            group.queries,
            group.keys,
        )
    }

    /// Keys of a tile of a group, with their stride.
    #[inline(always)]
    fn keys<'s>(&self, group: &Group, tile: Tile, scratch: &'s mut [f32]) -> (&'s [f32], usize)
    where
        'a: 's,
    {
        self.tile(self.k, self.head_dim, group, tile, scratch)
    }

    /// Values of a tile of a group, with their stride.
    #[inline(always)]
    fn values<'s>(&self, group: &Group, tile: Tile, scratch: &'s mut [f32]) -> (&'s [f32], usize)
    where
        'a: 's,
    {
        self.tile(self.v, self.value_dim, group, tile, scratch)
    }

    #[inline(always)]
    fn tile<'s>(
        &self,
        rows: Rows<'a>,
        dim: usize,
        group: &Group,
        tile: Tile,
        scratch: &'s mut [f32],
    ) -> (&'s [f32], usize)
    where
        'a: 's,
    {
        let shape = [self.kv_heads, dim];
        let pieces = self.pieces(group, tile);
        if pieces.is_empty() {
            return rows.rows(group, shape, tile.from, tile.keys, scratch);
        }
        let mut at = 0;
        for piece in pieces {
            let (held, stride) = rows.rows(group, shape, piece.start, piece.len(), &mut []);
            for row in 0..piece.len() {
                scratch[at..at + dim].copy_from_slice(&held[row * stride..][..dim]);
                at += dim;
            }
        }
        (scratch, dim)
    }

    /// The plan of a group's sequence.
    #[inline(always)]
    fn plan(&self, group: &Group) -> Option<&'a Plan> {
        self.plans.map(|plans| &*plans[group.sequence])
    }

    /// First row and rows of each block of a group.
    fn row_blocks(&self, group: &Group) -> Vec<(usize, usize)> {
        if let Some(plan) = self.plan(group) {
            let blocks = plan.blocks(group.kv_head).iter();
            return blocks.map(|block| (block.first, block.rows)).collect();
        }
        let rows = group.queries * self.fold();
        let firsts = (0..rows).step_by(ROWS);
        firsts
            .map(|first| (first, ROWS.min(rows - first)))
            .collect()
    }

    /// The ranges of a tile whose keys do not lie together; none where they do.
    #[inline(always)]
    fn pieces(&self, group: &Group, tile: Tile) -> &'a [Range<usize>] {
        match (self.plan(group), tile.listed) {
            (Some(plan), Some(at)) => match plan.pieces(at) {
                [_] => &[],
                pieces => pieces,
            },
            _ => &[],
        }
    }

    /// Operations of a forward pass.
    pub fn flops(&self) -> u64 {
        let dims = [self.head_dim, self.value_dim];
        match self.plans {
            Some(plans) => listed_flops(plans, self.heads, dims),
            None => flops(
                self.q_offsets,
                self.k_offsets,
                self.starts,
                self.heads,
                dims,
                self.mask,
            ),
        }
    }

    /// Values that [`Self::keys`] and [`Self::values`] need as scratch: none where rows lie as f32 and in order.
    fn wide_block(&self) -> usize {
        match self.k.is_wide() && self.v.is_wide() && self.plans.is_none() {
            true => 0,
            false => KEYS * self.head_dim.max(self.value_dim),
        }
    }

    fn check(&self) {
        let last = |offsets: &[usize]| offsets[offsets.len() - 1];
        assert_eq!(
            self.q_offsets.len(),
            self.k_offsets.len(),
            "attention sequences"
        );
        let queries = last(self.q_offsets);
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "attention heads"
        );
        assert!(
            self.head_dim > 0 && self.value_dim > 0,
            "attention head_dim"
        );
        assert_eq!(
            self.q.len(),
            queries * self.heads * self.head_dim,
            "attention q"
        );
        self.k
            .check(self.k_offsets, self.kv_heads, self.head_dim, "k");
        self.v
            .check(self.k_offsets, self.kv_heads, self.value_dim, "v");
        assert!(
            self.alibi.is_none_or(|slopes| slopes.len() == self.heads),
            "attention alibi"
        );
        assert!(
            self.starts
                .is_none_or(|starts| starts.len() + 1 == self.q_offsets.len()),
            "attention starts"
        );
        if let Some(Bias { table, zero }) = self.bias {
            let distances = table.len() / self.heads;
            let whole = table.len() == distances * self.heads;
            assert!(whole && zero < distances, "attention bias");
        }
        if let Some([q, k]) = self.ids {
            let lengths = [queries, last(self.k_offsets)];
            assert_eq!([q.len(), k.len()], lengths, "attention ids");
        }
        let Some(plans) = self.plans else { return };
        let flat = matches!((self.k, self.v), (Rows::Flat(_), Rows::Flat(_)));
        let biases = self.alibi.is_some() || self.bias.is_some();
        let plain = !biases && self.ids.is_none() && self.starts.is_none();
        assert!(
            flat && plain && self.heads == self.kv_heads,
            "attention with a plan: flat keys, no biases, numbers or starts, a key head for each query head"
        );
        assert!(
            self.q_offsets == self.k_offsets && plans.len() + 1 == self.q_offsets.len(),
            "attention plans: one for each sequence, with as many queries as keys"
        );
        for (plan, ends) in plans.iter().zip(self.q_offsets.windows(2)) {
            assert_eq!(plan.time(), ends[1] - ends[0], "attention plan");
            assert!(
                plan.heads() == 1 || plan.heads() == self.heads,
                "attention plan heads"
            );
        }
    }
}
