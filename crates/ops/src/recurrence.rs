//! The chunkwise linear recurrence as an op; see [`anyformer_kernels::recurrence`] for the equation and its papers.
#![allow(unsafe_code)]

mod composed;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use anyformer_kernels::recurrence as kernel;
use anyformer_kernels::recurrence::{CHUNK_LEN, Problem};
use burn::tensor::Tensor;

use crate::activation::both;
use crate::adapter::{
    Array, Forward, Kernel, View, apply, erase, filled, on_cpu, or_zeros, sequences,
};
use crate::meter;
use composed::composed;

pub use anyformer_kernels::feature_attention::SMALLEST_DIVISOR;
pub use anyformer_kernels::recurrence::flops as recurrence_flops;

/// The decay of the state, as a logarithm of at most zero.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Gate {
    /// None.
    None,
    /// One per head: `[batch, time, heads]`.
    Scalar(Tensor<3>),
    /// One per key feature: `[batch, time, heads, key_dim]`.
    Vector(Tensor<4>),
}

/// How a token is written into the state.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Write {
    /// Its value is added.
    Additive,
    /// What the state returns for its key is moved towards its value by this share: `[batch, time, heads]`.
    Delta(Tensor<3>),
}

/// Arguments that are not tensors.
#[derive(Clone, Debug)]
pub struct RecurrenceOptions {
    /// Factor on the queries.
    pub scale: f32,
    /// Tokens of a chunk.
    pub chunk_len: usize,
    /// Cumulative lengths of packed sequences; the batch is 1 then.
    pub offsets: Option<Arc<Vec<usize>>>,
    /// Divide the output by `scale q . sum of decayed keys`: one more value column of ones, which the state then holds as
    /// its last. A divisor nearer to zero than [`SMALLEST_DIVISOR`] is replaced by it and gets no gradient.
    pub normaliser: bool,
}

impl Default for RecurrenceOptions {
    fn default() -> Self {
        RecurrenceOptions {
            scale: 1.0,
            chunk_len: CHUNK_LEN,
            offsets: None,
            normaliser: false,
        }
    }
}

/// The divisor, or [`SMALLEST_DIVISOR`] without a gradient where it is nearer to zero than that.
pub fn guard_divisor(divisor: Tensor<4>) -> Tensor<4> {
    let small = divisor.clone().abs().lower_elem(SMALLEST_DIVISOR);
    divisor.mask_fill(small, SMALLEST_DIVISOR)
}

/// Runs the recurrence over `q`, `k` `[batch, time, key_heads, key_dim]` and `v` `[batch, time, heads, value_dim]`, where
/// `key_heads` divides `heads`. `initial` is the state before, `[sequences, heads, key_dim, value_dim]` (one more column
/// with the normaliser), zero when absent. Returns `o [batch, time, heads, value_dim]` and the state after.
pub fn linear_recurrence(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gate: Gate,
    write: Write,
    initial: Option<Tensor<4>>,
    options: &RecurrenceOptions,
) -> (Tensor<4>, Tensor<4>) {
    let [batch, time, heads, value_dim] = v.dims();
    if options.normaliser {
        let ones = Tensor::ones([batch, time, heads, 1], &v.device());
        let v = Tensor::cat(vec![v, ones], 3);
        let options = RecurrenceOptions {
            normaliser: false,
            ..options.clone()
        };
        let (o, last) = linear_recurrence(q, k, v, gate, write, initial, &options);
        let divisor = o.clone().narrow(3, value_dim, 1);
        return (o.narrow(3, 0, value_dim) / guard_divisor(divisor), last);
    }
    let [_, _, key_heads, key_dim] = k.dims();
    let offsets = sequences(options.offsets.as_ref(), batch, time);
    let sequences = offsets.len() - 1;
    assert_eq!(q.dims(), k.dims(), "recurrence: queries and keys");
    assert_eq!(
        [k.dims()[0], k.dims()[1]],
        [batch, time],
        "recurrence: keys and values"
    );
    assert!(
        key_heads > 0 && heads % key_heads == 0,
        "recurrence: key heads {key_heads} divide heads {heads}"
    );
    assert_eq!(
        offsets.last(),
        Some(&(batch * time)),
        "recurrence: offsets end at batch * time"
    );
    match &gate {
        Gate::None => {}
        Gate::Scalar(gate) => assert_eq!(gate.dims(), [batch, time, heads], "recurrence: gate"),
        Gate::Vector(gate) => {
            assert_eq!(
                gate.dims(),
                [batch, time, heads, key_dim],
                "recurrence: gate"
            );
        }
    }
    if let Write::Delta(beta) = &write {
        assert_eq!(beta.dims(), [batch, time, heads], "recurrence: beta");
    }
    if let Some(initial) = &initial {
        let want = [sequences, heads, key_dim, value_dim];
        assert_eq!(initial.dims(), want, "recurrence: initial state");
    }
    let delta = matches!(write, Write::Delta(_));
    meter::add(recurrence_flops(
        batch * time,
        heads,
        key_dim,
        value_dim,
        delta,
    ));
    if !on_cpu(&v) {
        return composed(q, k, v, gate, write, initial, options.scale, &offsets);
    }
    let initial = initial
        .unwrap_or_else(|| Tensor::zeros([sequences, heads, key_dim, value_dim], &v.device()));
    let recurrence = Recurrence {
        offsets,
        heads,
        key_heads,
        key_dim,
        value_dim,
        scale: options.scale,
        chunk_len: options.chunk_len,
        gate: match &gate {
            Gate::None => 0,
            Gate::Scalar(_) => 1,
            Gate::Vector(_) => 2,
        },
        delta,
    };
    let base = [erase(q), erase(k), erase(v), erase(initial)];
    let gate = match gate {
        Gate::None => None,
        Gate::Scalar(gate) => Some(erase(gate)),
        Gate::Vector(gate) => Some(erase(gate)),
    };
    let beta = match write {
        Write::Additive => None,
        Write::Delta(beta) => Some(erase(beta)),
    };
    let [q, k, v, initial] = base;
    both(match (gate, beta) {
        (None, None) => apply(recurrence, [q, k, v, initial]),
        (Some(gate), None) => apply(recurrence, [q, k, v, initial, gate]),
        (None, Some(beta)) => apply(recurrence, [q, k, v, initial, beta]),
        (Some(gate), Some(beta)) => apply(recurrence, [q, k, v, initial, gate, beta]),
    })
}

/// The kernel; inputs are q, k, v, initial state, then the gate and beta where there are any.
#[derive(Debug)]
struct Recurrence {
    offsets: Arc<Vec<usize>>,
    heads: usize,
    key_heads: usize,
    key_dim: usize,
    value_dim: usize,
    scale: f32,
    chunk_len: usize,
    gate: usize,
    delta: bool,
}

impl Recurrence {
    fn problem(&self) -> Problem<'_> {
        Problem {
            offsets: &self.offsets,
            heads: self.heads,
            key_heads: self.key_heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            scale: self.scale,
            chunk_len: self.chunk_len,
        }
    }

    fn arguments<'a>(&self, inputs: &[View<'a>]) -> (kernel::Gate<'a>, kernel::Write<'a>) {
        let gate = match self.gate {
            0 => kernel::Gate::None,
            1 => kernel::Gate::Scalar(inputs[4].data),
            _ => kernel::Gate::Vector(inputs[4].data),
        };
        let write = match self.delta {
            false => kernel::Write::Additive,
            true => kernel::Write::Delta(inputs[inputs.len() - 1].data),
        };
        (gate, write)
    }
}

impl Kernel for Recurrence {
    /// In the recurrent form; the chunks take more, the backward pass counted as twice the forward one.
    fn flops(&self, _inputs: &[View]) -> [u64; 2] {
        let problem = self.problem();
        let total = problem.offsets[problem.offsets.len() - 1];
        let delta = self.delta;
        let once = recurrence_flops(
            total,
            problem.heads,
            problem.key_dim,
            problem.value_dim,
            delta,
        );
        [once, 2 * once]
    }

    fn forward(&self, inputs: &[View], save: bool) -> Forward {
        let [q, k, v, initial] = [inputs[0], inputs[1], inputs[2], inputs[3]];
        let (gate, write) = self.arguments(inputs);
        let initial_data = Some(initial.data);
        let problem = self.problem();
        let (mut o, mut chunk_states) = (Vec::new(), Vec::new());
        let fill = |last: &mut [f32]| {
            let (q, k, v) = (q.data, k.data, v.data);
            let out = kernel::forward(&problem, q, k, v, gate, write, initial_data, save, last);
            (o, chunk_states) = (out.o, out.chunk_states);
        };
        // SAFETY: the kernel writes every state, and reads one only after.
        let last = unsafe { filled(initial.data.len(), fill) };
        let states = chunk_states.len();
        Forward {
            outputs: vec![Array::new(v.shape, o), Array::new(initial.shape, last)],
            saved: match save {
                true => vec![Array::new([states], chunk_states)],
                false => vec![],
            },
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let [q, k, v, initial] = [inputs[0], inputs[1], inputs[2], inputs[3]];
        let (gate, write) = self.arguments(inputs);
        let d_o = or_zeros(grads[0], v.data.len());
        let got = kernel::backward(
            &self.problem(),
            q.data,
            k.data,
            v.data,
            gate,
            write,
            saved[0].data,
            &d_o,
            grads[1].map(|grad| grad.data),
        );
        let like = |view: View, data: Vec<f32>| Some(Array::new(view.shape, data));
        let mut all = vec![
            like(q, got.q),
            like(k, got.k),
            like(v, got.v),
            like(initial, got.initial),
        ];
        if let Some(gate) = got.gate {
            all.push(like(inputs[4], gate));
        }
        if let Some(beta) = got.beta {
            all.push(like(inputs[inputs.len() - 1], beta));
        }
        all
    }
}
