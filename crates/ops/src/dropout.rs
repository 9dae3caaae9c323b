//! Dropout whose mask is made again where it is needed.
#![allow(unsafe_code)]

use std::sync::Arc;

use anyformer_kernels::dropout as kernel;
pub use anyformer_kernels::dropout::{Dropout as Placed, Key};
use burn::tensor::{Tensor, TensorData};

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, filled, on_cpu, sequences};

/// What one pass of training drops.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Of the pass; see [`Key::new`].
    pub key: Key,
    /// The chance with which a value is zeroed, at least 0 and below 1.
    pub chance: f32,
}

/// Input `x [batch, time, dim]`.
#[derive(Debug)]
struct Drop {
    dropout: kernel::Dropout,
    offsets: Arc<Vec<usize>>,
}

impl Drop {
    fn apply(&self, shape: &[usize], x: &[f32]) -> Vec<f32> {
        let dim = shape[shape.len() - 1];
        let fill = |y: &mut [f32]| self.dropout.apply(&self.offsets, dim, x, y);
        // SAFETY: the kernel writes every value and reads none.
        unsafe { filled(x.len(), fill) }
    }
}

impl Kernel for Drop {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        output(inputs[0].shape, self.apply(inputs[0].shape, inputs[0].data))
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let dx = self.apply(inputs[0].shape, only(grads).data);
        vec![Some(Array::new(inputs[0].shape, dx))]
    }

    fn reads_again(&self, _input: usize) -> bool {
        false
    }
}

impl Dropout {
    /// At a place in the model.
    pub fn at(&self, site: u32) -> Placed {
        Placed {
            key: self.key,
            site,
            chance: self.chance,
        }
    }

    /// Zeroes values of `x [batch, time, dim]` at random and divides the others by `1 - chance` (Srivastava et al., 2014); `site`
    /// is the place in the model, `offsets` the cumulative lengths of packed sequences. With a chance of 0 it is `x` itself.
    ///
    /// What is dropped depends on the key, the site, the number of the sequence, the position in it and the feature, and on
    /// nothing else. No mask is kept for the backward pass.
    pub fn apply(&self, site: u32, x: Tensor<3>, offsets: Option<&Arc<Vec<usize>>>) -> Tensor<3> {
        if self.chance == 0.0 {
            return x;
        }
        let [batch, time, dim] = x.dims();
        let offsets = sequences(offsets, batch, time);
        let dropout = self.at(site);
        if on_cpu(&x) {
            return single(Drop { dropout, offsets }, [erase(x)]);
        }
        // Elsewhere the same mask, made here, is multiplied with.
        let ones = vec![1.0; batch * time * dim];
        let mut mask = vec![0.0; ones.len()];
        dropout.apply(&offsets, dim, &ones, &mut mask);
        let mask = TensorData::new(mask, [batch, time, dim]);
        x.clone() * Tensor::from_data(mask, &x.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, run, values};
    use burn::tensor::Device;

    #[test]
    fn gradients_are_the_mask_times_what_comes_back() {
        let (batch, time, dim) = (2, 7, 33);
        let input = [values(1, batch * time * dim)];
        for offsets in [None, Some(Arc::new(vec![0, 3, 3, 14]))] {
            let dropout = Dropout {
                key: Key::new(4, 11),
                chance: 0.3,
            };
            let shape = match offsets {
                None => [batch, time, dim],
                Some(_) => [1, batch * time, dim],
            };
            let op = |v: &[Tensor<1>]| {
                let y = dropout.apply(5, v[0].clone().reshape(shape), offsets.as_ref());
                y.reshape([batch * time * dim])
            };
            agree("dropout", 1e-7, &input, op);
            // `run` weighs the output with values of its own; dividing output by input gives the mask.
            let got = run(&input, op);
            let weights = values(99, input[0].len());
            for (i, x) in input[0].iter().enumerate() {
                let mask = if got[0][i] == 0.0 { 0.0 } else { 1.0 / 0.7 };
                assert!((got[0][i] - x * mask).abs() < 1e-6);
                assert!((got[1][i] - weights[i] * mask).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn no_chance_is_the_same_tensor_and_no_node() {
        let none = Dropout {
            key: Key::new(1, 1),
            chance: 0.0,
        };
        let x = Tensor::<3>::ones([1, 2, 3], &Device::flex());
        let (_, table) = crate::profile::record(|| none.apply(0, x, None));
        assert!(table.is_empty(), "{table:?}");
    }
}
