//! Linear attention over the whole sequence, both ways, its feature maps computed within.
//!
//! `o_i = phi(q_i) S / (phi(q_i) . z)`, `S = sum_j phi(k_j)^T v_j`, `z = sum_j phi(k_j)` over all keys of a sequence
//! (Katharopoulos et al., arXiv 2006.16236; without the divisor where it is not asked for). No array of
//! `[time, heads, features]` is ever written: features are made block by block, again in the backward pass.
//!
//! Shapes: q and k `[total, heads, dim]`, v and o `[total, heads, value_dim]`; sequences are packed. A task is a part of a
//! sequence with all its heads, so that inputs and gradients are contiguous rows, read and written where they lie; the sums of
//! parts are added in their order. Features of a block of tokens are held as rows `[tokens, heads, width]`.
//!
//! With `g_i = do_i / d_i`, `e_i = -(do_i . o_i) / d_i` and `d_i = phi(q_i) . z`: `dphi(q_i) = S g_i + z e_i`,
//! `dS = sum_i phi(q_i)^T g_i`, `dz = sum_i phi(q_i) e_i`, `dphi(k_j) = dS v_j + dz`, `dv_j = dS^T phi(k_j)`. As
//! `do_i . o_i` is `phi(q_i) . (S g_i)`, the outputs are not needed.

mod backward;
mod forward;
mod map;
#[cfg(any(test, fuzzing))]
mod naive;
mod rows;
#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

pub use backward::backward;
pub use forward::forward;
pub use map::Map;

use std::ops::Range;

use crate::gemm::{Matrix, product};
use crate::simd::{PARALLEL_FLOPS, each_if};
use crate::transpose::transpose;

/// Features of a block of tokens: a few such blocks stay in the second cache level.
const BLOCK: usize = 1 << 14;
/// Fewest and most tokens of a block. The sums are loaded and stored once for each block.
const TOKENS: [usize; 2] = [32, 128];
/// Fewest tokens of a part of a sequence.
const PART: usize = 256;
/// Most parts of a sequence: each has sums of its own.
const PARTS: usize = 16;

/// A divisor nearer to zero than this is replaced by it and gets no gradient.
pub const SMALLEST_DIVISOR: f32 = 1e-6;

/// The arguments.
#[derive(Clone, Copy, Debug)]
pub struct FeatureAttention<'a> {
    /// `[total, heads, dim]`.
    pub q: &'a [f32],
    /// `[total, heads, dim]`.
    pub k: &'a [f32],
    /// `[total, heads, value_dim]`.
    pub v: &'a [f32],
    /// Cumulative lengths of the packed sequences.
    pub offsets: &'a [usize],
    /// Heads.
    pub heads: usize,
    /// Features of queries and keys before the map.
    pub dim: usize,
    /// Features of values.
    pub value_dim: usize,
    /// The map.
    pub map: Map<'a>,
    /// Divide by the sum of the weights.
    pub normalise: bool,
}

/// Operations of a forward pass over `total` tokens, two per multiply-add; `width` counts the normaliser's column.
pub fn flops(total: usize, heads: usize, features: usize, width: usize) -> u64 {
    4 * (total * heads * features * width) as u64
}

/// Tokens of one sequence, with all heads the task of a thread.
#[derive(Clone, Debug)]
struct Part {
    sequence: usize,
    tokens: Range<usize>,
}

impl FeatureAttention<'_> {
    fn features(&self) -> usize {
        self.map.features(self.dim)
    }

    fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Values that [`forward`] keeps of a head: S `[features, value_dim]`, z `[features]` and the keys' stabiliser.
    fn held(&self) -> usize {
        self.features() * (self.value_dim + 1) + 1
    }

    /// Values of the features of a token.
    fn wide(&self) -> usize {
        self.heads * self.map.width(self.dim)
    }

    fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        for (sequence, pair) in self.offsets.windows(2).enumerate() {
            let length = pair[1] - pair[0];
            let size = length.div_ceil(PARTS).max(PART);
            for from in (pair[0]..pair[1]).step_by(size) {
                let tokens = from..(from + size).min(pair[1]);
                parts.push(Part { sequence, tokens });
            }
        }
        parts
    }

    /// The blocks of a part.
    fn blocks(&self, part: &Part) -> impl Iterator<Item = Range<usize>> {
        let size = (BLOCK / self.wide()).clamp(TOKENS[0], TOKENS[1]);
        let end = part.tokens.end;
        let starts = part.tokens.clone().step_by(size);
        starts.map(move |from| from..(from + size).min(end))
    }

    /// Features of a block with the most tokens.
    fn room(&self) -> Vec<f32> {
        vec![0.0; TOKENS[1].min((BLOCK / self.wide()).max(TOKENS[0])) * self.wide()]
    }

    /// Whether there is enough to do for more than one thread.
    fn parallel(&self) -> bool {
        let total = self.offsets[self.offsets.len() - 1];
        flops(total, self.heads, self.features(), self.value_dim) >= PARALLEL_FLOPS
    }

    fn check(&self) {
        let rows = self.offsets[self.offsets.len() - 1] * self.heads;
        assert!(
            self.heads > 0 && self.dim > 0 && self.value_dim > 0,
            "feature attention heads and dims"
        );
        assert_eq!(self.q.len(), rows * self.dim, "feature attention q");
        assert_eq!(self.k.len(), rows * self.dim, "feature attention k");
        assert_eq!(self.v.len(), rows * self.value_dim, "feature attention v");
        self.map.check(rows / self.heads, self.dim);
    }

    /// The features of one head of a block.
    fn head<'v>(&self, phi: &'v [f32], head: usize) -> Matrix<'v> {
        self.columns(phi, self.map.width(self.dim), head)
    }

    /// One head of rows `[tokens, heads, dim]`.
    fn columns<'v>(&self, rows: &'v [f32], dim: usize, head: usize) -> Matrix<'v> {
        Matrix {
            data: &rows[head * dim..],
            strides: (self.heads * dim, 1),
        }
    }

    /// Adds `phi^T values` of a block to the sums `[features, value_dim]` of each head, which are `stride` apart.
    fn add_products(&self, phi: &[f32], values: &[f32], sums: &mut [f32], stride: usize) {
        let (features, width) = (self.features(), self.value_dim);
        let shape = [features, values.len() / (self.heads * width), width];
        for (head, sums) in sums.chunks_mut(stride).enumerate() {
            let left = self.head(phi, head).transposed();
            let rows = self.columns(values, width, head);
            product(shape, 1.0, left, rows, sums, (width, 1), true);
        }
    }

    /// `to [tokens, heads, n] (+)= from [tokens, heads, inner] matrix` with `[inner, n]` of each head, which are `stride` apart.
    fn through(
        &self,
        (from, inner, from_stride): (&[f32], usize, usize),
        (matrices, stride): (&[f32], usize),
        (to, n, to_stride): (&mut [f32], usize, usize),
        add: bool,
    ) {
        let tokens = from.len() / (self.heads * from_stride);
        for (head, matrix) in matrices.chunks(stride).enumerate() {
            let left = self.columns(from, from_stride, head);
            let out = &mut to[head * to_stride..];
            let strides = (self.heads * to_stride, 1);
            let right = Matrix::rows(matrix, n);
            product([tokens, inner, n], 1.0, left, right, out, strides, add);
        }
    }

    /// S or its gradient, the first of `stride` values of each head of each sequence, as `[value_dim, features]`.
    fn turned(&self, sums: &[f32], stride: usize) -> Vec<f32> {
        let (features, width) = (self.features(), self.value_dim);
        let mut turned = vec![0.0; self.sequences() * self.heads * features * width];
        let heads = sums.chunks(stride).zip(turned.chunks_mut(features * width));
        each_if(self.parallel(), heads, |(from, to)| {
            transpose([features, width], 1.0, from, width, to, features);
        });
        turned
    }
}

/// The values of the parts, `width` for each token.
fn split<'v>(mut values: &'v mut [f32], width: usize, parts: &[Part]) -> Vec<&'v mut [f32]> {
    let mut split = Vec::with_capacity(parts.len());
    for part in parts {
        let (own, rest) = values.split_at_mut(part.tokens.len() * width);
        split.push(own);
        values = rest;
    }
    split
}
