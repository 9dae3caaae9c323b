//! An iterative pseudo-inverse of small matrices as an op; see [`anyformer_kernels::inverse`].

use anyformer_kernels::inverse as kernel;
use burn::tensor::Tensor;

use crate::activation::{only, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu};
use crate::meter;

/// Operations of `steps` steps over a matrix `[m, m]`.
pub fn inverse_flops(m: usize, steps: usize) -> u64 {
    8 * (steps * m * m * m) as u64
}

/// The pseudo-inverses of row-stochastic matrices `[count, m, m]` after `steps` steps of
/// `Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` from `Aᵀ / max column sum`.
pub fn iterative_inverse(a: Tensor<3>, steps: usize) -> Tensor<3> {
    let [count, m, _] = a.dims();
    meter::add(count as u64 * inverse_flops(m, steps));
    match on_cpu(&a) {
        true => single(Inverse { steps }, [erase(a)]),
        false => composed(a, steps),
    }
}

#[derive(Debug)]
struct Inverse {
    steps: usize,
}

impl Kernel for Inverse {
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let [count, m, _] = *inputs[0].shape else {
            panic!("inverse: matrices of rank 3")
        };
        let once = count as u64 * inverse_flops(m, self.steps);
        [once, 11 * once / 4]
    }

    fn forward(&self, inputs: &[View], save: bool) -> Forward {
        let a = inputs[0];
        let (z, saved) = kernel::forward(a.data, a.shape[1], self.steps, save);
        let count = saved.len();
        Forward {
            outputs: vec![Array::new(a.shape, z)],
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
        let a = inputs[0];
        let (saved, dz) = (saved[0].data, only(grads).data);
        let da = kernel::backward(a.data, a.shape[1], self.steps, saved, dz);
        vec![Some(Array::new(a.shape, da))]
    }
}

fn composed(a: Tensor<3>, steps: usize) -> Tensor<3> {
    let m = a.dims()[1];
    let identity = |factor: f32| {
        Tensor::<2>::eye(m, &a.device())
            .mul_scalar(factor)
            .unsqueeze::<3>()
    };
    let largest = a.clone().sum_dim(1).max_dim(2);
    let mut z = a.clone().swap_dims(1, 2) / largest;
    for _ in 0..steps {
        let az = a.clone().matmul(z.clone());
        let inner = identity(7.0) - az.clone();
        let inner = identity(15.0) - az.clone().matmul(inner);
        let inner = identity(13.0) - az.matmul(inner);
        z = z.matmul(inner).mul_scalar(0.25);
    }
    z
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::softmax;
    use crate::check::{agree, values};

    #[test]
    fn the_kernel_agrees_with_the_composed_form() {
        for (m, steps) in [(1, 2), (4, 0), (6, 6)] {
            agree("inverse", 2e-4, &[values(1, 3 * m * m)], |x| {
                let a = softmax(x[0].clone().reshape([3, m, m]).mul_scalar(2.0));
                iterative_inverse(a, steps).reshape([3 * m * m])
            });
        }
    }
}
