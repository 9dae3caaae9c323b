//! The real part of a Fourier transform over time and features as an op; see [`anyformer_kernels::fourier`].

use anyformer_kernels::fourier as kernel;
use burn::tensor::Tensor;

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase};
use crate::meter;

/// Operations of [`real_part`] over a sequence, a transform of n values counted as `2.5 n log2 n`.
pub fn real_part_flops(time: usize, dim: usize) -> u64 {
    kernel::flops(time, dim)
}

/// `Re(F_time(F_dim(x)))` for `x [batch, time, dim]`, on the CPU.
pub fn real_part(x: Tensor<3>) -> Tensor<3> {
    let [batch, time, dim] = x.dims();
    meter::add(batch as u64 * kernel::flops(time, dim));
    single(RealPart, [erase(x)])
}

#[derive(Debug)]
struct RealPart;

fn sizes(x: View) -> [usize; 3] {
    match *x.shape {
        [batch, time, dim] => [batch, time, dim],
        _ => panic!("a transform of a tensor of rank 3"),
    }
}

impl Kernel for RealPart {
    fn reads_again(&self, _input: usize) -> bool {
        false
    }

    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let [batch, time, dim] = sizes(inputs[0]);
        [batch as u64 * kernel::flops(time, dim); 2]
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let x = inputs[0];
        output(x.shape, kernel::real_part(x.data, sizes(x)))
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let x = inputs[0];
        vec![Some(Array::new(
            x.shape,
            kernel::real_part(only(grads).data, sizes(x)),
        ))]
    }
}
