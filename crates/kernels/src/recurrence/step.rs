//! The equation token by token, for a few tokens: each state is read and written once per token, with nothing set up. The
//! first token reads the state from where it was and writes it to its new place.
//!
//! What the delta rule writes depends on all of the state, so the state is gone through twice: first what it returns for
//! the key and for the query, `k D S` and `q D S`, then `S <- D S + k^T u`; the output is `q D S + (q . k) u`. The second
//! time it comes from the caches, and nothing was written to it in between.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod wide;

use super::chunk::Inputs;
use super::forward::begin;
use super::{Gate, Problem, Write};
use crate::disjoint::Disjoint;
#[cfg(target_arch = "x86_64")]
use crate::instructions::Instructions;
use crate::math::exp;
use crate::simd::{dispatched, dot};

/// Sequences of at most this many tokens go token by token.
pub(super) const STEPS: usize = 4;

/// One token of one head.
struct Token<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// Decays of the rows of the state, `[key_dim]`.
    decay: &'a [f32],
    /// The share of the delta rule.
    beta: Option<f32>,
    /// Factor on the query.
    scale: f32,
}

/// Tokens `range` of `head`, at least one: the state moves on from `before` (zero when absent), outputs go to `o [total,
/// heads, value_dim]`. `state` is overwritten.
pub(super) fn steps(
    problem: &Problem,
    inputs: &Inputs,
    range: [usize; 2],
    head: usize,
    mut before: Option<&[f32]>,
    state: &mut [f32],
    o: &Disjoint,
) {
    #[cfg(target_arch = "x86_64")]
    let wide = Instructions::Avx512.usable();
    #[cfg(not(target_arch = "x86_64"))]
    let wide = false;
    // Otherwise the first token reads the state from where it was.
    if !wide || before.is_none() {
        begin(before.take(), state);
    }
    let (kd, vd, heads) = (problem.key_dim, problem.value_dim, problem.heads);
    let key_head = head / (heads / problem.key_heads);
    let mut decay = vec![1.0; kd];
    for t in range[0]..range[1] {
        let one = t * heads + head;
        let row = (t * problem.key_heads + key_head) * kd;
        match inputs.gate {
            Gate::None => {}
            Gate::Scalar(gate) => decay.fill(exp(gate[one])),
            Gate::Vector(gate) => exps(&gate[one * kd..(one + 1) * kd], &mut decay),
        }
        let token = Token {
            q: &inputs.q[row..row + kd],
            k: &inputs.k[row..row + kd],
            v: &inputs.v[one * vd..(one + 1) * vd],
            decay: &decay,
            beta: match inputs.write {
                Write::Additive => None,
                Write::Delta(beta) => Some(beta[one]),
            },
            scale: problem.scale,
        };
        // SAFETY: this token of this head is this task's alone.
        let o = unsafe { o.part(one * vd, vd) };
        match wide {
            #[cfg(target_arch = "x86_64")]
            true => wide::step(&token, before.take(), state, o),
            _ => portable(&token, state, o),
        }
    }
}

dispatched! {
    fn exps<'a>(from: &'a [f32], to: &'a mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = exp(*from);
        }
    }
}

dispatched! {
    /// One token, the state in place.
    fn portable<'a>(token: &'a Token<'a>, state: &'a mut [f32], o: &'a mut [f32]) {
        let vd = o.len();
        let mut written = token.v.to_vec();
        o.fill(0.0);
        if let Some(beta) = token.beta {
            written.fill(0.0);
            for (i, row) in state.chunks_exact(vd).enumerate() {
                let (query, key) = (token.q[i] * token.decay[i], token.k[i] * token.decay[i]);
                for ((value, held), o) in row.iter().zip(written.iter_mut()).zip(o.iter_mut()) {
                    *held = key.mul_add(*value, *held);
                    *o = query.mul_add(*value, *o);
                }
            }
            let along = dot(token.q, token.k);
            for ((held, value), o) in written.iter_mut().zip(token.v).zip(o.iter_mut()) {
                *held = beta * (value - *held);
                *o = token.scale * along.mul_add(*held, *o);
            }
        }
        for (i, row) in state.chunks_exact_mut(vd).enumerate() {
            let (query, key, decay) = (token.scale * token.q[i], token.k[i], token.decay[i]);
            if token.beta.is_some() {
                for (value, written) in row.iter_mut().zip(&written) {
                    *value = key.mul_add(*written, *value * decay);
                }
                continue;
            }
            for ((value, written), o) in row.iter_mut().zip(&written).zip(o.iter_mut()) {
                *value = key.mul_add(*written, *value * decay);
                *o = query.mul_add(*value, *o);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn both_forms_agree_at_every_width() {
        if !is_x86_feature_detected!("avx512f") {
            return;
        }
        for vd in [1, 15, 16, 17, 33, 65, 128, 150, 272] {
            for (beta, decays) in [(None, true), (Some(0.7), false), (Some(0.4), true)] {
                let kd = 19;
                let [q, k, v] = [rand_vec(1, kd), rand_vec(2, kd), rand_vec(3, vd)];
                let decay: Vec<f32> = match decays {
                    true => rand_vec(4, kd).iter().map(|x| exp(-x.abs())).collect(),
                    false => vec![1.0; kd],
                };
                let before = rand_vec(5, kd * vd);
                let token = Token {
                    q: &q,
                    k: &k,
                    v: &v,
                    decay: &decay,
                    beta,
                    scale: 0.3,
                };
                let (mut want, mut want_o) = (before.clone(), vec![f32::NAN; vd]);
                portable(&token, &mut want, &mut want_o);
                let (mut got, mut got_o) = (vec![f32::NAN; kd * vd], vec![f32::NAN; vd]);
                wide::step(&token, Some(&before), &mut got, &mut got_o);
                assert_close("state", &got, &want, 1e-5);
                assert_close("o", &got_o, &want_o, 1e-5);
                let (mut got, mut got_o) = (before.clone(), vec![f32::NAN; vd]);
                wide::step(&token, None, &mut got, &mut got_o);
                assert_close("state in place", &got, &want, 1e-5);
                assert_close("o in place", &got_o, &want_o, 1e-5);
            }
        }
    }
}
