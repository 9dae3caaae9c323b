//! Rotary position embedding.

use std::sync::Arc;

use anyformer_kernels::rope as kernel;
pub use anyformer_kernels::rope::{Rotations, inverse_frequencies};
use burn::tensor::{Tensor, TensorData};

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu};

#[derive(Debug)]
struct Rope(Arc<Rotations>);

impl Rope {
    fn turn(&self, x: View, inverse: bool) -> Vec<f32> {
        let mut y = vec![0.0; x.data.len()];
        let (heads, head_dim) = (x.shape[2], x.shape[3]);
        kernel::rotate(heads, head_dim, &self.0, inverse, x.data, &mut y);
        y
    }
}

impl Kernel for Rope {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        output(inputs[0].shape, self.turn(inputs[0], false))
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        vec![Some(Array::new(
            inputs[0].shape,
            self.turn(only(grads), true),
        ))]
    }
}

/// Turns `x` (`[batch, time, heads, head_dim]`) in half-split layout, row `batch * time` by its position; `positions` holds
/// one position per row, or those of one sequence for all. A head longer than twice `inv_freq` keeps its other values.
pub fn rope(x: Tensor<4>, positions: &[usize], inv_freq: &[f32]) -> Tensor<4> {
    rope_by(x, Arc::new(Rotations::new(positions, inv_freq)))
}

/// As [`rope`], with angles that were computed before: queries, keys and all layers share them.
pub fn rope_by(x: Tensor<4>, rotations: Arc<Rotations>) -> Tensor<4> {
    if on_cpu(&x) {
        return single(Rope(rotations), [erase(x)]);
    }
    let [batch, time, heads, dim] = x.dims();
    let (count, half) = (rotations.len(), rotations.half());
    if count == 0 || x.dims().contains(&0) {
        return x;
    }
    let device = x.device();
    let repeats = batch * time / count;
    let table = |values: &[f32]| {
        let data = TensorData::new(values.to_vec(), [1, count, 1, half]);
        Tensor::<4>::from_data(data, &device)
    };
    let (cos, sin) = (table(rotations.cos()), table(rotations.sin()));
    let x = x.reshape([repeats, count, heads, dim]);
    let low = x.clone().narrow(3, 0, half);
    let high = x.clone().narrow(3, half, half);
    let mut parts = vec![
        low.clone() * cos.clone() - high.clone() * sin.clone(),
        high * cos + low * sin,
    ];
    if dim > 2 * half {
        parts.push(x.narrow(3, 2 * half, dim - 2 * half));
    }
    Tensor::cat(parts, 3).reshape([batch, time, heads, dim])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn rope_agrees_with_composed() {
        let (batch, time, heads) = (2, 5, 3);
        for (dim, rotary, per_row) in [(8, 8, false), (8, 8, true), (11, 6, true), (5, 0, false)] {
            let count = if per_row { batch * time } else { time };
            let positions: Vec<usize> = (0..count).map(|t| (t * 37) % 101).collect();
            let inv_freq = inverse_frequencies(rotary, 10_000.0);
            let n = batch * time * heads * dim;
            agree(
                &format!("rope {dim} {rotary}"),
                1e-6,
                &[values(1, n)],
                |v| {
                    let x = v[0].clone().reshape([batch, time, heads, dim]);
                    rope(x, &positions, &inv_freq).reshape([n])
                },
            );
        }
    }

    #[test]
    fn products_depend_on_the_distance_only() {
        let inv_freq = inverse_frequencies(16, 10_000.0);
        let score = |at: usize, distance: usize| {
            let turn = |seed, position| {
                let x =
                    Tensor::<1>::from_floats(&values(seed, 16)[..], &burn::tensor::Device::flex());
                rope(x.reshape([1, 1, 1, 16]), &[position], &inv_freq)
            };
            let product: f32 = (turn(1, at + distance) * turn(2, at)).sum().into_scalar();
            product
        };
        assert!((score(0, 7) - score(500, 7)).abs() < 1e-4);
        assert!((score(0, 7) - score(0, 8)).abs() > 1e-3);
    }
}
