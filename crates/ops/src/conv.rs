//! Depthwise convolutions over time as ops, causal and around each token; see [`anyformer_kernels::conv`].

use std::sync::Arc;

use anyformer_kernels::conv as kernel;
use burn::tensor::Tensor;

use crate::activation::{both, only, output, silu, single};
use crate::adapter::{Array, Forward, Kernel, View, apply, erase, on_cpu, or_zeros, sequences};
use crate::meter;

pub use anyformer_kernels::conv::{MAX_WIDTH, flops as conv_flops};

/// `y[t, c] = bias[c] + sum_j weight[c, j] x[t - width + 1 + j, c]`, with SiLU where `activation` is set, for x
/// `[batch, time, channels]`, weight `[channels, width]`. `initial` is the last inputs before each sequence
/// `[sequences, channels, width - 1]`, oldest first, zero when absent; `offsets` are cumulative lengths of packed sequences
/// (the batch is 1 then). Returns y and the last inputs at the end.
pub fn causal_conv1d(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: bool,
    initial: Option<Tensor<3>>,
    offsets: Option<Arc<Vec<usize>>>,
) -> (Tensor<3>, Tensor<3>) {
    let [batch, time, channels] = x.dims();
    let width = weight.dims()[1];
    let offsets = sequences(offsets.as_ref(), batch, time);
    meter::add(conv_flops(batch * time, channels, width));
    let initial = initial
        .unwrap_or_else(|| Tensor::zeros([offsets.len() - 1, channels, width - 1], &x.device()));
    if !on_cpu(&x) {
        return composed(x, weight, bias, activation, initial, &offsets);
    }
    let conv = Conv {
        offsets,
        activation,
        biased: bias.is_some(),
    };
    both(match bias {
        None => apply(conv, [erase(x), erase(weight), erase(initial)]),
        Some(bias) => apply(conv, [erase(x), erase(weight), erase(initial), erase(bias)]),
    })
}

#[derive(Debug)]
struct Conv {
    offsets: Arc<Vec<usize>>,
    activation: bool,
    biased: bool,
}

impl Conv {
    fn arguments<'a>(&'a self, inputs: &[View<'a>]) -> kernel::Conv<'a> {
        kernel::Conv {
            x: inputs[0].data,
            weight: inputs[1].data,
            bias: self.biased.then(|| inputs[3].data),
            initial: Some(inputs[2].data),
            offsets: &self.offsets,
            channels: inputs[1].shape[0],
            width: inputs[1].shape[1],
            silu: self.activation,
        }
    }
}

impl Kernel for Conv {
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let (channels, width) = (inputs[1].shape[0], inputs[1].shape[1]);
        let once = conv_flops(inputs[0].data.len() / channels.max(1), channels, width);
        [once, 2 * once]
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (y, last) = kernel::forward(&self.arguments(inputs));
        Forward {
            outputs: vec![
                Array::new(inputs[0].shape, y),
                Array::new(inputs[2].shape, last),
            ],
            saved: vec![],
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let dy = or_zeros(grads[0], inputs[0].data.len());
        let dlast = grads[1].map(|grad| grad.data);
        let got = kernel::backward(&self.arguments(inputs), &dy, dlast);
        let mut all = vec![
            Some(Array::new(inputs[0].shape, got.x)),
            Some(Array::new(inputs[1].shape, got.weight)),
            Some(Array::new(inputs[2].shape, got.initial)),
        ];
        if self.biased {
            all.push(Some(Array::new(inputs[3].shape, got.bias)));
        }
        all
    }
}

/// Shifted copies times taps, sequence by sequence: the portable form.
fn composed(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: bool,
    initial: Tensor<3>,
    offsets: &[usize],
) -> (Tensor<3>, Tensor<3>) {
    let [batch, time, channels] = x.dims();
    let width = weight.dims()[1];
    let x = x.reshape([batch * time, channels]);
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for (row, pair) in offsets.windows(2).enumerate() {
        let count = pair[1] - pair[0];
        let mut parts = Vec::new();
        if width > 1 {
            let before = initial.clone().slice([row..row + 1]);
            parts.push(before.reshape([channels, width - 1]).transpose());
        }
        if count > 0 {
            parts.push(x.clone().slice([pair[0]..pair[1]]));
        }
        let seen = match parts.is_empty() {
            true => Tensor::zeros([0, channels], &x.device()),
            false => Tensor::cat(parts, 0),
        };
        if count > 0 {
            let tap = |j: usize| {
                let weight = weight
                    .clone()
                    .slice([0..channels, j..j + 1])
                    .reshape([1, channels]);
                seen.clone().slice([j..j + count]) * weight
            };
            let sum = (1..width).fold(tap(0), |sum, j| sum + tap(j));
            outputs.push(sum);
        }
        if width > 1 {
            let last = seen.slice([count..count + width - 1]).transpose();
            states.push(last.reshape([1, channels, width - 1]));
        }
    }
    let states = match states.is_empty() {
        true => initial,
        false => Tensor::cat(states, 0),
    };
    let mut y = match outputs.is_empty() {
        true => x,
        false => Tensor::cat(outputs, 0),
    };
    if let Some(bias) = bias {
        y = y + bias.reshape([1, channels]);
    }
    if activation {
        y = silu(y);
    }
    (y.reshape([batch, time, channels]), states)
}

/// `y[t, c] = sum_j weight[group of c, j] x[t - width / 2 + j, c]` for x `[batch, time, channels]` and weight `[groups, width]` of
/// odd width, zeros around each sequence; `offsets` are cumulative lengths of packed ones (the batch is 1 then).
pub fn conv_around(
    x: Tensor<3>,
    weight: Tensor<2>,
    offsets: Option<&Arc<Vec<usize>>>,
) -> Tensor<3> {
    let [batch, time, channels] = x.dims();
    let width = weight.dims()[1];
    let offsets = sequences(offsets, batch, time);
    meter::add(conv_flops(batch * time, channels, width));
    if on_cpu(&x) {
        return single(Around { offsets }, [erase(x), erase(weight)]);
    }
    let groups = weight.dims()[0];
    let weight = weight
        .unsqueeze_dim::<3>(1)
        .expand([groups, channels / groups, width])
        .reshape([channels, width]);
    let x = x.reshape([batch * time, channels]);
    let border = Tensor::zeros([width / 2, channels], &x.device());
    let mut rows = Vec::new();
    for pair in offsets.windows(2).filter(|pair| pair[1] > pair[0]) {
        let own = x.clone().slice([pair[0]..pair[1]]);
        let seen = match width {
            1 => own,
            _ => Tensor::cat(vec![border.clone(), own, border.clone()], 0),
        };
        let count = pair[1] - pair[0];
        let tap = |j: usize| {
            seen.clone().narrow(0, j, count) * weight.clone().narrow(1, j, 1).transpose()
        };
        rows.push((1..width).fold(tap(0), |sum, j| sum + tap(j)));
    }
    match rows.is_empty() {
        true => x.reshape([batch, time, channels]),
        false => Tensor::cat(rows, 0).reshape([batch, time, channels]),
    }
}

#[derive(Debug)]
struct Around {
    offsets: Arc<Vec<usize>>,
}

impl Around {
    fn arguments<'a>(&'a self, inputs: &[View<'a>]) -> kernel::Around<'a> {
        kernel::Around {
            x: inputs[0].data,
            weight: inputs[1].data,
            offsets: &self.offsets,
            channels: inputs[0].shape[2],
            groups: inputs[1].shape[0],
        }
    }
}

impl Kernel for Around {
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let once = 2 * (inputs[0].data.len() * inputs[1].shape[1]) as u64;
        [once, 2 * once]
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        output(inputs[0].shape, self.arguments(inputs).forward())
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (dx, dweight) = self.arguments(inputs).backward(only(grads).data);
        vec![
            Some(Array::new(inputs[0].shape, dx)),
            Some(Array::new(inputs[1].shape, dweight)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn kernel_equals_the_shifted_copies() {
        let (total, channels, width) = (14, 5, 4);
        let offsets = Arc::new(vec![0, 2, 2, 14]);
        let inputs = [
            values(1, total * channels),
            values(2, channels * width),
            values(3, 3 * channels * (width - 1)),
            values(4, channels),
        ];
        for activation in [false, true] {
            for biased in [false, true] {
                let used = &inputs[..if biased { 4 } else { 3 }];
                let name = format!("activation {activation} bias {biased}");
                agree(&name, 1e-4, used, |x| {
                    let (y, last) = causal_conv1d(
                        x[0].clone().reshape([1, total, channels]),
                        x[1].clone().reshape([channels, width]),
                        biased.then(|| x[3].clone()),
                        activation,
                        Some(x[2].clone().reshape([3, channels, width - 1])),
                        Some(offsets.clone()),
                    );
                    let y = y.reshape([total * channels]);
                    Tensor::cat(vec![y, last.reshape([3 * channels * (width - 1)])], 0)
                });
            }
        }
    }

    #[test]
    fn convolutions_around_a_token_agree_with_composed() {
        for (groups, width) in [(2, 1), (2, 5), (6, 3)] {
            let inputs = [values(1, 8 * 6), values(2, groups * width)];
            for offsets in [None, Some(Arc::new(vec![0, 3, 3, 8]))] {
                agree("around", 1e-5, &inputs, |x| {
                    let x0 = x[0].clone().reshape([1, 8, 6]);
                    let weight = x[1].clone().reshape([groups, width]);
                    conv_around(x0, weight, offsets.as_ref()).reshape([48])
                });
            }
        }
    }
}
