//! Linear attention over the whole sequence, both ways, its feature maps computed within.
//!
//! `o_i = phi(q_i) S / (phi(q_i) . z)`, `S = sum_j phi(k_j)^T v_j`, `z = sum_j phi(k_j)` over all keys of a sequence
//! (Katharopoulos et al., arXiv 2006.16236; without the divisor where it is not asked for). No array of
//! `[time, heads, features]` is ever written: features are made block by block, again in the backward pass.
//!
//! Shapes: q and k `[total, heads, dim]`, v and o `[total, heads, value_dim]`; sequences are packed. Inside, [`ROWS`] tokens
//! of a head fill the lanes: everything is held transposed, `[features, ROWS]`, so that no sum goes across lanes.
//!
//! With `g_i = do_i / d_i`, `e_i = -(do_i . o_i) / d_i` and `d_i = phi(q_i) . z`: `dphi(q_i) = S g_i + z e_i`,
//! `dS = sum_i phi(q_i)^T g_i`, `dz = sum_i phi(q_i) e_i`, `dphi(k_j) = dS v_j + dz`, `dv_j = dS^T phi(k_j)`.

mod backward;
mod forward;
mod map;
#[cfg(any(test, fuzzing))]
mod naive;
#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

pub use backward::{Grads, backward};
pub use forward::{Output, forward};
pub use map::Map;

use crate::disjoint::Disjoint;
use crate::gemm::{Matrix, product};
use crate::transpose::transpose;

/// Tokens of a block.
const ROWS: usize = 64;

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

/// One head of one sequence, the task of a thread.
#[derive(Clone, Copy, Debug)]
struct Head {
    head: usize,
    from: usize,
    to: usize,
}

impl Head {
    /// First token and count of each block.
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (self.from..self.to)
            .step_by(ROWS)
            .map(move |from| (from, ROWS.min(self.to - from)))
    }
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

    fn tasks(&self) -> Vec<Head> {
        let mut tasks = Vec::new();
        for pair in self.offsets.windows(2) {
            for head in 0..self.heads {
                tasks.push(Head {
                    head,
                    from: pair[0],
                    to: pair[1],
                });
            }
        }
        tasks
    }

    fn check(&self) {
        let rows = self.offsets[self.offsets.len() - 1] * self.heads;
        assert!(self.dim > 0 && self.value_dim > 0, "feature attention dims");
        assert_eq!(self.q.len(), rows * self.dim, "feature attention q");
        assert_eq!(self.k.len(), rows * self.dim, "feature attention k");
        assert_eq!(self.v.len(), rows * self.value_dim, "feature attention v");
        self.map.check(rows / self.heads.max(1), self.dim);
    }

    /// `count` rows from token `from` on out of `[total, heads, dim]`, times `factor`, as `[dim, ROWS]`.
    fn gather(
        &self,
        values: &[f32],
        dim: usize,
        (head, from, count): (usize, usize, usize),
        factor: f32,
        out: &mut [f32],
    ) {
        let at = (from * self.heads + head) * dim;
        transpose(
            [count, dim],
            factor,
            &values[at..],
            self.heads * dim,
            out,
            ROWS,
        );
    }

    /// Rows where they lie.
    fn rows<'v>(&self, values: &'v [f32], dim: usize, head: usize, from: usize) -> Matrix<'v> {
        Matrix {
            data: &values[(from * self.heads + head) * dim..],
            strides: (self.heads * dim, 1),
        }
    }

    /// Adds `phi^T values`, `[features, value_dim]`, of a block of `count` tokens from `from` on to `sums`.
    fn add_products(
        &self,
        phi: &[f32],
        values: &[f32],
        (head, from, count): (usize, usize, usize),
        sums: &mut [f32],
    ) {
        let shape = [self.features(), count, self.value_dim];
        let rows = self.rows(values, self.value_dim, head, from);
        let left = Matrix::rows(phi, ROWS);
        product(shape, 1.0, left, rows, sums, (self.value_dim, 1), true);
    }

    /// The reverse of [`Self::gather`], into rows that are the caller's own.
    #[allow(unsafe_code)]
    fn scatter(
        &self,
        values: &[f32],
        dim: usize,
        (head, from, count): (usize, usize, usize),
        factor: f32,
        turned: &mut [f32],
        out: &Disjoint,
    ) {
        transpose([dim, count], factor, values, ROWS, turned, dim);
        for (row, turned) in turned.chunks_exact(dim).enumerate().take(count) {
            let at = ((from + row) * self.heads + head) * dim;
            // SAFETY: a head of a sequence belongs to one task, and its rows to no other; the part is gone when this returns.
            unsafe { out.part(at, dim) }.copy_from_slice(turned);
        }
    }
}

/// `[n, ROWS] = left [n, inner] right [inner, ROWS]`, `left` at any strides.
fn across([n, inner]: [usize; 2], left: Matrix, right: &[f32], out: &mut [f32]) {
    let right = Matrix::rows(right, ROWS);
    product([n, inner, ROWS], 1.0, left, right, out, (ROWS, 1), false);
}
