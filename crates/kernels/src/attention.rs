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
//! keys.
//!
//! Inside, the query heads of a key head are rows of one problem, and rows fill the lanes: scores are held transposed,
//! `[keys, rows]`, so that softmax needs no sum across lanes and every product reads its operands as they lie.

mod backward;
mod block;
mod decode;
mod forward;
mod merge;
pub mod naive;
#[cfg(test)]
mod tests;

pub use backward::{Grads, backward};
pub use forward::{Output, forward};
pub use merge::merge;

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

/// The arguments.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `[total_q, heads, head_dim]`.
    pub q: &'a [f32],
    /// `[total_k, kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// `[total_k, kv_heads, value_dim]`.
    pub v: &'a [f32],
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
    /// Which keys count.
    pub mask: Mask,
    /// Slopes of linear biases, one per query head (Press et al., arXiv 2108.12409).
    pub alibi: Option<&'a [f32]>,
    /// Factor of the dot products, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// Operations of a forward pass that skips what the mask forbids: two per multiply-add of the allowed pairs.
pub fn flops(
    q_offsets: &[usize],
    k_offsets: &[usize],
    heads: usize,
    head_dim: usize,
    value_dim: usize,
    mask: Mask,
) -> u64 {
    let mut pairs = 0;
    for (q, k) in q_offsets.windows(2).zip(k_offsets.windows(2)) {
        let (queries, keys) = (q[1] - q[0], k[1] - k[0]);
        for t in 0..queries {
            let (low, high) = mask.allowed((keys + t) as isize - queries as isize, keys);
            pairs += (high - low) as u64;
        }
    }
    2 * pairs * (heads * (head_dim + value_dim)) as u64
}

/// One key head of one sequence, with the query heads that read it.
#[derive(Clone, Copy, Debug)]
struct Group {
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
        for (q, k) in self.q_offsets.windows(2).zip(self.k_offsets.windows(2)) {
            for kv_head in 0..self.kv_heads {
                groups.push(Group {
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
        (group.keys + row / self.fold()) as isize - group.queries as isize
    }

    /// Keys of a group from `key` on, with their stride.
    fn keys(&self, group: &Group, key: usize) -> (&'a [f32], usize) {
        let at = ((group.first_key + key) * self.kv_heads + group.kv_head) * self.head_dim;
        (&self.k[at..], self.kv_heads * self.head_dim)
    }

    /// Values of a group from `key` on, with their stride.
    fn values(&self, group: &Group, key: usize) -> (&'a [f32], usize) {
        let at = ((group.first_key + key) * self.kv_heads + group.kv_head) * self.value_dim;
        (&self.v[at..], self.kv_heads * self.value_dim)
    }

    fn check(&self) {
        let last = |offsets: &[usize]| offsets[offsets.len() - 1];
        assert_eq!(
            self.q_offsets.len(),
            self.k_offsets.len(),
            "attention sequences"
        );
        let (queries, keys) = (last(self.q_offsets), last(self.k_offsets));
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
        assert_eq!(
            self.k.len(),
            keys * self.kv_heads * self.head_dim,
            "attention k"
        );
        assert_eq!(
            self.v.len(),
            keys * self.kv_heads * self.value_dim,
            "attention v"
        );
        assert!(
            self.alibi.is_none_or(|slopes| slopes.len() == self.heads),
            "attention alibi"
        );
    }
}
