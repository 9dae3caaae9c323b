//! The selective scan of Mamba as an op; see [`anyformer_kernels::scan`].
#![allow(unsafe_code)]

use std::sync::Arc;

use anyformer_kernels::scan as kernel;
use burn::tensor::Tensor;

use crate::activation::{both, softplus};
use crate::adapter::{
    Array, Forward, Kernel, View, apply, erase, filled, on_cpu, or_zeros, sequences,
};
use crate::meter;

pub use anyformer_kernels::scan::flops as scan_flops;

/// The tensors of a scan.
#[derive(Clone, Debug)]
pub struct ScanInputs {
    /// `[batch, time, channels]`.
    pub u: Tensor<3>,
    /// Step size before bias and softplus, `[batch, time, channels]`.
    pub delta: Tensor<3>,
    /// `[channels]`.
    pub delta_bias: Tensor<1>,
    /// `[channels, state]`, negative.
    pub a: Tensor<2>,
    /// `[batch, time, state]`.
    pub b: Tensor<3>,
    /// `[batch, time, state]`.
    pub c: Tensor<3>,
    /// `[channels]`.
    pub d: Tensor<1>,
}

/// `h = exp(Delta a) h + Delta b u`, `y = c . h + d u` with `Delta = softplus(delta + delta_bias)`. `initial` is the state
/// before, `[sequences, channels, state]`, zero when absent; `offsets` are cumulative lengths of packed sequences (the batch
/// is 1 then). Returns y and the state after.
pub fn selective_scan(
    inputs: ScanInputs,
    initial: Option<Tensor<3>>,
    offsets: Option<Arc<Vec<usize>>>,
) -> (Tensor<3>, Tensor<3>) {
    let [batch, time, channels] = inputs.u.dims();
    let state = inputs.a.dims()[1];
    let offsets = sequences(offsets.as_ref(), batch, time);
    meter::add(scan_flops(batch * time, channels, state));
    let initial = initial
        .unwrap_or_else(|| Tensor::zeros([offsets.len() - 1, channels, state], &inputs.u.device()));
    if !on_cpu(&inputs.u) {
        return composed(inputs, initial, &offsets);
    }
    let erased = [
        erase(inputs.u),
        erase(inputs.delta),
        erase(inputs.delta_bias),
        erase(inputs.a),
        erase(inputs.b),
        erase(inputs.c),
        erase(inputs.d),
        erase(initial),
    ];
    both(apply(Scan { offsets }, erased))
}

#[derive(Debug)]
struct Scan {
    offsets: Arc<Vec<usize>>,
}

impl Scan {
    fn arguments<'a>(&'a self, inputs: &[View<'a>]) -> kernel::Scan<'a> {
        kernel::Scan {
            u: inputs[0].data,
            delta: inputs[1].data,
            delta_bias: inputs[2].data,
            a: inputs[3].data,
            b: inputs[4].data,
            c: inputs[5].data,
            d: inputs[6].data,
            initial: Some(inputs[7].data),
            offsets: &self.offsets,
            channels: inputs[3].shape[0],
            state: inputs[3].shape[1],
        }
    }
}

impl Kernel for Scan {
    /// The backward pass counted as twice the forward one.
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let (channels, state) = (inputs[3].shape[0], inputs[3].shape[1]);
        let once = scan_flops(inputs[0].data.len() / channels.max(1), channels, state);
        [once, 2 * once]
    }

    fn forward(&self, inputs: &[View], save: bool) -> Forward {
        let (mut y, mut saved) = (Vec::new(), Vec::new());
        let fill = |last: &mut [f32]| {
            let out = kernel::forward(&self.arguments(inputs), save, last);
            (y, saved) = (out.y, out.saved);
        };
        // SAFETY: the kernel writes every state, and reads none of them.
        let last = unsafe { filled(inputs[7].data.len(), fill) };
        let count = saved.len();
        Forward {
            outputs: vec![
                Array::new(inputs[0].shape, y),
                Array::new(inputs[7].shape, last),
            ],
            saved: match save {
                true => vec![Array::new([count], saved)],
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
        let dy = or_zeros(grads[0], inputs[0].data.len());
        let dlast = grads[1].map(|grad| grad.data);
        let got = kernel::backward(&self.arguments(inputs), saved[0].data, &dy, dlast);
        let all = [
            got.u,
            got.delta,
            got.delta_bias,
            got.a,
            got.b,
            got.c,
            got.d,
            got.initial,
        ];
        all.into_iter()
            .zip(inputs)
            .map(|(data, input)| Some(Array::new(input.shape, data)))
            .collect()
    }
}

/// The equation over time with tensor ops: the portable form.
fn composed(inputs: ScanInputs, initial: Tensor<3>, offsets: &[usize]) -> (Tensor<3>, Tensor<3>) {
    let [batch, time, channels] = inputs.u.dims();
    let state = inputs.a.dims()[1];
    let total = batch * time;
    let u = inputs.u.reshape([total, channels]);
    let delta = inputs.delta.reshape([total, channels]) + inputs.delta_bias.unsqueeze::<2>();
    let delta = softplus(delta);
    let (b, c) = (
        inputs.b.reshape([total, state]),
        inputs.c.reshape([total, state]),
    );
    let row = |x: &Tensor<2>, t: usize| x.clone().slice([t..t + 1]);
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for (sequence, pair) in offsets.windows(2).enumerate() {
        let mut h: Tensor<2> = initial
            .clone()
            .slice([sequence..sequence + 1])
            .reshape([channels, state]);
        for t in pair[0]..pair[1] {
            let step = row(&delta, t).transpose();
            let decay = (step.clone() * inputs.a.clone()).exp();
            let write = (step * row(&u, t).transpose()) * row(&b, t);
            h = decay * h + write;
            outputs.push((h.clone() * row(&c, t)).sum_dim(1).transpose());
        }
        states.push(h.unsqueeze::<3>());
    }
    let y = match outputs.is_empty() {
        true => u.zeros_like(),
        false => Tensor::cat(outputs, 0),
    };
    let y = y + u * inputs.d.unsqueeze::<2>();
    (y.reshape([batch, time, channels]), Tensor::cat(states, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn kernel_equals_the_loop() {
        let (total, channels, state) = (21, 18, 3);
        let offsets = Arc::new(vec![0, 6, 6, 21]);
        let negative = values(4, channels * state)
            .iter()
            .map(|v| -0.1 - v.abs())
            .collect();
        let inputs = [
            values(1, total * channels),
            values(2, total * channels),
            values(3, channels),
            negative,
            values(5, total * state),
            values(6, total * state),
            values(7, channels),
            values(8, 3 * channels * state),
        ];
        agree("scan", 1e-4, &inputs, |x| {
            let wide = [1, total, channels];
            let narrow = [1, total, state];
            let (y, last) = selective_scan(
                ScanInputs {
                    u: x[0].clone().reshape(wide),
                    delta: x[1].clone().reshape(wide),
                    delta_bias: x[2].clone(),
                    a: x[3].clone().reshape([channels, state]),
                    b: x[4].clone().reshape(narrow),
                    c: x[5].clone().reshape(narrow),
                    d: x[6].clone(),
                },
                Some(x[7].clone().reshape([3, channels, state])),
                Some(offsets.clone()),
            );
            let y = y.reshape([total * channels]);
            Tensor::cat(vec![y, last.reshape([3 * channels * state])], 0)
        });
    }
}
