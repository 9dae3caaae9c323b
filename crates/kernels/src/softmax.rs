//! Softmax over the last dimension, `[rows, dim]`.

use crate::math;
use crate::simd::{block_rows, dispatched, dot, each, max, sum};

/// `y = e^x / sum e^x` for each row of `dim` values. A row of -inf gives NaN.
pub fn softmax(dim: usize, x: &[f32], y: &mut [f32]) {
    check(dim, &[x.len(), y.len()]);
    let size = block_rows(dim) * dim;
    each(x.chunks(size).zip(y.chunks_mut(size)), x.len(), |(x, y)| {
        forward_block(dim, x, y)
    });
}

/// `dx = y (dy - sum(y dy))`, from the output.
pub fn softmax_backward(dim: usize, y: &[f32], dy: &[f32], dx: &mut [f32]) {
    check(dim, &[y.len(), dy.len(), dx.len()]);
    let size = block_rows(dim) * dim;
    let blocks = y.chunks(size).zip(dy.chunks(size)).zip(dx.chunks_mut(size));
    each(blocks, y.len(), |((y, dy), dx)| {
        backward_block(dim, y, dy, dx)
    });
}

fn check(dim: usize, lengths: &[usize]) {
    assert!(dim > 0, "softmax: dim is zero");
    for length in lengths {
        assert_eq!(length % dim, 0, "softmax: {length} values in rows of {dim}");
        assert_eq!(*length, lengths[0], "softmax: lengths differ");
    }
}

dispatched! {
    fn forward_block<'a>(dim: usize, x: &'a [f32], y: &'a mut [f32]) {
        for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)) {
            let largest = max(x);
            for i in 0..dim {
                y[i] = math::exp(x[i] - largest);
            }
            let scale = 1.0 / sum(y);
            for value in y {
                *value *= scale;
            }
        }
    }
}

dispatched! {
    fn backward_block<'a>(dim: usize, y: &'a [f32], dy: &'a [f32], dx: &'a mut [f32]) {
        let rows = y.chunks_exact(dim).zip(dy.chunks_exact(dim)).zip(dx.chunks_exact_mut(dim));
        for ((y, dy), dx) in rows {
            let mean = dot(y, dy);
            for i in 0..dim {
                dx[i] = y[i] * (dy[i] - mean);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    fn naive(dim: usize, x: &[f64]) -> Vec<f64> {
        let row = |x: &[f64]| -> Vec<f64> {
            let total: f64 = x.iter().map(|x| x.exp()).sum();
            x.iter().map(|x| x.exp() / total).collect()
        };
        x.chunks(dim).flat_map(row).collect()
    }

    #[test]
    fn softmax_matches_naive() {
        for (rows, dim) in [(1, 1), (5, 3), (3, 33), (2, 64), (2, 101)] {
            let x: Vec<f32> = rand_vec(1, rows * dim).iter().map(|v| v * 6.0).collect();
            let dy = rand_vec(2, rows * dim);
            let (want, grads) = differences(&[&x], &dy, |v| naive(dim, v[0]));
            let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            softmax(dim, &x, &mut y);
            softmax_backward(dim, &y, &dy, &mut dx);
            assert_close("softmax", &y, &want, 1e-6);
            if dim > 1 {
                assert_close("softmax dx", &dx, &grads[0], 2e-5);
            }
        }
    }

    #[test]
    fn extremes_and_masks() {
        let mut y = [9.0; 4];
        softmax(4, &[1e30, -1e30, f32::NEG_INFINITY, 1e30], &mut y);
        assert_eq!(y, [0.5, 0.0, 0.0, 0.5]);
        softmax(4, &[0.0, f32::NAN, 0.0, 0.0], &mut y);
        assert!(y.iter().all(|v| v.is_nan()));
    }

    #[test]
    fn many_rows_give_the_same_as_one_at_a_time() {
        let dim = 77;
        let x = rand_vec(3, 1000 * dim);
        let (mut y, mut one) = (vec![0.0; x.len()], vec![0.0; dim]);
        softmax(dim, &x, &mut y);
        for (x, y) in x.chunks(dim).zip(y.chunks(dim)) {
            softmax(dim, x, &mut one);
            assert_eq!(y, one);
        }
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[
            softmax_matches_naive,
            extremes_and_masks,
            many_rows_give_the_same_as_one_at_a_time,
        ]);
    }
}
