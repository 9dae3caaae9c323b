//! The gated linear unit over halves of a row: `y = a sigmoid(b)` for rows `[a, b]` (Dauphin et al., arXiv 1612.08083).

use crate::math::sigmoid;
use crate::simd::{block_rows, dispatched, each};

/// `y[r] = x[r, ..dim] sigmoid(x[r, dim..])` for `x [rows, 2 dim]`.
pub fn glu(dim: usize, x: &[f32], y: &mut [f32]) {
    check(dim, x.len(), y.len());
    let size = block_rows(dim) * dim;
    each(
        x.chunks(2 * size).zip(y.chunks_mut(size)),
        x.len(),
        |(x, y)| forward_block(dim, x, y),
    );
}

/// The gradient of `x`.
pub fn glu_backward(dim: usize, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    check(dim, x.len(), dy.len());
    assert_eq!(dx.len(), x.len(), "glu: x and dx");
    let size = block_rows(dim) * dim;
    let blocks = x
        .chunks(2 * size)
        .zip(dy.chunks(size))
        .zip(dx.chunks_mut(2 * size));
    each(blocks, x.len(), |((x, dy), dx)| {
        backward_block(dim, x, dy, dx)
    });
}

fn check(dim: usize, x: usize, y: usize) {
    assert!(
        dim > 0 && y.is_multiple_of(dim),
        "glu: {y} values in rows of {dim}"
    );
    assert_eq!(x, 2 * y, "glu: x and y");
}

dispatched! {
    fn forward_block<'a>(dim: usize, x: &'a [f32], y: &'a mut [f32]) {
        for (x, y) in x.chunks_exact(2 * dim).zip(y.chunks_exact_mut(dim)) {
            let (a, b) = x.split_at(dim);
            for c in 0..dim {
                y[c] = a[c] * sigmoid(b[c]);
            }
        }
    }
}

dispatched! {
    fn backward_block<'a>(dim: usize, x: &'a [f32], dy: &'a [f32], dx: &'a mut [f32]) {
        let rows = x.chunks_exact(2 * dim).zip(dy.chunks_exact(dim)).zip(dx.chunks_exact_mut(2 * dim));
        for ((x, dy), dx) in rows {
            let ((a, b), (da, db)) = (x.split_at(dim), dx.split_at_mut(dim));
            for c in 0..dim {
                let gate = sigmoid(b[c]);
                da[c] = dy[c] * gate;
                db[c] = dy[c] * a[c] * gate * (1.0 - gate);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    #[test]
    fn outputs_and_gradients_match_the_equation() {
        for (rows, dim) in [(1, 1), (3, 5), (2, 33)] {
            let x: Vec<f32> = rand_vec(1, 2 * rows * dim)
                .iter()
                .map(|x| 4.0 * x)
                .collect();
            let dy = rand_vec(2, rows * dim);
            let (want, grads) = differences(&[&x], &dy, |v| {
                let unit = |(a, b): (&f64, &f64)| a / (1.0 + (-b).exp());
                let row =
                    |x: &[f64]| -> Vec<f64> { x[..dim].iter().zip(&x[dim..]).map(unit).collect() };
                v[0].chunks(2 * dim).flat_map(row).collect()
            });
            let (mut y, mut dx) = (vec![0.0; rows * dim], vec![0.0; x.len()]);
            glu(dim, &x, &mut y);
            glu_backward(dim, &x, &dy, &mut dx);
            assert_close("glu", &y, &want, 2e-6);
            assert_close("glu dx", &dx, &grads[0], 2e-5);
        }
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[outputs_and_gradients_match_the_equation]);
    }
}
