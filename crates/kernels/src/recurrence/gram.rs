//! `gram(X, Y)_ij = sum_k X_ik Y_jk exp(g_ik - g_jk)` for `j <= i`, and its backward.
//!
//! With a decay per key feature the exponent does not factor over the whole chunk without overflow. Blocks of 16 rows
//! off the diagonal are products of operands scaled around the block's first row, both exponents at most zero; blocks on
//! the diagonal are summed element by element.

use super::chunk::{Chunk, Kind};
use crate::gemm::{Matrix, product};
use crate::math::exp;

/// Rows of a block of the second level.
const BLOCK: usize = 16;

/// Scratch for scaled operands: two of `[chunk_len, key_dim]`.
pub(super) struct Scaled {
    pub(super) rows: Vec<f32>,
    pub(super) columns: Vec<f32>,
    pub(super) d_rows: Vec<f32>,
    pub(super) d_columns: Vec<f32>,
    pub(super) block: Vec<f32>,
}

impl Scaled {
    pub(super) fn new(chunk_len: usize, key_dim: usize) -> Self {
        let size = chunk_len * key_dim;
        Scaled {
            rows: vec![0.0; BLOCK * key_dim],
            columns: vec![0.0; size],
            d_rows: vec![0.0; BLOCK * key_dim],
            d_columns: vec![0.0; size],
            block: vec![0.0; chunk_len * chunk_len],
        }
    }
}

fn matrix(data: &[f32], columns: usize) -> Matrix<'_> {
    Matrix {
        data,
        strides: (columns, 1),
    }
}

fn transposed(data: &[f32], columns: usize) -> Matrix<'_> {
    Matrix {
        data,
        strides: (1, columns),
    }
}

/// Operands of the off-diagonal blocks of rows `first..last`, scaled around row `first`.
#[inline(always)]
fn scale_block(chunk: &Chunk, x: &[f32], y: &[f32], first: usize, last: usize, s: &mut Scaled) {
    let kd = chunk.key_dim;
    let anchor = &chunk.g[first * kd..(first + 1) * kd];
    for t in first..last {
        for i in 0..kd {
            let at = t * kd + i;
            s.rows[(t - first) * kd + i] = x[at] * exp(chunk.g[at] - anchor[i]);
        }
    }
    for t in 0..first {
        for i in 0..kd {
            let at = t * kd + i;
            s.columns[at] = y[at] * exp(anchor[i] - chunk.g[at]);
        }
    }
}

/// Writes `out [len, len]` (row stride `len`): the gram on and below the diagonal, zero above it.
#[inline(always)]
pub(super) fn gram(chunk: &Chunk, x: &[f32], y: &[f32], out: &mut [f32], s: &mut Scaled) {
    let (len, kd) = (chunk.len, chunk.key_dim);
    if chunk.kind != Kind::Vector {
        product([len, kd, len], matrix(x, kd), transposed(y, kd), out, (len, 1), false);
        for i in 0..len {
            let row = &mut out[i * len..(i + 1) * len];
            if chunk.kind == Kind::Scalar {
                for j in 0..=i {
                    row[j] *= exp(chunk.g[i] - chunk.g[j]);
                }
            }
            row[i + 1..].fill(0.0);
        }
        return;
    }
    out[..len * len].fill(0.0);
    for first in (0..len).step_by(BLOCK) {
        let last = (first + BLOCK).min(len);
        if first > 0 {
            scale_block(chunk, x, y, first, last, s);
            let sizes = [last - first, kd, first];
            let (rows, columns) = (matrix(&s.rows, kd), transposed(&s.columns, kd));
            product(sizes, rows, columns, &mut out[first * len..], (len, 1), false);
        }
        for i in first..last {
            for j in first..=i {
                let (xi, yj) = (&x[i * kd..(i + 1) * kd], &y[j * kd..(j + 1) * kd]);
                let (gi, gj) = (&chunk.g[i * kd..(i + 1) * kd], &chunk.g[j * kd..(j + 1) * kd]);
                let mut sums = [0.0f32; 16];
                let mut c = 0;
                while c + 16 <= kd {
                    for l in 0..16 {
                        sums[l] += xi[c + l] * yj[c + l] * exp(gi[c + l] - gj[c + l]);
                    }
                    c += 16;
                }
                let mut sum: f32 = sums.iter().sum();
                while c < kd {
                    sum += xi[c] * yj[c] * exp(gi[c] - gj[c]);
                    c += 1;
                }
                out[i * len + j] = sum;
            }
        }
    }
}

/// Adds the gradients of `x` and `y` for a gradient `d [len, len]` that is zero above the diagonal.
#[inline(always)]
pub(super) fn gram_backward(
    chunk: &Chunk,
    x: &[f32],
    y: &[f32],
    d: &[f32],
    dx: &mut [f32],
    dy: &mut [f32],
    s: &mut Scaled,
) {
    let (len, kd) = (chunk.len, chunk.key_dim);
    if chunk.kind != Kind::Vector {
        let d = match chunk.kind {
            Kind::Scalar => {
                for i in 0..len {
                    for j in 0..len {
                        let factor = if j <= i { exp(chunk.g[i] - chunk.g[j]) } else { 0.0 };
                        s.block[i * len + j] = d[i * len + j] * factor;
                    }
                }
                &s.block[..len * len]
            }
            _ => d,
        };
        product([len, len, kd], matrix(d, len), matrix(y, kd), dx, (kd, 1), true);
        product([len, len, kd], transposed(d, len), matrix(x, kd), dy, (kd, 1), true);
        return;
    }
    for first in (0..len).step_by(BLOCK) {
        let last = (first + BLOCK).min(len);
        if first > 0 {
            scale_block(chunk, x, y, first, last, s);
            let rows = last - first;
            let block = Matrix {
                data: &d[first * len..],
                strides: (len, 1),
            };
            let back = Matrix {
                data: &d[first * len..],
                strides: (1, len),
            };
            product([rows, first, kd], block, matrix(&s.columns, kd), &mut s.d_rows, (kd, 1), false);
            product([first, rows, kd], back, matrix(&s.rows, kd), &mut s.d_columns, (kd, 1), false);
            let anchor = &chunk.g[first * kd..(first + 1) * kd];
            for t in first..last {
                for i in 0..kd {
                    let at = t * kd + i;
                    dx[at] += s.d_rows[(t - first) * kd + i] * exp(chunk.g[at] - anchor[i]);
                }
            }
            for t in 0..first {
                for i in 0..kd {
                    let at = t * kd + i;
                    dy[at] += s.d_columns[at] * exp(anchor[i] - chunk.g[at]);
                }
            }
        }
        for i in first..last {
            for j in first..=i {
                let weight = d[i * len + j];
                let (a, b) = (i * kd, j * kd);
                for c in 0..kd {
                    let factor = weight * exp(chunk.g[a + c] - chunk.g[b + c]);
                    dx[a + c] += factor * y[b + c];
                    dy[b + c] += factor * x[a + c];
                }
            }
        }
    }
}
