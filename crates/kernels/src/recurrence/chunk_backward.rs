//! The gradients of one chunk.
#![allow(unsafe_code)]

use super::Problem;
use super::Write;
use super::chunk::{Chunk, Inputs, Kind, room};
use super::gram::gram_backward;
use super::solve::Scratch;
use crate::disjoint::Disjoint;
use crate::gemm::{Matrix, lower_transposed_product, product, product_below};
use crate::simd::{dot, sum};
use crate::transpose::transpose;

/// Gradients of one chunk.
pub(super) struct Local {
    pub(super) d_o: Vec<f32>,
    /// Of the writes, then of the values.
    pub(super) du: Vec<f32>,
    dp: Vec<f32>,
    dm: Vec<f32>,
    /// Of the scaled queries.
    pub(super) dq: Vec<f32>,
    /// Of the keys where they are the later token.
    pub(super) dk_row: Vec<f32>,
    /// Of the keys where they are the earlier token.
    pub(super) dk_column: Vec<f32>,
    /// The writes turned over, `[value_dim, len]`.
    turned: Vec<f32>,
    /// `[len, key_dim]`.
    product: Vec<f32>,
    pub(super) d_beta: Vec<f32>,
    /// Of the logarithm of the whole chunk's decay, `[key_dim]`.
    d_end: Vec<f32>,
    /// Of the state before the chunk.
    d_before: Vec<f32>,
}

impl Local {
    pub(super) fn new(problem: &Problem, inputs: &Inputs, slots: usize) -> Self {
        let (kd, vd) = (problem.key_dim, problem.value_dim);
        let delta = usize::from(matches!(inputs.write, Write::Delta(_)));
        Local {
            d_o: room(slots * vd),
            du: room(slots * vd),
            dp: room(slots * slots),
            dm: room(delta * slots * slots),
            dq: room(slots * kd),
            dk_row: room(slots * kd),
            dk_column: room(slots * kd),
            turned: room(slots * vd),
            product: room(delta * slots * kd),
            d_beta: room(slots),
            d_end: room(kd),
            d_before: room(problem.state()),
        }
    }
}

/// Fills `l` with the gradients of the loaded chunk (`du` with that of the values) and turns `d_state` from the gradient
/// of the state after the chunk into that of the state before it.
#[inline(always)]
pub(super) fn one_chunk(s: &mut Scratch, l: &mut Local, state: &[f32], d_state: &mut [f32]) {
    let chunk = &s.chunk;
    let (len, kd, vd) = (chunk.len, chunk.key_dim, chunk.value_dim);
    let keys = len * kd;
    let d_o = Matrix::rows(&l.d_o, vd);
    let (u, before) = (Matrix::rows(&s.u, vd), Matrix::rows(state, vd));
    // O = (q from_start) S + P U.
    let p = Matrix::rows(&s.p, len);
    lower_transposed_product([len, vd], p, d_o, &mut l.du, vd, false);
    let turned = &mut l.turned[..len * vd];
    transpose([len, vd], 1.0, &s.u, vd, turned, len);
    let u_turned = Matrix::rows(turned, len);
    product_below([len, vd], 1.0, d_o, u_turned, &mut l.dp, len);
    product(
        [len, vd, kd],
        1.0,
        d_o,
        before.transposed(),
        &mut l.dq,
        (kd, 1),
        false,
    );
    chunk.scale(&chunk.from_start, &mut l.dq);
    chunk.scaled(&chunk.from_start, &chunk.q, &mut s.a);
    let q = Matrix::rows(&s.a, kd).transposed();
    product([kd, len, vd], 1.0, q, d_o, &mut l.d_before, (vd, 1), false);
    // S' = whole S + (k to_end)^T U.
    chunk.scaled(&chunk.to_end, &chunk.k, &mut s.a);
    let (k, after) = (Matrix::rows(&s.a, kd), Matrix::rows(d_state, vd));
    product([len, kd, vd], 1.0, k, after, &mut l.du, (vd, 1), true);
    product(
        [len, vd, kd],
        1.0,
        u,
        after.transposed(),
        &mut l.dk_column,
        (kd, 1),
        false,
    );
    chunk.scale(&chunk.to_end, &mut l.dk_column);
    for i in 0..kd {
        let (decay, row) = (chunk.whole(i), i * vd..(i + 1) * vd);
        let d_row = &d_state[row.clone()];
        if chunk.kind != Kind::None {
            l.d_end[i] = decay * dot(&state[row.clone()], d_row);
        }
        for (to, from) in l.d_before[row].iter_mut().zip(d_row) {
            *to = decay.mul_add(*from, *to);
        }
    }
    if chunk.kind != Kind::None {
        let rows = l.dk_column[..keys].chunks_exact(kd);
        for (d_row, row) in rows.zip(chunk.k[..keys].chunks_exact(kd)) {
            for ((sum, d), k) in l.d_end.iter_mut().zip(d_row).zip(row) {
                *sum = d.mul_add(*k, *sum);
            }
        }
    }
    l.dk_row[..keys].fill(0.0);
    if chunk.delta {
        // U = beta residual, residual = V - (k from_start) S - M U.
        s.solve_back(&mut l.du, &mut l.d_beta);
        let chunk = &s.chunk;
        let dv = Matrix::rows(&l.du, vd);
        product_below([len, vd], -1.0, dv, u_turned, &mut l.dm, len);
        for i in 0..len {
            l.dm[i * len + i] = 0.0;
        }
        product(
            [len, vd, kd],
            -1.0,
            dv,
            before.transposed(),
            &mut l.product,
            (kd, 1),
            false,
        );
        chunk.scale(&chunk.from_start, &mut l.product);
        for (to, from) in l.dk_row[..keys].iter_mut().zip(&l.product) {
            *to += from;
        }
        chunk.scaled(&chunk.from_start, &chunk.k, &mut s.a);
        let k = Matrix::rows(&s.a, kd).transposed();
        product([kd, len, vd], -1.0, k, dv, &mut l.d_before, (vd, 1), true);
        let (x, scaled) = (&chunk.k, &mut s.scaled);
        gram_backward(
            chunk,
            x,
            x,
            &mut l.dm,
            &mut l.dk_row,
            &mut l.dk_column,
            scaled,
        );
    }
    let (x, y, scaled) = (&s.chunk.q, &s.chunk.k, &mut s.scaled);
    gram_backward(
        &s.chunk,
        x,
        y,
        &mut l.dp,
        &mut l.dq,
        &mut l.dk_column,
        scaled,
    );
    d_state.copy_from_slice(&l.d_before);
}

/// Gradient of the log decays: `q dq + k dk` where the token is the later one, `- k dk` where it is the earlier one, and
/// what hangs on the whole chunk's decay, summed from the end of the chunk.
#[inline(always)]
pub(super) fn gates(
    chunk: &Chunk,
    l: &Local,
    heads: usize,
    head: usize,
    start: usize,
    target: &Disjoint,
) {
    let (len, kd) = (chunk.len, chunk.key_dim);
    match chunk.kind {
        Kind::None => {}
        Kind::Scalar => {
            let mut total = sum(&l.d_end[..kd]);
            for t in (0..len).rev() {
                let row = t * kd..(t + 1) * kd;
                let k = &chunk.k[row.clone()];
                total += dot(&chunk.q[row.clone()], &l.dq[row.clone()])
                    + (dot(k, &l.dk_row[row.clone()]) - dot(k, &l.dk_column[row]));
                // SAFETY: this token of this head is this task's alone.
                let to = unsafe { target.part((start + t) * heads + head, 1) };
                to[0] = total;
            }
        }
        Kind::Vector => {
            for t in (0..len).rev() {
                // SAFETY: this token of this head is this task's alone.
                let to = unsafe { target.part(((start + t) * heads + head) * kd, kd) };
                let row = t * kd..(t + 1) * kd;
                if t + 1 == len {
                    to.copy_from_slice(&l.d_end);
                } else {
                    // SAFETY: as above; the next token's row is another one.
                    let after = unsafe { target.part(((start + t + 1) * heads + head) * kd, kd) };
                    to.copy_from_slice(after);
                }
                let queries = chunk.q[row.clone()].iter().zip(&l.dq[row.clone()]);
                let keys = l.dk_row[row.clone()].iter().zip(&l.dk_column[row.clone()]);
                let keys = chunk.k[row].iter().zip(keys);
                for ((to, (q, dq)), (k, (late, early))) in to.iter_mut().zip(queries).zip(keys) {
                    *to += q * dq + k * (late - early);
                }
            }
        }
    }
}
