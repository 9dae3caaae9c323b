//! `gram(X, Y)_ij = sum_c X_ic Y_jc D_ijc` for `j <= i`, `D_ij` the product of the decays of tokens `j+1..=i`, and its
//! backward.
//!
//! A decay per head multiplies a plain product. With a decay per key feature `D` does not factor over the whole chunk
//! without overflow. So blocks of 16 rows left of the diagonal are products of operands scaled around the block's first
//! row, where both factors are at most one; within the block on the diagonal a row of Y is decayed from token to token.

use super::chunk::{Chunk, Kind, flush, room, running};
use crate::gemm::{Matrix, lower_product, lower_transposed_product, product, product_below};
use crate::simd::dot;
use crate::transpose::transpose;

/// Rows of a block of the second level.
pub(super) const BLOCK: usize = 16;

/// Scratch.
pub(super) struct Scaled {
    /// X scaled, and the factors, `[BLOCK, key_dim]`.
    rows: Vec<f32>,
    row_factors: Vec<f32>,
    /// Y scaled, and the factors, `[chunk_len, key_dim]`.
    columns: Vec<f32>,
    column_factors: Vec<f32>,
    d_rows: Vec<f32>,
    d_columns: Vec<f32>,
    /// `[chunk_len, chunk_len]`: D of a scalar gate, or a gradient times it.
    pub(super) mask: Vec<f32>,
    masked: Vec<f32>,
    /// Y turned over, `[key_dim, chunk_len]`; without a gate for each feature.
    turned: Vec<f32>,
    /// `[key_dim]`.
    row: Vec<f32>,
}

impl Scaled {
    pub(super) fn new(slots: usize, key_dim: usize, kind: Kind) -> Self {
        let vector = usize::from(kind == Kind::Vector) * key_dim;
        let scalar = usize::from(kind == Kind::Scalar) * slots * slots;
        Scaled {
            rows: room(BLOCK * vector),
            row_factors: room(BLOCK * vector),
            columns: room(slots * vector),
            column_factors: room(slots * vector),
            d_rows: room(BLOCK * vector),
            d_columns: room(slots * vector),
            mask: room(scalar),
            masked: room(scalar),
            turned: room(slots * (key_dim - vector)),
            row: room(vector),
        }
    }

    /// With a scalar gate, fills the mask `[len, len]`: D on and below the diagonal, zero above.
    #[inline(always)]
    pub(super) fn fill_mask(&mut self, chunk: &Chunk) {
        if chunk.kind != Kind::Scalar {
            return;
        }
        let len = chunk.len;
        for i in 0..len {
            let (before, row) = self.mask[..(i + 1) * len].split_at_mut(i * len);
            row.fill(0.0);
            if i > 0 {
                let decay = chunk.decay[i];
                for (to, from) in row[..i].iter_mut().zip(&before[(i - 1) * len..]) {
                    *to = flush(from * decay);
                }
            }
            row[i] = 1.0;
        }
    }

    /// Operands of the blocks left of the diagonal of rows `first..last`, scaled around row `first`.
    #[inline(always)]
    fn scale_block(&mut self, chunk: &Chunk, x: &[f32], y: &[f32], first: usize, last: usize) {
        let kd = chunk.key_dim;
        let (rows, columns) = ((last - first) * kd, first * kd);
        let factors = &mut self.row_factors[..rows];
        factors[..kd].fill(1.0);
        if rows > kd {
            running(
                &chunk.decay[(first + 1) * kd..last * kd],
                kd,
                &mut factors[kd..],
            );
        }
        let x = &x[first * kd..last * kd];
        for ((to, from), factor) in self.rows[..rows].iter_mut().zip(x).zip(&*factors) {
            *to = from * factor;
        }
        // The factor of column j is the product of the decays of j+1..=first.
        let factors = &mut self.column_factors[..columns];
        for j in (0..first).rev() {
            let decay = &chunk.decay[(j + 1) * kd..(j + 2) * kd];
            let (row, after) = factors[j * kd..].split_at_mut(kd);
            if j + 1 == first {
                row.copy_from_slice(decay);
            } else {
                for ((to, from), decay) in row.iter_mut().zip(&*after).zip(decay) {
                    *to = flush(from * decay);
                }
            }
        }
        for ((to, from), factor) in self.columns[..columns].iter_mut().zip(y).zip(&*factors) {
            *to = from * factor;
        }
    }
}

/// Zeroes what is above the diagonal of `[len, len]`.
#[inline(always)]
fn lower(d: &mut [f32], len: usize) {
    for i in 0..len {
        d[i * len + i + 1..(i + 1) * len].fill(0.0);
    }
}

/// Writes `out [len, len]`: the gram on and below the diagonal, zero above it. Needs the mask.
#[inline(always)]
pub(super) fn gram(chunk: &Chunk, x: &[f32], y: &[f32], out: &mut [f32], s: &mut Scaled) {
    let (len, kd) = (chunk.len, chunk.key_dim);
    if chunk.kind != Kind::Vector {
        let turned = &mut s.turned[..len * kd];
        transpose([len, kd], 1.0, y, kd, turned, len);
        let (a, b) = (Matrix::rows(x, kd), Matrix::rows(turned, len));
        product_below([len, kd], 1.0, a, b, out, len);
        if chunk.kind == Kind::Scalar {
            for (value, mask) in out[..len * len].iter_mut().zip(&s.mask[..len * len]) {
                *value *= mask;
            }
        } else {
            lower(out, len);
        }
        return;
    }
    for first in (0..len).step_by(BLOCK) {
        let last = (first + BLOCK).min(len);
        for i in first..last {
            out[i * len + first..(i + 1) * len].fill(0.0);
        }
        if first > 0 {
            s.scale_block(chunk, x, y, first, last);
            let sizes = [last - first, kd, first];
            let a = Matrix::rows(&s.rows, kd);
            let b = Matrix::rows(&s.columns, kd).transposed();
            product(sizes, 1.0, a, b, &mut out[first * len..], (len, 1), false);
        }
        for j in first..last {
            let row = &mut s.row[..kd];
            row.copy_from_slice(&y[j * kd..(j + 1) * kd]);
            out[j * len + j] = dot(&x[j * kd..(j + 1) * kd], row);
            for i in j + 1..last {
                let decay = &chunk.decay[i * kd..(i + 1) * kd];
                for (value, decay) in row.iter_mut().zip(decay) {
                    *value = flush(*value * decay);
                }
                out[i * len + j] = dot(&x[i * kd..(i + 1) * kd], row);
            }
        }
    }
}

/// Adds the gradients of `x` and `y` for a gradient `d [len, len]` of the gram; what is above the diagonal of `d` does not
/// count. Needs the mask.
#[inline(always)]
pub(super) fn gram_backward(
    chunk: &Chunk,
    x: &[f32],
    y: &[f32],
    d: &mut [f32],
    dx: &mut [f32],
    dy: &mut [f32],
    s: &mut Scaled,
) {
    let (len, kd) = (chunk.len, chunk.key_dim);
    if chunk.kind != Kind::Vector {
        let d: &[f32] = if chunk.kind == Kind::Scalar {
            let masked = &mut s.masked[..len * len];
            for ((to, from), mask) in masked.iter_mut().zip(&*d).zip(&s.mask) {
                *to = from * mask;
            }
            masked
        } else {
            lower(d, len);
            d
        };
        let (d, sizes) = (Matrix::rows(d, len), [len, kd]);
        lower_product(sizes, d, Matrix::rows(y, kd), dx, kd, true);
        lower_transposed_product(sizes, d, Matrix::rows(x, kd), dy, kd, true);
        return;
    }
    for first in (0..len).step_by(BLOCK) {
        let last = (first + BLOCK).min(len);
        if first > 0 {
            s.scale_block(chunk, x, y, first, last);
            let rows = last - first;
            let block = Matrix::rows(&d[first * len..], len);
            let (a, b) = (Matrix::rows(&s.rows, kd), Matrix::rows(&s.columns, kd));
            product(
                [rows, first, kd],
                1.0,
                block,
                b,
                &mut s.d_rows,
                (kd, 1),
                false,
            );
            product(
                [first, rows, kd],
                1.0,
                block.transposed(),
                a,
                &mut s.d_columns,
                (kd, 1),
                false,
            );
            let dx = &mut dx[first * kd..last * kd];
            for ((to, from), factor) in dx.iter_mut().zip(&s.d_rows).zip(&s.row_factors) {
                *to += from * factor;
            }
            let dy = &mut dy[..first * kd];
            for ((to, from), factor) in dy.iter_mut().zip(&s.d_columns).zip(&s.column_factors) {
                *to += from * factor;
            }
        }
        for j in first..last {
            // Forwards: the decayed row of y, for dx.
            let row = &mut s.row[..kd];
            row.copy_from_slice(&y[j * kd..(j + 1) * kd]);
            for i in j..last {
                if i > j {
                    for (value, decay) in row.iter_mut().zip(&chunk.decay[i * kd..(i + 1) * kd]) {
                        *value = flush(*value * decay);
                    }
                }
                let weight = d[i * len + j];
                for (to, from) in dx[i * kd..(i + 1) * kd].iter_mut().zip(&*row) {
                    *to = weight.mul_add(*from, *to);
                }
            }
            // Backwards: the same decays applied to the weighted rows of x, for dy.
            row.fill(0.0);
            for i in (j..last).rev() {
                let weight = d[i * len + j];
                let x = &x[i * kd..(i + 1) * kd];
                if i > j {
                    let decay = &chunk.decay[i * kd..(i + 1) * kd];
                    for ((value, x), decay) in row.iter_mut().zip(x).zip(decay) {
                        *value = flush(weight.mul_add(*x, *value) * decay);
                    }
                } else {
                    for (value, x) in row.iter_mut().zip(x) {
                        *value = weight.mul_add(*x, *value);
                    }
                }
            }
            for (to, from) in dy[j * kd..(j + 1) * kd].iter_mut().zip(&*row) {
                *to += from;
            }
        }
    }
}
