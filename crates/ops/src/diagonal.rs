//! A linear recurrence with complex diagonal dynamics as an op; see [`anyformer_kernels::diagonal`].
#![allow(unsafe_code)]

use std::sync::Arc;

use anyformer_kernels::diagonal as kernel;
use burn::tensor::Tensor;

use crate::activation::both;
use crate::adapter::{
    Array, Forward, Kernel, View, apply, erase, filled, on_cpu, or_zeros, sequences,
};
use crate::meter;

pub use anyformer_kernels::diagonal::flops as diagonal_flops;

/// `h_t = lambda h_(t-1) + v_t` with complex numbers as real parts, then imaginary ones: v `[batch, time, 2 state]`, lambda
/// `[2, state]`. `initial` is the state before, `[sequences, 2 state]`, zero when absent; `offsets` are cumulative lengths of
/// packed sequences (the batch is 1 then). Returns the states after every token and those after each sequence.
pub fn diagonal_recurrence(
    v: Tensor<3>,
    lambda: Tensor<2>,
    initial: Option<Tensor<2>>,
    offsets: Option<&Arc<Vec<usize>>>,
) -> (Tensor<3>, Tensor<2>) {
    let [batch, time, width] = v.dims();
    assert_eq!(lambda.dims(), [2, width / 2], "diagonal recurrence: lambda");
    let offsets = sequences(offsets, batch, time);
    meter::add(diagonal_flops(batch * time, width / 2));
    let count = offsets.len() - 1;
    let initial = initial.unwrap_or_else(|| Tensor::zeros([count, width], &v.device()));
    assert_eq!(
        initial.dims(),
        [count, width],
        "diagonal recurrence: initial"
    );
    if !on_cpu(&v) {
        return composed(v, lambda, initial, &offsets);
    }
    let inputs = [erase(v), erase(lambda), erase(initial)];
    both(apply(Diagonal { offsets }, inputs))
}

/// Inputs: v, lambda, the states before.
#[derive(Debug)]
struct Diagonal {
    offsets: Arc<Vec<usize>>,
}

impl Diagonal {
    fn arguments<'a>(&'a self, inputs: &[View<'a>]) -> kernel::Diagonal<'a> {
        kernel::Diagonal {
            lambda: inputs[1].data,
            initial: Some(inputs[2].data),
            offsets: &self.offsets,
        }
    }
}

impl Kernel for Diagonal {
    fn keeps_output(&self) -> bool {
        true
    }

    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let once = 4 * inputs[0].data.len() as u64;
        [once, 2 * once]
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (v, initial) = (inputs[0], inputs[2]);
        let arguments = self.arguments(inputs);
        let mut last = Vec::new();
        let fill = |h: &mut [f32]| {
            // SAFETY: the kernel writes every state of both and reads none of them.
            last = unsafe {
                filled(initial.data.len(), |last| {
                    kernel::forward(&arguments, v.data, h, last)
                })
            };
        };
        // SAFETY: as above.
        let h = unsafe { filled(v.data.len(), fill) };
        Forward {
            outputs: vec![Array::new(v.shape, h), Array::new(initial.shape, last)],
            saved: vec![],
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let h = saved[0].data;
        let dh = or_zeros(grads[0], h.len());
        let got = kernel::backward(
            &self.arguments(inputs),
            h,
            &dh,
            grads[1].map(|grad| grad.data),
        );
        vec![
            Some(Array::new(inputs[0].shape, got.v)),
            Some(Array::new(inputs[1].shape, got.lambda)),
            Some(Array::new(inputs[2].shape, got.initial)),
        ]
    }
}

/// Token by token: the portable form.
fn composed(
    v: Tensor<3>,
    lambda: Tensor<2>,
    initial: Tensor<2>,
    offsets: &[usize],
) -> (Tensor<3>, Tensor<2>) {
    let [batch, time, width] = v.dims();
    let state = width / 2;
    let v = v.reshape([batch * time, width]);
    let half = |x: &Tensor<2>, part: usize| x.clone().narrow(1, part * state, state);
    let (real, imag) = (
        lambda.clone().narrow(0, 0, 1),
        lambda.clone().narrow(0, 1, 1),
    );
    let (mut all, mut ends) = (Vec::new(), Vec::new());
    for (row, pair) in offsets.windows(2).enumerate() {
        let mut held = initial.clone().narrow(0, row, 1);
        for t in pair[0]..pair[1] {
            let (a, b) = (half(&held, 0), half(&held, 1));
            let turned = Tensor::cat(
                vec![
                    a.clone() * real.clone() - b.clone() * imag.clone(),
                    b * real.clone() + a * imag.clone(),
                ],
                1,
            );
            held = turned + v.clone().narrow(0, t, 1);
            all.push(held.clone());
        }
        ends.push(held);
    }
    let h = match all.is_empty() {
        true => v,
        false => Tensor::cat(all, 0),
    };
    (h.reshape([batch, time, width]), Tensor::cat(ends, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn the_kernel_agrees_with_the_composed_form() {
        let (time, state) = (9, 5);
        let offsets = Arc::new(vec![0, 2, 2, 9]);
        let inputs = [
            values(1, time * 2 * state),
            values(2, 2 * state).iter().map(|x| 0.7 * x).collect(),
            values(3, 3 * 2 * state),
        ];
        agree("diagonal recurrence", 1e-5, &inputs, |x| {
            let (h, last) = diagonal_recurrence(
                x[0].clone().reshape([1, time, 2 * state]),
                x[1].clone().reshape([2, state]),
                Some(x[2].clone().reshape([3, 2 * state])),
                Some(&offsets),
            );
            let h = h.reshape([time * 2 * state]);
            Tensor::cat(vec![h, last.reshape([3 * 2 * state])], 0)
        });
    }
}
