//! One head's chunk, gathered into contiguous scratch, with the products of its decays.
//!
//! Decays are multiplied, never divided, and logarithms are never summed: a product of factors of at most one cannot
//! overflow and keeps its relative precision after a token that forgets everything, where the difference of two large
//! cumulative logarithms would not. Products below the smallest normal number become zero, because arithmetic on subnormal
//! numbers is slow.

use super::{Gate, Problem, Write};
use crate::math::exp;

/// What kind of decay the chunk has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    None,
    Scalar,
    Vector,
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

impl Inputs<'_> {
    fn kind(&self) -> Kind {
        match self.gate {
            Gate::None => Kind::None,
            Gate::Scalar(_) => Kind::Scalar,
            Gate::Vector(_) => Kind::Vector,
        }
    }
}

/// Scratch without a promise about its content.
pub(super) fn room(slots: usize) -> Vec<f32> {
    vec![0.0; slots]
}

/// The gathered inputs of a chunk of `len` tokens of one head. Decays have a width of one value per token with a scalar
/// gate, of `key_dim` with a vector gate, and of nothing without one.
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
    /// `[len]`; one without the delta rule.
    pub(super) beta: Vec<f32>,
    /// Decay of each token, `[len, width]`.
    pub(super) decay: Vec<f32>,
    /// Decay from the chunk's start to after each token, `[len, width]`.
    pub(super) from_start: Vec<f32>,
    /// Decay from after each token to the chunk's end, `[len, width]`.
    pub(super) to_end: Vec<f32>,
    width: usize,
}

/// Zero for subnormal numbers.
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}

/// Row by row of `width` values, `products[t] = products[t - 1] * factors[t]` from first to last.
#[inline(always)]
pub(super) fn running(factors: &[f32], width: usize, products: &mut [f32]) {
    let (first, rest) = products.split_at_mut(width);
    first.copy_from_slice(&factors[..width]);
    let mut before: &[f32] = first;
    for (row, factors) in rest
        .chunks_exact_mut(width)
        .zip(factors[width..].chunks_exact(width))
    {
        for ((to, from), factor) in row.iter_mut().zip(before).zip(factors) {
            *to = flush(from * factor);
        }
        before = row;
    }
}

/// `products[t] = products[t + 1] * factors[t + 1]` from last to first, the last one being one.
#[inline(always)]
pub(super) fn running_back(factors: &[f32], width: usize, products: &mut [f32]) {
    let split = products.len() - width;
    let (rest, last) = products.split_at_mut(split);
    last.fill(1.0);
    let mut after: &[f32] = last;
    let factors = factors[width..].chunks_exact(width).rev();
    for (row, factors) in rest.chunks_exact_mut(width).rev().zip(factors) {
        for ((to, from), factor) in row.iter_mut().zip(after).zip(factors) {
            *to = flush(from * factor);
        }
        after = row;
    }
}

impl Chunk {
    pub(super) fn new(problem: &Problem, inputs: &Inputs, slots: usize) -> Self {
        let width = match inputs.kind() {
            Kind::None => 0,
            Kind::Scalar => 1,
            Kind::Vector => problem.key_dim,
        };
        let (keys, values) = (slots * problem.key_dim, slots * problem.value_dim);
        Chunk {
            len: 0,
            key_dim: problem.key_dim,
            value_dim: problem.value_dim,
            kind: inputs.kind(),
            delta: matches!(inputs.write, Write::Delta(_)),
            q: room(keys),
            k: room(keys),
            v: room(values),
            beta: vec![1.0; slots],
            decay: room(slots * width),
            from_start: room(slots * width),
            to_end: room(slots * width),
            width,
        }
    }

    /// Gathers tokens `start..start + len` of `head` and multiplies their decays.
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
        let (Gate::Scalar(gate) | Gate::Vector(gate)) = inputs.gate else {
            return;
        };
        let width = self.width;
        for t in 0..len {
            let row = ((start + t) * heads + head) * width;
            let to = &mut self.decay[t * width..(t + 1) * width];
            for (to, from) in to.iter_mut().zip(&gate[row..row + width]) {
                *to = exp(*from);
            }
        }
        let all = len * width;
        running(&self.decay[..all], width, &mut self.from_start[..all]);
        running_back(&self.decay[..all], width, &mut self.to_end[..all]);
    }

    /// Decay of the whole chunk: of key feature `i`.
    #[inline(always)]
    pub(super) fn whole(&self, i: usize) -> f32 {
        let last = self.len - 1;
        match self.kind {
            Kind::None => 1.0,
            Kind::Scalar => self.from_start[last],
            Kind::Vector => self.from_start[last * self.key_dim + i],
        }
    }

    /// `to[t, :] = from[t, :] * factors[t]` for `from_start` or `to_end` as factors.
    #[inline(always)]
    pub(super) fn scaled(&self, factors: &[f32], from: &[f32], to: &mut [f32]) {
        let all = self.len * self.key_dim;
        match self.kind {
            Kind::None => to[..all].copy_from_slice(&from[..all]),
            Kind::Scalar => {
                let rows = from[..all].chunks_exact(self.key_dim);
                let rows = to[..all].chunks_exact_mut(self.key_dim).zip(rows);
                for ((to, from), factor) in rows.zip(factors) {
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = from * factor;
                    }
                }
            }
            Kind::Vector => {
                let (from, factors) = (&from[..all], &factors[..all]);
                for ((to, from), factor) in to[..all].iter_mut().zip(from).zip(factors) {
                    *to = from * factor;
                }
            }
        }
    }

    /// `values[t, :] *= factors[t]`.
    #[inline(always)]
    pub(super) fn scale(&self, factors: &[f32], values: &mut [f32]) {
        let all = self.len * self.key_dim;
        match self.kind {
            Kind::None => {}
            Kind::Scalar => {
                let rows = values[..all].chunks_exact_mut(self.key_dim);
                for (row, factor) in rows.zip(factors) {
                    for value in row {
                        *value *= factor;
                    }
                }
            }
            Kind::Vector => {
                for (value, factor) in values[..all].iter_mut().zip(&factors[..all]) {
                    *value *= factor;
                }
            }
        }
    }
}
