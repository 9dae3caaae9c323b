//! The backward pass: chunks in reverse from the states at their borders, everything inside computed again.
#![allow(unsafe_code)]

use rayon::prelude::*;

use super::chunk::{Chunk, Inputs, Kind, decayed, to_end};
use super::forward::Scratch;
use super::gram::gram_backward;
use super::{Gate, Problem, Write};
use crate::disjoint::Disjoint;
use crate::gemm::{Matrix, product};
use crate::math::exp;
use crate::simd::dispatched;

/// Gradients of every input.
#[derive(Debug)]
pub struct Gradients {
    /// `[total, key_heads, key_dim]`.
    pub q: Vec<f32>,
    /// `[total, key_heads, key_dim]`.
    pub k: Vec<f32>,
    /// `[total, heads, value_dim]`.
    pub v: Vec<f32>,
    /// As the gate; `None` without one.
    pub gate: Option<Vec<f32>>,
    /// `[total, heads]`; `None` without the delta rule.
    pub beta: Option<Vec<f32>>,
    /// `[sequences, heads, key_dim, value_dim]`.
    pub initial: Vec<f32>,
}

/// Where a head writes its gradients.
struct Targets<'a> {
    q: Disjoint<'a>,
    k: Disjoint<'a>,
    v: Disjoint<'a>,
    gate: Disjoint<'a>,
    beta: Disjoint<'a>,
}

/// Gradients for `d_o [total, heads, value_dim]` and, where given, for the final state. `chunk_states` is what the
/// forward pass saved.
pub fn backward(
    problem: &Problem,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    gate: Gate,
    write: Write,
    chunk_states: &[f32],
    d_o: &[f32],
    d_final: Option<&[f32]>,
) -> Gradients {
    problem.check(q, k, v, gate, write);
    let inputs = Inputs { q, k, v, gate, write };
    let (heads, size, total) = (problem.heads, problem.state(), problem.total());
    let chunks = problem.chunks();
    assert_eq!(chunk_states.len(), chunks[chunks.len() - 1] * heads * size, "saved states");
    assert_eq!(d_o.len(), v.len(), "gradient of the output");
    let mut initial = match d_final {
        Some(d_final) => d_final.to_vec(),
        None => vec![0.0; problem.sequences() * heads * size],
    };
    // Every head writes its own query and key gradients; those of a group are summed after.
    let mut dq = vec![0.0; total * heads * problem.key_dim];
    let mut dk = dq.clone();
    let mut dv = vec![0.0; v.len()];
    let gates = match gate {
        Gate::None => 0,
        Gate::Scalar(gate) | Gate::Vector(gate) => gate.len(),
    };
    let mut d_gate = vec![0.0; gates];
    let betas = if matches!(write, Write::Delta(_)) { total * heads } else { 0 };
    let mut d_beta = vec![0.0; betas];
    let targets = Targets {
        q: Disjoint::new(&mut dq),
        k: Disjoint::new(&mut dk),
        v: Disjoint::new(&mut dv),
        gate: Disjoint::new(&mut d_gate),
        beta: Disjoint::new(&mut d_beta),
    };
    initial
        .par_chunks_exact_mut(size.max(1))
        .enumerate()
        .for_each(|(task, d_state)| {
            let (sequence, head) = (task / heads, task % heads);
            let pair = &problem.offsets[sequence..sequence + 2];
            run_head(
                problem, &inputs, pair, head, chunks[sequence], chunk_states, d_o, d_state, &targets,
            );
        });
    let group = heads / problem.key_heads;
    Gradients {
        q: sum_groups(dq, group, problem.key_dim),
        k: sum_groups(dk, group, problem.key_dim),
        v: dv,
        gate: (gates > 0).then_some(d_gate),
        beta: (betas > 0).then_some(d_beta),
        initial,
    }
}

/// Sums neighbouring rows of `width` values in groups of `group`.
fn sum_groups(values: Vec<f32>, group: usize, width: usize) -> Vec<f32> {
    if group == 1 {
        return values;
    }
    let mut sums = vec![0.0; values.len() / group];
    sums.par_chunks_exact_mut(width.max(1))
        .zip(values.par_chunks_exact(group * width.max(1)))
        .for_each(|(sum, rows)| {
            for row in rows.chunks_exact(width) {
                sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
        });
    sums
}

fn plain(data: &[f32], columns: usize) -> Matrix<'_> {
    Matrix { data, strides: (columns, 1) }
}

fn turned(data: &[f32], columns: usize) -> Matrix<'_> {
    Matrix { data, strides: (1, columns) }
}

/// Gradients of one chunk.
struct Local {
    d_o: Vec<f32>,
    du: Vec<f32>,
    dp: Vec<f32>,
    dm: Vec<f32>,
    /// Of the scaled queries, all uses.
    dq: Vec<f32>,
    /// Of the keys where they stand with a positive exponent.
    dk_row: Vec<f32>,
    /// Of the keys where they stand with a negative exponent.
    dk_column: Vec<f32>,
    /// A product before its decay factor, `[len, key_dim]`.
    t: Vec<f32>,
    d_beta: Vec<f32>,
    d_end: Vec<f32>,
    before: Vec<f32>,
}

dispatched! {
    fn run_head<'a>(
        problem: &'a Problem<'a>,
        inputs: &'a Inputs<'a>,
        pair: &'a [usize],
        head: usize,
        first: usize,
        chunk_states: &'a [f32],
        d_o: &'a [f32],
        d_state: &'a mut [f32],
        targets: &'a Targets<'a>,
    ) {
        let (heads, size) = (problem.heads, problem.state());
        let (kd, vd, cl) = (problem.key_dim, problem.value_dim, problem.chunk_len);
        if pair[1] == pair[0] {
            return;
        }
        let mut s = Scratch::new(problem, inputs);
        let mut l = Local {
            d_o: vec![0.0; cl * vd],
            du: vec![0.0; cl * vd],
            dp: vec![0.0; cl * cl],
            dm: vec![0.0; cl * cl],
            dq: vec![0.0; cl * kd],
            dk_row: vec![0.0; cl * kd],
            dk_column: vec![0.0; cl * kd],
            t: vec![0.0; cl * kd],
            d_beta: vec![0.0; cl],
            d_end: vec![0.0; kd],
            before: vec![0.0; size],
        };
        for index in (0..(pair[1] - pair[0]).div_ceil(cl)).rev() {
            let start = pair[0] + index * cl;
            let len = cl.min(pair[1] - start);
            let at = ((first + index) * heads + head) * size;
            let state = &chunk_states[at..at + size];
            s.chunk.load(problem, inputs, head, start, len);
            s.solve(state);
            for t in 0..len {
                let row = ((start + t) * heads + head) * vd;
                l.d_o[t * vd..(t + 1) * vd].copy_from_slice(&d_o[row..row + vd]);
            }
            one_chunk(&mut s, &mut l, state, d_state);
            for t in 0..len {
                let one = (start + t) * heads + head;
                let row = t * kd..(t + 1) * kd;
                // SAFETY: this token of this head is this task's alone, in each of the gradients.
                let (dq, dk, dv) = unsafe {
                    let (q, k) = (targets.q.part(one * kd, kd), targets.k.part(one * kd, kd));
                    (q, k, targets.v.part(one * vd, vd))
                };
                for (to, from) in dq.iter_mut().zip(&l.dq[row.clone()]) {
                    *to = from * problem.scale;
                }
                let keys = l.dk_row[row.clone()].iter().zip(&l.dk_column[row]);
                for (to, (a, b)) in dk.iter_mut().zip(keys) {
                    *to = a + b;
                }
                dv.copy_from_slice(&l.du[t * vd..(t + 1) * vd]);
                if s.chunk.delta {
                    // SAFETY: as above.
                    let d_beta = unsafe { targets.beta.part(one, 1) };
                    d_beta[0] = l.d_beta[t];
                }
            }
            gates(&s.chunk, &l, heads, head, start, &targets.gate);
        }
    }
}

/// Fills `l` with the gradients of the loaded chunk (`du` with that of the values) and turns `d_state` from the gradient
/// of the state after the chunk into that of the state before it.
#[inline(always)]
fn one_chunk(s: &mut Scratch, l: &mut Local, state: &[f32], d_state: &mut [f32]) {
    let (len, kd, vd) = (s.chunk.len, s.chunk.key_dim, s.chunk.value_dim);
    let last = len - 1;
    // O = (q exp(g)) S + P U.
    product([len, len, vd], turned(&s.p, len), plain(&l.d_o, vd), &mut l.du, (vd, 1), false);
    product([len, vd, len], plain(&l.d_o, vd), turned(&s.u, vd), &mut l.dp, (len, 1), false);
    lower(&mut l.dp, len, true);
    product([len, vd, kd], plain(&l.d_o, vd), turned(state, vd), &mut l.dq, (kd, 1), false);
    scale_by_decay(&s.chunk, &mut l.dq);
    decayed(&s.chunk, &s.chunk.q, &mut s.a);
    product([kd, len, vd], turned(&s.a, kd), plain(&l.d_o, vd), &mut l.before, (vd, 1), false);
    // S' = exp(g_end) S + (k exp(g_end - g))^T U.
    to_end(&s.chunk, &s.chunk.k, &mut s.a);
    product([len, kd, vd], plain(&s.a, kd), plain(d_state, vd), &mut l.du, (vd, 1), true);
    product([len, vd, kd], plain(&s.u, vd), turned(d_state, vd), &mut l.dk_column, (kd, 1), false);
    for i in 0..kd {
        let end = s.chunk.log_decay(last, i);
        let row = i * vd..(i + 1) * vd;
        let decay = exp(end);
        let held: f32 = state[row.clone()].iter().zip(&d_state[row.clone()]).map(|(a, b)| a * b).sum();
        l.d_end[i] = held * decay;
        for (to, from) in l.before[row.clone()].iter_mut().zip(&d_state[row]) {
            *to += decay * from;
        }
        for t in 0..len {
            let value = &mut l.dk_column[t * kd + i];
            *value *= exp(end - s.chunk.log_decay(t, i));
            l.d_end[i] += *value * s.chunk.k[t * kd + i];
        }
    }
    l.dk_row[..len * kd].fill(0.0);
    if s.chunk.delta {
        delta(s, l, state);
    }
    // P = gram(q, k).
    gram_backward(&s.chunk, &s.chunk.q, &s.chunk.k, &l.dp, &mut l.dq, &mut l.dk_column, &mut s.scaled);
    d_state.copy_from_slice(&l.before);
}

/// The delta rule: `u_i = beta_i (e_i - sum_{j<i} M_ij u_j)`, `e = v - (k exp(g)) S`. On entry `du` is the gradient of
/// `u`, on exit that of the values.
#[inline(always)]
fn delta(s: &mut Scratch, l: &mut Local, state: &[f32]) {
    let (len, kd, vd) = (s.chunk.len, s.chunk.key_dim, s.chunk.value_dim);
    // Backward substitution: x_i is the gradient of beta_i (...), row by row from the last.
    for i in (0..len).rev() {
        let beta = s.chunk.beta[i];
        let (before, rest) = l.du.split_at_mut(i * vd);
        let x = &mut rest[..vd];
        let mut inner = 0.0f32;
        for c in 0..vd {
            // (e_i - sum M u) = u_i / beta_i; recomputed below without dividing.
            inner += x[c] * s.e[i * vd + c];
        }
        for j in 0..i {
            let weight = s.m[i * len + j];
            let u = &s.u[j * vd..(j + 1) * vd];
            let dot: f32 = x.iter().zip(u).map(|(a, b)| a * b).sum();
            inner -= weight * dot;
            l.dm[i * len + j] = -beta * dot;
            for (to, from) in before[j * vd..(j + 1) * vd].iter_mut().zip(x.iter()) {
                *to -= beta * weight * from;
            }
        }
        l.dm[i * len + i..(i + 1) * len].fill(0.0);
        l.d_beta[i] = inner;
        for value in x {
            *value *= beta;
        }
    }
    // e = v - (k exp(g)) S.
    product([len, vd, kd], plain(&l.du, vd), turned(state, vd), &mut l.t, (kd, 1), false);
    decayed(&s.chunk, &s.chunk.k, &mut s.a);
    for value in &mut s.a[..len * kd] {
        *value = -*value;
    }
    product([kd, len, vd], turned(&s.a, kd), plain(&l.du, vd), &mut l.before, (vd, 1), true);
    scale_by_decay(&s.chunk, &mut l.t);
    for (to, from) in l.dk_row[..len * kd].iter_mut().zip(&l.t) {
        *to -= from;
    }
    gram_backward(&s.chunk, &s.chunk.k, &s.chunk.k, &l.dm, &mut l.dk_row, &mut l.dk_column, &mut s.scaled);
}

/// `values[t, i] *= exp(g_ti)`.
#[inline(always)]
fn scale_by_decay(chunk: &Chunk, values: &mut [f32]) {
    let kd = chunk.key_dim;
    match chunk.kind {
        Kind::None => {}
        Kind::Scalar => {
            for t in 0..chunk.len {
                let factor = exp(chunk.g[t]);
                values[t * kd..(t + 1) * kd].iter_mut().for_each(|value| *value *= factor);
            }
        }
        Kind::Vector => {
            let all = chunk.len * kd;
            for (value, g) in values[..all].iter_mut().zip(&chunk.g[..all]) {
                *value *= exp(*g);
            }
        }
    }
}

/// Zeroes what is above the diagonal (and the diagonal unless kept).
#[inline(always)]
fn lower(d: &mut [f32], len: usize, keep_diagonal: bool) {
    for i in 0..len {
        let from = i + usize::from(keep_diagonal);
        d[i * len + from..(i + 1) * len].fill(0.0);
    }
}

/// Gradient of the log decays: `q dq + k dk` where the exponent is positive, `- k dk` where it is negative, what hangs
/// on the chunk's end, all summed from the end of the chunk.
#[inline(always)]
fn gates(chunk: &Chunk, l: &Local, heads: usize, head: usize, start: usize, target: &Disjoint) {
    let (len, kd) = (chunk.len, chunk.key_dim);
    match chunk.kind {
        Kind::None => {}
        Kind::Scalar => {
            let mut sum: f32 = l.d_end[..kd].iter().sum();
            for t in (0..len).rev() {
                for i in t * kd..(t + 1) * kd {
                    sum += chunk.q[i] * l.dq[i] + chunk.k[i] * (l.dk_row[i] - l.dk_column[i]);
                }
                // SAFETY: this token of this head is this task's alone.
                let to = unsafe { target.part((start + t) * heads + head, 1) };
                to[0] = sum;
            }
        }
        Kind::Vector => {
            let mut sums = l.d_end.clone();
            for t in (0..len).rev() {
                // SAFETY: this token of this head is this task's alone.
                let to = unsafe { target.part(((start + t) * heads + head) * kd, kd) };
                for i in 0..kd {
                    let at = t * kd + i;
                    sums[i] += chunk.q[at] * l.dq[at] + chunk.k[at] * (l.dk_row[at] - l.dk_column[at]);
                    to[i] = sums[i];
                }
            }
        }
    }
}
