//! One head's chunk, gathered into contiguous scratch: queries, keys, values, cumulative log decay, beta.

use super::{Gate, Problem, Write};

/// What kind of decay the chunk has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    None,
    Scalar,
    Vector,
}

/// The gathered inputs of a chunk of `len` tokens of one head.
pub(super) struct Chunk {
    pub(super) len: usize,
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    pub(super) kind: Kind,
    pub(super) delta: bool,
    /// `[len, key_dim]`, already multiplied by the scale.
    pub(super) q: Vec<f32>,
    /// `[len, key_dim]`.
    pub(super) k: Vec<f32>,
    /// `[len, value_dim]`.
    pub(super) v: Vec<f32>,
    /// Inclusive cumulative log decay: `[len]` or `[len, key_dim]`.
    pub(super) g: Vec<f32>,
    /// `[len]`.
    pub(super) beta: Vec<f32>,
}

/// The inputs of a problem.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) gate: Gate<'a>,
    pub(super) write: Write<'a>,
}

impl Chunk {
    pub(super) fn new(problem: &Problem, inputs: &Inputs) -> Self {
        let (keys, values) = (
            problem.chunk_len * problem.key_dim,
            problem.chunk_len * problem.value_dim,
        );
        let (kind, gates) = match inputs.gate {
            Gate::None => (Kind::None, 0),
            Gate::Scalar(_) => (Kind::Scalar, problem.chunk_len),
            Gate::Vector(_) => (Kind::Vector, keys),
        };
        Chunk {
            len: 0,
            key_dim: problem.key_dim,
            value_dim: problem.value_dim,
            kind,
            delta: matches!(inputs.write, Write::Delta(_)),
            q: vec![0.0; keys],
            k: vec![0.0; keys],
            v: vec![0.0; values],
            g: vec![0.0; gates],
            beta: vec![0.0; problem.chunk_len],
        }
    }

    /// Gathers tokens `start..start + len` of `head`.
    #[inline(always)]
    pub(super) fn load(
        &mut self,
        problem: &Problem,
        inputs: &Inputs,
        head: usize,
        start: usize,
        len: usize,
    ) {
        self.len = len;
        let (kd, vd, heads) = (self.key_dim, self.value_dim, problem.heads);
        let key_head = head / (heads / problem.key_heads);
        for t in 0..len {
            let row = ((start + t) * problem.key_heads + key_head) * kd;
            let (from, to) = (&inputs.q[row..row + kd], &mut self.q[t * kd..(t + 1) * kd]);
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * problem.scale;
            }
            self.k[t * kd..(t + 1) * kd].copy_from_slice(&inputs.k[row..row + kd]);
            let row = ((start + t) * heads + head) * vd;
            self.v[t * vd..(t + 1) * vd].copy_from_slice(&inputs.v[row..row + vd]);
            if let Write::Delta(beta) = inputs.write {
                self.beta[t] = beta[(start + t) * heads + head];
            }
        }
        match inputs.gate {
            Gate::None => {}
            Gate::Scalar(gate) => {
                let mut sum = 0.0;
                for t in 0..len {
                    sum += gate[(start + t) * heads + head];
                    self.g[t] = sum;
                }
            }
            Gate::Vector(gate) => {
                for t in 0..len {
                    let row = ((start + t) * heads + head) * kd;
                    for i in 0..kd {
                        let before = if t == 0 { 0.0 } else { self.g[(t - 1) * kd + i] };
                        self.g[t * kd + i] = before + gate[row + i];
                    }
                }
            }
        }
    }

    /// Log decay of key feature `i` from the chunk's start to token `t`, inclusive.
    #[inline(always)]
    pub(super) fn log_decay(&self, t: usize, i: usize) -> f32 {
        match self.kind {
            Kind::None => 0.0,
            Kind::Scalar => self.g[t],
            Kind::Vector => self.g[t * self.key_dim + i],
        }
    }
}

/// `to[t, :] = from[t, :] * exp(g_t)`.
#[inline(always)]
pub(super) fn decayed(chunk: &Chunk, from: &[f32], to: &mut [f32]) {
    let kd = chunk.key_dim;
    for t in 0..chunk.len {
        let row = t * kd..(t + 1) * kd;
        let (from, to) = (&from[row.clone()], &mut to[row.clone()]);
        match chunk.kind {
            Kind::None => to.copy_from_slice(from),
            Kind::Scalar => {
                let factor = crate::math::exp(chunk.g[t]);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * factor;
                }
            }
            Kind::Vector => {
                for ((to, from), g) in to.iter_mut().zip(from).zip(&chunk.g[row]) {
                    *to = from * crate::math::exp(*g);
                }
            }
        }
    }
}

/// `to[t, :] = from[t, :] * exp(g_end - g_t)`.
#[inline(always)]
pub(super) fn to_end(chunk: &Chunk, from: &[f32], to: &mut [f32]) {
    let (kd, last) = (chunk.key_dim, chunk.len - 1);
    for t in 0..chunk.len {
        let row = t * kd..(t + 1) * kd;
        let (from, to) = (&from[row.clone()], &mut to[row.clone()]);
        match chunk.kind {
            Kind::None => to.copy_from_slice(from),
            Kind::Scalar => {
                let factor = crate::math::exp(chunk.g[last] - chunk.g[t]);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * factor;
                }
            }
            Kind::Vector => {
                let end = &chunk.g[last * kd..(last + 1) * kd];
                for (((to, from), g), end) in to.iter_mut().zip(from).zip(&chunk.g[row]).zip(end) {
                    *to = from * crate::math::exp(end - g);
                }
            }
        }
    }
}

/// `state[i, :] *= exp(g_end_i)`.
#[inline(always)]
pub(super) fn decay_state(chunk: &Chunk, state: &mut [f32]) {
    if chunk.kind == Kind::None {
        return;
    }
    for (i, row) in state.chunks_exact_mut(chunk.value_dim).enumerate() {
        let factor = crate::math::exp(chunk.log_decay(chunk.len - 1, i));
        for value in row {
            *value *= factor;
        }
    }
}
