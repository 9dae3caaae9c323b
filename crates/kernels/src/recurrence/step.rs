//! The equation token by token, for a few tokens: each state is read and written once per token, with nothing set up. The
//! first token reads the state from where it was and writes it to its new place.
#![allow(unsafe_code)]

use super::chunk::Inputs;
use super::forward::begin;
use super::{Gate, Problem, Write};
use crate::disjoint::Disjoint;
use crate::math::exp;
use crate::simd::dispatched;

/// Sequences of at most this many tokens go token by token.
pub(super) const STEPS: usize = 4;

dispatched! {
    /// Tokens `range` of `head`, at least one: the state moves on from `before` (zero when absent), outputs go to `o
    /// [total, heads, value_dim]`. `state` is overwritten.
    pub(super) fn steps<'a>(
        problem: &'a Problem<'a>,
        inputs: &'a Inputs<'a>,
        range: [usize; 2],
        head: usize,
        before: Option<&'a [f32]>,
        state: &'a mut [f32],
        o: &'a Disjoint<'a>,
    ) {
        let (kd, vd, heads) = (problem.key_dim, problem.value_dim, problem.heads);
        let key_head = head / (heads / problem.key_heads);
        let mut written = match inputs.write {
            Write::Additive => vec![],
            Write::Delta(_) => vec![0.0; vd],
        };
        for t in range[0]..range[1] {
            let one = t * heads + head;
            let row = (t * problem.key_heads + key_head) * kd;
            let (q, k) = (&inputs.q[row..row + kd], &inputs.k[row..row + kd]);
            let v = &inputs.v[one * vd..(one + 1) * vd];
            // SAFETY: this token of this head is this task's alone.
            let o = unsafe { o.part(one * vd, vd) };
            o.fill(0.0);
            let scalar = match inputs.gate {
                Gate::Scalar(gate) => exp(gate[one]),
                _ => 1.0,
            };
            let first = t == range[0];
            let (value, decayed) = match inputs.write {
                Write::Additive => (v, false),
                Write::Delta(beta) => {
                    // The decayed state is kept, and what it returns for the key.
                    written.fill(0.0);
                    for i in 0..kd {
                        let decay = match inputs.gate {
                            Gate::Vector(gate) => exp(gate[one * kd + i]),
                            _ => scalar,
                        };
                        let key = k[i];
                        let row = &mut state[i * vd..(i + 1) * vd];
                        if first {
                            begin(before.map(|before| &before[i * vd..(i + 1) * vd]), row);
                        }
                        for (value, held) in row.iter_mut().zip(written.iter_mut()) {
                            *value *= decay;
                            *held = key.mul_add(*value, *held);
                        }
                    }
                    for (held, value) in written.iter_mut().zip(v) {
                        *held = beta[one] * (value - *held);
                    }
                    (written.as_slice(), true)
                }
            };
            for i in 0..kd {
                let decay = match inputs.gate {
                    _ if decayed => 1.0,
                    Gate::Vector(gate) => exp(gate[one * kd + i]),
                    _ => scalar,
                };
                let (query, key) = (problem.scale * q[i], k[i]);
                let row = &mut state[i * vd..(i + 1) * vd];
                if first && !decayed {
                    begin(before.map(|before| &before[i * vd..(i + 1) * vd]), row);
                }
                for ((value, written), o) in row.iter_mut().zip(value).zip(o.iter_mut()) {
                    *value = key.mul_add(*written, *value * decay);
                    *o = query.mul_add(*value, *o);
                }
            }
        }
    }
}
