//! The chunkwise linear recurrence as an op; see [`anyformer_kernels::recurrence`] for the equation and its papers.

use std::sync::Arc;

use anyformer_kernels::recurrence as kernel;
use anyformer_kernels::recurrence::{CHUNK_LEN, Problem};
use burn::tensor::Tensor;

use crate::adapter::{Array, Erased, Forward, Kernel, View, apply, erase, on_cpu};
use crate::meter;

pub use anyformer_kernels::recurrence::flops as recurrence_flops;

/// The decay of the state, as a logarithm of at most zero.
#[derive(Clone, Debug)]
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
    /// its last. A divisor nearer to zero than [`SMALLEST_DIVISOR`] is replaced by it.
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

/// See [`RecurrenceOptions::normaliser`].
pub const SMALLEST_DIVISOR: f32 = 1e-10;

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
        let divisor = o.clone().slice([0..batch, 0..time, 0..heads, value_dim..value_dim + 1]);
        let small = divisor.clone().abs().lower_elem(SMALLEST_DIVISOR);
        let divisor = divisor.mask_fill(small, SMALLEST_DIVISOR);
        let o = o.slice([0..batch, 0..time, 0..heads, 0..value_dim]) / divisor;
        return (o, last);
    }
    let [_, _, key_heads, key_dim] = k.dims();
    let offsets = match &options.offsets {
        Some(offsets) => offsets.clone(),
        None => Arc::new((0..=batch).map(|row| row * time).collect()),
    };
    let delta = matches!(write, Write::Delta(_));
    meter::add(recurrence_flops(batch * time, heads, key_dim, value_dim, delta));
    let sequences = offsets.len() - 1;
    if !on_cpu(&v) {
        return composed(q, k, v, gate, write, initial, options.scale, &offsets);
    }
    let initial = initial.unwrap_or_else(|| {
        Tensor::zeros([sequences, heads, key_dim, value_dim], &v.device())
    });
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
    let outputs: Vec<Erased> = match (gate, beta) {
        (None, None) => apply(recurrence, [q, k, v, initial]),
        (Some(gate), None) => apply(recurrence, [q, k, v, initial, gate]),
        (None, Some(beta)) => apply(recurrence, [q, k, v, initial, beta]),
        (Some(gate), Some(beta)) => apply(recurrence, [q, k, v, initial, gate, beta]),
    };
    let mut outputs = outputs.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(o), Some(last)) => (o.into_tensor(), last.into_tensor()),
        _ => panic!("the recurrence gives an output and a state"),
    }
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
    fn forward(&self, inputs: &[View], save: bool) -> Forward {
        let [q, k, v, initial] = [inputs[0], inputs[1], inputs[2], inputs[3]];
        let (gate, write) = self.arguments(inputs);
        let initial_data = Some(initial.data);
        let problem = self.problem();
        let out = kernel::forward(&problem, q.data, k.data, v.data, gate, write, initial_data, save);
        let states = out.chunk_states.len();
        Forward {
            outputs: vec![
                Array::new(v.shape, out.o),
                Array::new(initial.shape, out.final_state),
            ],
            saved: match save {
                true => vec![Array::new([states], out.chunk_states)],
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
        let zeros;
        let d_o = match grads[0] {
            Some(grad) => grad.data,
            None => {
                zeros = vec![0.0; v.data.len()];
                &zeros
            }
        };
        let got = kernel::backward(
            &self.problem(),
            q.data,
            k.data,
            v.data,
            gate,
            write,
            saved[0].data,
            d_o,
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

/// The equation over time with tensor ops: the portable form.
#[allow(clippy::too_many_arguments)]
fn composed(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gate: Gate,
    write: Write,
    initial: Option<Tensor<4>>,
    scale: f32,
    offsets: &[usize],
) -> (Tensor<4>, Tensor<4>) {
    let [batch, time, heads, value_dim] = v.dims();
    let [_, _, key_heads, key_dim] = k.dims();
    let total = batch * time;
    // Every query and key head stands once for each head that it serves.
    let spread = |x: Tensor<4>| {
        x.reshape([total, key_heads, 1, key_dim])
            .repeat_dim(2, heads / key_heads)
            .reshape([total, heads, key_dim])
    };
    let (q, k) = (spread(q).mul_scalar(scale), spread(k));
    let v = v.reshape([total, heads, value_dim]);
    let decay: Option<Tensor<3>> = match gate {
        Gate::None => None,
        Gate::Scalar(gate) => Some(gate.reshape([total, heads, 1]).exp()),
        Gate::Vector(gate) => Some(gate.reshape([total, heads, key_dim]).exp()),
    };
    let beta = match write {
        Write::Additive => None,
        Write::Delta(beta) => Some(beta.reshape([total, heads, 1])),
    };
    let at = |x: &Tensor<3>, t: usize| {
        let [_, heads, width] = x.dims();
        x.clone().slice([t..t + 1]).reshape([heads, width])
    };
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for (row, pair) in offsets.windows(2).enumerate() {
        let mut state: Tensor<3> = match &initial {
            Some(initial) => initial
                .clone()
                .slice([row..row + 1])
                .reshape([heads, key_dim, value_dim]),
            None => Tensor::zeros([heads, key_dim, value_dim], &v.device()),
        };
        for t in pair[0]..pair[1] {
            if let Some(decay) = &decay {
                state = state * at(decay, t).unsqueeze_dim(2);
            }
            let key: Tensor<3> = at(&k, t).unsqueeze_dim(2);
            let mut value = at(&v, t);
            if let Some(beta) = &beta {
                let held = (state.clone() * key.clone()).sum_dim(1).squeeze_dim(1);
                value = (value - held) * at(beta, t);
            }
            state = state + key * value.unsqueeze_dim(1);
            let query: Tensor<3> = at(&q, t).unsqueeze_dim(2);
            outputs.push((state.clone() * query).sum_dim(1));
        }
        states.push(state.unsqueeze::<4>());
    }
    let o = match outputs.is_empty() {
        true => v,
        false => Tensor::cat(outputs, 1).swap_dims(0, 1),
    };
    (
        o.reshape([batch, time, heads, value_dim]),
        Tensor::cat(states, 0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    /// Every gate and write, keys shared by heads, packed sequences: kernel and loop agree in the output, the final state
    /// and every gradient.
    #[test]
    fn kernel_equals_the_loop() {
        let (total, heads, key_heads, key_dim, value_dim) = (23, 4, 2, 3, 5);
        let offsets = Arc::new(vec![0, 9, 9, 23]);
        let states = 3 * heads * key_dim * value_dim;
        let positive = |seed, n| values(seed, n).iter().map(|v| v.abs()).collect::<Vec<f32>>();
        let negative = |seed, n| values(seed, n).iter().map(|v| -v.abs()).collect::<Vec<f32>>();
        for gate in 0..3 {
            for delta in [false, true] {
                let gates = [1, total * heads, total * heads * key_dim][gate];
                let inputs = [
                    values(1, total * key_heads * key_dim),
                    values(2, total * key_heads * key_dim),
                    values(3, total * heads * value_dim),
                    values(4, states),
                    negative(5, gates),
                    positive(6, total * heads),
                ];
                let used: Vec<Vec<f32>> = match (gate, delta) {
                    (0, false) => inputs[..4].to_vec(),
                    (0, true) => [&inputs[..4], &inputs[5..]].concat(),
                    (_, false) => inputs[..5].to_vec(),
                    (_, true) => inputs.to_vec(),
                };
                agree(&format!("gate {gate} delta {delta}"), 1e-4, &used, |x| {
                    let keys = [1, total, key_heads, key_dim];
                    let last = x[x.len() - 1].clone();
                    let options = RecurrenceOptions {
                        scale: 0.7,
                        chunk_len: 8,
                        offsets: Some(offsets.clone()),
                        normaliser: false,
                    };
                    let (o, state) = linear_recurrence(
                        x[0].clone().reshape(keys),
                        x[1].clone().reshape(keys),
                        x[2].clone().reshape([1, total, heads, value_dim]),
                        match gate {
                            0 => Gate::None,
                            1 => Gate::Scalar(x[4].clone().reshape([1, total, heads])),
                            _ => Gate::Vector(x[4].clone().reshape([1, total, heads, key_dim])),
                        },
                        match delta {
                            false => Write::Additive,
                            true => Write::Delta(last.reshape([1, total, heads])),
                        },
                        Some(x[3].clone().reshape([3, heads, key_dim, value_dim])),
                        &options,
                    );
                    let o = o.reshape([total * heads * value_dim]);
                    Tensor::cat(vec![o, state.reshape([states])], 0)
                });
            }
        }
    }

    /// With positive features the normalised output is a weighted mean of values.
    #[test]
    fn the_normaliser_makes_a_mean() {
        let device = burn::tensor::Device::flex();
        let q = Tensor::<4>::ones([1, 3, 1, 2], &device);
        let v = Tensor::<1>::from_data([3.0f32, 6.0, 0.0], &device).reshape([1, 3, 1, 1]);
        let options = RecurrenceOptions {
            normaliser: true,
            ..RecurrenceOptions::default()
        };
        let (o, state) =
            linear_recurrence(q.clone(), q, v, Gate::None, Write::Additive, None, &options);
        assert_eq!(crate::tensor_values(o), [3.0, 4.5, 3.0]);
        assert_eq!(state.dims(), [1, 1, 2, 2]);
    }
}
