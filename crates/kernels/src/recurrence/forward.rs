//! The forward pass.
#![allow(unsafe_code)]

use rayon::prelude::*;

use super::chunk::{Chunk, Inputs, decay_state, decayed, to_end};
use super::gram::{Scaled, gram};
use super::{Gate, Problem, Write};
use crate::disjoint::Disjoint;
use crate::gemm::{Matrix, product};
use crate::simd::dispatched;

/// What the forward pass gives.
#[derive(Debug)]
pub struct Output {
    /// `[total, heads, value_dim]`.
    pub o: Vec<f32>,
    /// `[sequences, heads, key_dim, value_dim]`.
    pub final_state: Vec<f32>,
    /// The state before every chunk, `[chunks, heads, key_dim, value_dim]`: what [`super::backward`] wants back. Empty
    /// unless asked for.
    pub chunk_states: Vec<f32>,
}

/// Scratch of one head.
pub(super) struct Scratch {
    pub(super) chunk: Chunk,
    pub(super) scaled: Scaled,
    /// `[len, key_dim]`.
    pub(super) a: Vec<f32>,
    /// Gram of queries and keys, `[len, len]`.
    pub(super) p: Vec<f32>,
    /// Gram of keys, `[len, len]`.
    pub(super) m: Vec<f32>,
    /// `[len, value_dim]`.
    pub(super) u: Vec<f32>,
    /// `v - (k exp(g)) S`, `[len, value_dim]`.
    pub(super) e: Vec<f32>,
    /// `[len, value_dim]`.
    pub(super) o: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(problem: &Problem, inputs: &Inputs) -> Self {
        let chunk = problem.chunk_len;
        let (keys, values) = (chunk * problem.key_dim, chunk * problem.value_dim);
        Scratch {
            chunk: Chunk::new(problem, inputs),
            scaled: Scaled::new(chunk, problem.key_dim),
            a: vec![0.0; keys],
            p: vec![0.0; chunk * chunk],
            m: vec![0.0; chunk * chunk],
            u: vec![0.0; values],
            e: vec![0.0; values],
            o: vec![0.0; values],
        }
    }

    /// Fills `p`, `u` and, for the delta rule, `m` and `e`, for the loaded chunk and the state before it.
    #[inline(always)]
    pub(super) fn solve(&mut self, state: &[f32]) {
        let (len, kd, vd) = (self.chunk.len, self.chunk.key_dim, self.chunk.value_dim);
        gram(&self.chunk, &self.chunk.q, &self.chunk.k, &mut self.p, &mut self.scaled);
        if !self.chunk.delta {
            self.u[..len * vd].copy_from_slice(&self.chunk.v[..len * vd]);
            return;
        }
        gram(&self.chunk, &self.chunk.k, &self.chunk.k, &mut self.m, &mut self.scaled);
        decayed(&self.chunk, &self.chunk.k, &mut self.a);
        product(
            [len, kd, vd],
            Matrix { data: &self.a, strides: (kd, 1) },
            Matrix { data: state, strides: (vd, 1) },
            &mut self.e,
            (vd, 1),
            false,
        );
        for (e, v) in self.e[..len * vd].iter_mut().zip(&self.chunk.v[..len * vd]) {
            *e = v - *e;
        }
        for i in 0..len {
            let beta = self.chunk.beta[i];
            let (before, rest) = self.u.split_at_mut(i * vd);
            let row = &mut rest[..vd];
            row.copy_from_slice(&self.e[i * vd..(i + 1) * vd]);
            for j in 0..i {
                let weight = self.m[i * len + j];
                for (to, from) in row.iter_mut().zip(&before[j * vd..(j + 1) * vd]) {
                    *to -= weight * from;
                }
            }
            for value in row {
                *value *= beta;
            }
        }
    }

    /// Adds the chunk's writes to the state, which becomes the one after it.
    #[inline(always)]
    pub(super) fn advance(&mut self, state: &mut [f32]) {
        let (len, kd, vd) = (self.chunk.len, self.chunk.key_dim, self.chunk.value_dim);
        to_end(&self.chunk, &self.chunk.k, &mut self.a);
        decay_state(&self.chunk, state);
        product(
            [kd, len, vd],
            Matrix { data: &self.a, strides: (1, kd) },
            Matrix { data: &self.u, strides: (vd, 1) },
            state,
            (vd, 1),
            true,
        );
    }
}

/// Runs the recurrence. `initial` is `[sequences, heads, key_dim, value_dim]`, zero when absent; `save` keeps the states
/// at chunk borders.
pub fn forward(
    problem: &Problem,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    gate: Gate,
    write: Write,
    initial: Option<&[f32]>,
    save: bool,
) -> Output {
    problem.check(q, k, v, gate, write);
    let inputs = Inputs { q, k, v, gate, write };
    let (heads, size, vd) = (problem.heads, problem.state(), problem.value_dim);
    let chunks = problem.chunks();
    let mut o = vec![0.0; problem.total() * heads * vd];
    let mut final_state = match initial {
        Some(initial) => {
            assert_eq!(initial.len(), problem.sequences() * heads * size, "initial state");
            initial.to_vec()
        }
        None => vec![0.0; problem.sequences() * heads * size],
    };
    let saved = if save { chunks[chunks.len() - 1] * heads * size } else { 0 };
    let mut chunk_states = vec![0.0; saved];
    let (outputs, border) = (Disjoint::new(&mut o), Disjoint::new(&mut chunk_states));
    final_state
        .par_chunks_exact_mut(size.max(1))
        .enumerate()
        .for_each(|(task, state)| {
            let (sequence, head) = (task / heads, task % heads);
            let pair = &problem.offsets[sequence..sequence + 2];
            let first = save.then_some(chunks[sequence]);
            run_head(problem, &inputs, pair, head, first, state, &outputs, &border);
        });
    Output {
        o,
        final_state,
        chunk_states,
    }
}

dispatched! {
    fn run_head<'a>(
        problem: &'a Problem<'a>,
        inputs: &'a Inputs<'a>,
        pair: &'a [usize],
        head: usize,
        first: Option<usize>,
        state: &'a mut [f32],
        outputs: &'a Disjoint<'a>,
        border: &'a Disjoint<'a>,
    ) {
        let (heads, size) = (problem.heads, problem.state());
        let (kd, vd) = (problem.key_dim, problem.value_dim);
        if pair[1] == pair[0] {
            return;
        }
        let mut s = Scratch::new(problem, inputs);
        for (index, start) in (pair[0]..pair[1]).step_by(problem.chunk_len).enumerate() {
            let len = problem.chunk_len.min(pair[1] - start);
            if let Some(first) = first {
                let at = ((first + index) * heads + head) * size;
                // SAFETY: this chunk of this head is this task's alone.
                unsafe { border.part(at, size) }.copy_from_slice(state);
            }
            s.chunk.load(problem, inputs, head, start, len);
            s.solve(state);
            decayed(&s.chunk, &s.chunk.q, &mut s.a);
            let (a, b) = (Matrix { data: &s.a, strides: (kd, 1) }, Matrix { data: state, strides: (vd, 1) });
            product([len, kd, vd], a, b, &mut s.o, (vd, 1), false);
            let (a, b) = (Matrix { data: &s.p, strides: (len, 1) }, Matrix { data: &s.u, strides: (vd, 1) });
            product([len, len, vd], a, b, &mut s.o, (vd, 1), true);
            for t in 0..len {
                let at = ((start + t) * heads + head) * vd;
                // SAFETY: this token of this head is this task's alone.
                unsafe { outputs.part(at, vd) }.copy_from_slice(&s.o[t * vd..(t + 1) * vd]);
            }
            s.advance(state);
        }
    }
}
