//! Causal convolutions as long as the sequences.

use std::sync::Arc;

use anyformer_kernels::long_conv as kernel;
use burn::tensor::{Int, Tensor, TensorData};

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu, sequences};
use crate::meter;

/// Inputs `x [batch, time, channels]` and the kernel `[channels, taps]`.
#[derive(Debug)]
struct LongConv {
    offsets: Arc<Vec<usize>>,
}

impl LongConv {
    fn problem(&self, kernel: View) -> kernel::Problem<'_> {
        kernel::Problem {
            offsets: &self.offsets,
            channels: kernel.shape[0],
            taps: kernel.shape[1],
        }
    }
}

impl Kernel for LongConv {
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        kernel::flops(self.problem(inputs[1]))
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (x, taps) = (inputs[0], inputs[1]);
        output(
            x.shape,
            kernel::forward(self.problem(taps), x.data, taps.data),
        )
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, taps) = (inputs[0], inputs[1]);
        let dy = only(grads).data;
        let (dx, dkernel) = kernel::backward(self.problem(taps), x.data, taps.data, dy);
        vec![
            Some(Array::new(x.shape, dx)),
            Some(Array::new(taps.shape, dkernel)),
        ]
    }
}

/// Operations of [`long_conv`] over one sequence of `time` tokens, a transform of n values counted as `2.5 n log2 n`.
pub fn long_conv_flops(time: usize, channels: usize, taps: usize) -> u64 {
    let problem = kernel::Problem {
        offsets: &[0, time],
        channels,
        taps,
    };
    kernel::flops(problem)[0]
}

/// `y_t = sum_l kernel_l x_{t-l}` within each sequence and for each channel: `x` is `[batch, time, channels]`, `kernel`
/// `[channels, taps]`, `offsets` are the cumulative lengths of packed sequences. Taps past a sequence's length are not used;
/// past the last tap the kernel is zero.
///
/// On the CPU by Fourier transforms where sequences are long; elsewhere as a product with a triangular matrix for each
/// channel and sequence, whose memory grows with the square of the length.
pub fn long_conv(x: Tensor<3>, kernel: Tensor<2>, offsets: Option<&Arc<Vec<usize>>>) -> Tensor<3> {
    let [batch, time, channels] = x.dims();
    let [own, taps] = kernel.dims();
    assert_eq!(own, channels, "long convolution: channels of the kernel");
    let offsets = sequences(offsets, batch, time);
    let each = offsets.windows(2).map(|pair| pair[1] - pair[0]);
    meter::add(each.map(|time| long_conv_flops(time, channels, taps)).sum());
    if on_cpu(&x) {
        return single(LongConv { offsets }, [erase(x), erase(kernel)]);
    }
    composed(x, kernel, &offsets)
}

fn composed(x: Tensor<3>, kernel: Tensor<2>, offsets: &[usize]) -> Tensor<3> {
    let [batch, time, channels] = x.dims();
    let taps = kernel.dims()[1];
    let device = x.device();
    let rows = x.clone().reshape([batch * time, channels]);
    // Places that see no tap read a zero behind the last.
    let kernel = Tensor::cat(vec![kernel, Tensor::zeros([channels, 1], &device)], 1);
    let mut outputs = Vec::new();
    for pair in offsets.windows(2).filter(|pair| pair[1] > pair[0]) {
        let time = pair[1] - pair[0];
        let place = |at: usize| match (at / time).checked_sub(at % time) {
            Some(l) if l < taps => l as i64,
            _ => taps as i64,
        };
        let places: Vec<i64> = (0..time * time).map(place).collect();
        let places = TensorData::new(places, [time * time]);
        let places = Tensor::<1, Int>::from_data(places, &device);
        let matrix = kernel
            .clone()
            .select(1, places)
            .reshape([channels, time, time]);
        let part = rows.clone().slice([pair[0]..pair[1]]);
        let part = part.transpose().reshape([channels, time, 1]);
        outputs.push(matrix.matmul(part).reshape([channels, time]).transpose());
    }
    match outputs.is_empty() {
        true => x,
        false => Tensor::cat(outputs, 0).reshape([batch, time, channels]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn kernel_equals_the_product_with_a_triangular_matrix() {
        for (lengths, channels, taps) in [
            (vec![0, 9], 3, 9),
            (vec![0, 80], 2, 80),
            (vec![0, 3, 3, 75, 140], 5, 72),
        ] {
            let total = lengths[lengths.len() - 1];
            let offsets = Arc::new(lengths);
            let inputs = [values(1, total * channels), values(2, channels * taps)];
            agree("long convolution", 1e-5, &inputs, |v| {
                let x = v[0].clone().reshape([1, total, channels]);
                let kernel = v[1].clone().reshape([channels, taps]);
                long_conv(x, kernel, Some(&offsets)).reshape([total * channels])
            });
        }
        let inputs = [values(1, 2 * 70 * 4), values(2, 4 * 70)];
        agree("long convolution of a batch", 1e-5, &inputs, |v| {
            let kernel = v[1].clone().reshape([4, 70]);
            long_conv(v[0].clone().reshape([2, 70, 4]), kernel, None).reshape([2 * 70 * 4])
        });
    }
}
