//! The writes of a chunk: `U = V`, or for the delta rule the unit lower triangular system
//! `(I + diag(beta) M) U = diag(beta) (V - (K from_start) S)`, by substitution in blocks of 16 rows, and its transpose.

use super::chunk::{Chunk, Inputs, room};
use super::gram::{BLOCK, Scaled, gram};
use super::{Problem, Write};
use crate::gemm::{Matrix, product};

/// Scratch of one head; all that the forward pass derives from a loaded chunk.
pub(super) struct Scratch {
    pub(super) chunk: Chunk,
    pub(super) scaled: Scaled,
    /// A decayed copy of queries or keys, `[len, key_dim]`.
    pub(super) a: Vec<f32>,
    /// Gram of queries and keys, `[len, len]`.
    pub(super) p: Vec<f32>,
    /// Gram of keys, `[len, len]`; its diagonal does not count.
    pub(super) m: Vec<f32>,
    /// `[len, value_dim]`.
    pub(super) u: Vec<f32>,
    /// `V - (K from_start) S - M U`: what `beta` multiplies, `[len, value_dim]`.
    pub(super) residual: Vec<f32>,
    /// `[len, value_dim]`.
    pub(super) o: Vec<f32>,
}

impl Scratch {
    /// `slots` is the longest chunk.
    pub(super) fn new(problem: &Problem, inputs: &Inputs, slots: usize) -> Self {
        let (keys, values) = (slots * problem.key_dim, slots * problem.value_dim);
        let chunk = Chunk::new(problem, inputs, slots);
        let delta = usize::from(matches!(inputs.write, Write::Delta(_)));
        Scratch {
            scaled: Scaled::new(slots, problem.key_dim, chunk.kind),
            chunk,
            a: room(keys),
            p: room(slots * slots),
            m: room(delta * slots * slots),
            u: room(values),
            residual: room(delta * values),
            o: room(values),
        }
    }

    /// Fills `p`, `u` and, for the delta rule, `m` and `residual`, for the loaded chunk and the state before it.
    #[inline(always)]
    pub(super) fn solve(&mut self, state: &[f32]) {
        let chunk = &self.chunk;
        let (len, kd, vd) = (chunk.len, chunk.key_dim, chunk.value_dim);
        self.scaled.fill_mask(chunk);
        gram(chunk, &chunk.q, &chunk.k, &mut self.p, &mut self.scaled);
        if !chunk.delta {
            self.u[..len * vd].copy_from_slice(&chunk.v[..len * vd]);
            return;
        }
        gram(chunk, &chunk.k, &chunk.k, &mut self.m, &mut self.scaled);
        chunk.scaled(&chunk.from_start, &chunk.k, &mut self.a);
        let residual = &mut self.residual[..len * vd];
        residual.copy_from_slice(&chunk.v[..len * vd]);
        let (keys, state) = (Matrix::rows(&self.a, kd), Matrix::rows(state, vd));
        product([len, kd, vd], -1.0, keys, state, residual, (vd, 1), true);
        for first in (0..len).step_by(BLOCK) {
            let last = (first + BLOCK).min(len);
            if first > 0 {
                let m = Matrix::rows(&self.m[first * len..], len);
                let u = Matrix::rows(&self.u, vd);
                let rows = &mut residual[first * vd..];
                product([last - first, first, vd], -1.0, m, u, rows, (vd, 1), true);
            }
            for i in first..last {
                let row = &mut residual[i * vd..(i + 1) * vd];
                for j in first..i {
                    let weight = -self.m[i * len + j];
                    for (to, from) in row.iter_mut().zip(&self.u[j * vd..(j + 1) * vd]) {
                        *to = weight.mul_add(*from, *to);
                    }
                }
                let beta = chunk.beta[i];
                for (to, from) in self.u[i * vd..(i + 1) * vd].iter_mut().zip(&*row) {
                    *to = beta * from;
                }
            }
        }
    }

    /// The transposed system for `x`: on entry the gradient of U, on exit that of `residual`'s right-hand side, which is
    /// `beta` times the gradient of `beta residual`. `d_beta` gets the gradient of beta.
    #[inline(always)]
    pub(super) fn solve_back(&self, x: &mut [f32], d_beta: &mut [f32]) {
        let chunk = &self.chunk;
        let (len, vd) = (chunk.len, chunk.value_dim);
        for block in (0..len.div_ceil(BLOCK)).rev() {
            let first = block * BLOCK;
            let last = (first + BLOCK).min(len);
            let (before, after) = x[..len * vd].split_at_mut(last * vd);
            if last < len {
                let m = Matrix::rows(&self.m[last * len + first..], len).transposed();
                let sizes = [last - first, len - last, vd];
                let rows = &mut before[first * vd..];
                product(sizes, -1.0, m, Matrix::rows(after, vd), rows, (vd, 1), true);
            }
            for i in (first..last).rev() {
                let (row, after) = before[i * vd..].split_at_mut(vd);
                for j in i + 1..last {
                    let weight = -self.m[j * len + i];
                    let from = &after[(j - i - 1) * vd..(j - i) * vd];
                    for (to, from) in row.iter_mut().zip(from) {
                        *to = weight.mul_add(*from, *to);
                    }
                }
                d_beta[i] = crate::simd::dot(row, &self.residual[i * vd..(i + 1) * vd]);
                let beta = chunk.beta[i];
                for value in row {
                    *value *= beta;
                }
            }
        }
    }

    /// Adds the chunk's writes to the state, which becomes the one after it.
    #[inline(always)]
    pub(super) fn advance(&mut self, state: &mut [f32]) {
        let chunk = &self.chunk;
        let (len, kd, vd) = (chunk.len, chunk.key_dim, chunk.value_dim);
        if chunk.kind != super::chunk::Kind::None {
            for (i, row) in state.chunks_exact_mut(vd).enumerate() {
                let factor = chunk.whole(i);
                for value in row {
                    *value *= factor;
                }
            }
        }
        chunk.scaled(&chunk.to_end, &chunk.k, &mut self.a);
        let keys = Matrix::rows(&self.a, kd).transposed();
        product(
            [kd, len, vd],
            1.0,
            keys,
            Matrix::rows(&self.u, vd),
            state,
            (vd, 1),
            true,
        );
    }
}
