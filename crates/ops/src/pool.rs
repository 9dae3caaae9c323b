//! Averages: pooling as a token mixer (PoolFormer), the mean of a token's neighbourhood minus the token, and means of segments.

use std::sync::Arc;

use anyformer_kernels::pool::{
    Pass, pool_grid, pool_time, segment_means as means, segment_means_backward,
};
use burn::tensor::{Tensor, TensorData};

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu};

#[derive(Debug)]
enum Pool {
    /// Offsets of the sequences among the rows.
    Time(Arc<Vec<usize>>),
    /// `[batch, height, width, channels]`.
    Grid,
}

impl Pool {
    fn run(&self, pass: Pass, x: View) -> Vec<f32> {
        let mut y = vec![0.0; x.data.len()];
        match (self, x.shape) {
            (Pool::Time(offsets), [_, _, channels]) => {
                pool_time(pass, *channels, offsets, x.data, &mut y);
            }
            (Pool::Grid, [_, height, width, channels]) => {
                pool_grid(pass, *channels, [*height, *width], x.data, &mut y);
            }
            (pool, shape) => unreachable!("{pool:?} of shape {shape:?}"),
        }
        y
    }
}

impl Kernel for Pool {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        output(inputs[0].shape, self.run(Pass::Forward, inputs[0]))
    }

    fn backward(
        &self,
        _inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let dy = only(grads);
        vec![Some(Array::new(dy.shape, self.run(Pass::Backward, dy)))]
    }
}

/// Window 3 over time for `x` (`[batch, time, channels]`). `offsets` are the cumulative lengths of the sequences among the
/// `batch * time` rows (for a dense batch 0, time, 2 time, ...): nothing crosses them, and padding does not count.
pub fn pool1d(x: Tensor<3>, offsets: Arc<Vec<usize>>) -> Tensor<3> {
    let [batch, time, channels] = x.dims();
    let total = batch * time;
    assert_eq!(offsets.last(), Some(&total), "pool: offsets");
    if on_cpu(&x) {
        return single(Pool::Time(offsets), [erase(x)]);
    }
    if total == 0 {
        return x;
    }
    let (mut before, mut after, mut scale) = (vec![0.0f32; total], vec![0.0f32; total], vec![]);
    for pair in offsets.windows(2) {
        for t in pair[0]..pair[1] {
            before[t] = f32::from(u8::from(t > pair[0]));
            after[t] = f32::from(u8::from(t + 1 < pair[1]));
            scale.push(1.0 / (1.0 + before[t] + after[t]));
        }
    }
    let device = x.device();
    let column = |values| Tensor::<2>::from_data(TensorData::new(values, [total, 1]), &device);
    let rows = x.clone().reshape([total, channels]);
    let zero = Tensor::<2>::zeros([1, channels], &device);
    let earlier = Tensor::cat(vec![zero.clone(), rows.clone().narrow(0, 0, total - 1)], 0);
    let later = Tensor::cat(vec![rows.clone().narrow(0, 1, total - 1), zero], 0);
    let sum = rows + earlier * column(before) + later * column(after);
    (sum * column(scale)).reshape([batch, time, channels]) - x
}

/// Window 3 x 3 for `x` (`[batch, height, width, channels]`); cells outside do not count.
pub fn pool2d(x: Tensor<4>) -> Tensor<4> {
    if on_cpu(&x) {
        return single(Pool::Grid, [erase(x)]);
    }
    let [_, height, width, _] = x.dims();
    let count = |size: usize| -> Vec<f32> {
        (0..size)
            .map(|at| ((at + 2).min(size) - at.saturating_sub(1)) as f32)
            .collect()
    };
    let device = x.device();
    let rows = Tensor::<4>::from_data(TensorData::new(count(height), [1, height, 1, 1]), &device);
    let columns = Tensor::<4>::from_data(TensorData::new(count(width), [1, 1, width, 1]), &device);
    let sum = window_sum(window_sum(x.clone(), 1), 2);
    sum / (rows * columns) - x
}

/// Means of the rows `bounds[i]..bounds[i + 1]` of the `batch * time` rows of x `[batch, time, channels]`: `[1, segments,
/// channels]`. Bounds begin with zero, end with the number of rows and leave no segment empty.
pub fn segment_means(x: Tensor<3>, bounds: Arc<Vec<usize>>) -> Tensor<3> {
    let [batch, time, channels] = x.dims();
    assert_eq!(
        bounds.last(),
        Some(&(batch * time)),
        "segment means: bounds"
    );
    assert!(
        bounds.windows(2).all(|rows| rows[0] < rows[1]),
        "segment means: an empty segment"
    );
    if on_cpu(&x) {
        return single(Segments(bounds), [erase(x)]);
    }
    let x = x.reshape([batch * time, channels]);
    let means = bounds
        .windows(2)
        .map(|rows| x.clone().slice([rows[0]..rows[1]]).mean_dim(0))
        .collect();
    Tensor::cat(means, 0).unsqueeze()
}

#[derive(Debug)]
struct Segments(Arc<Vec<usize>>);

impl Kernel for Segments {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (x, channels) = (inputs[0], inputs[0].shape[2]);
        let segments = self.0.len() - 1;
        let mut y = vec![0.0; segments * channels];
        means(channels, &self.0, x.data, &mut y);
        output(&[1, segments, channels], y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, dy) = (inputs[0], only(grads));
        let mut dx = vec![0.0; x.data.len()];
        segment_means_backward(x.shape[2], &self.0, dy.data, &mut dx);
        vec![Some(Array::new(x.shape, dx))]
    }
}

/// Sums of three neighbours along `dim`.
fn window_sum(x: Tensor<4>, dim: usize) -> Tensor<4> {
    let mut shape = x.dims();
    let size = shape[dim];
    if size < 2 {
        return x;
    }
    shape[dim] = 1;
    let zero = Tensor::<4>::zeros(shape, &x.device());
    let earlier = Tensor::cat(vec![zero.clone(), x.clone().narrow(dim, 0, size - 1)], dim);
    let later = Tensor::cat(vec![x.clone().narrow(dim, 1, size - 1), zero], dim);
    x + earlier + later
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, run, values};

    #[test]
    fn pool1d_agrees_with_composed() {
        for offsets in [vec![0, 6, 12], vec![0, 1, 1, 5, 12]] {
            let offsets = Arc::new(offsets);
            agree("pool1d", 1e-6, &[values(1, 36)], |v| {
                pool1d(v[0].clone().reshape([2, 6, 3]), offsets.clone()).reshape([36])
            });
        }
    }

    #[test]
    fn pool2d_agrees_with_composed() {
        for [height, width] in [[1, 1], [1, 5], [2, 3], [4, 5]] {
            let n = 2 * height * width * 3;
            agree("pool2d", 1e-6, &[values(1, n)], |v| {
                pool2d(v[0].clone().reshape([2, height, width, 3])).reshape([n])
            });
        }
        let flat = &run(&[vec![0.5; 12]], |v| {
            pool2d(v[0].clone().reshape([1, 3, 4, 1])).reshape([12])
        })[0];
        assert!(flat.iter().all(|v| v.abs() < 1e-6));
    }

    #[test]
    fn segment_means_agree_with_composed() {
        let bounds = Arc::new(vec![0, 1, 5, 12]);
        agree("segment means", 1e-6, &[values(1, 36)], |v| {
            segment_means(v[0].clone().reshape([2, 6, 3]), bounds.clone()).reshape([9])
        });
    }
}
