//! An iterative pseudo-inverse of small matrices (Razavi et al., 2014, as Nystromformer uses it, arXiv 2102.03902).
//!
//! `Z_0 = Aᵀ / max column sum`, `Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` for a fixed number of steps; `[count, m, m]`.
//! Every matrix is a task; the backward pass keeps the Z of each step and makes the products inside a step again.

use rayon::prelude::*;

use crate::gemm::{Matrix, product};
use crate::transpose::transpose;

/// The inverses and, where `save` is set, the Z before each step for [`backward`], `[count, steps, m, m]`.
///
/// Panics when `a` is not made of `m x m` matrices.
pub fn forward(a: &[f32], m: usize, steps: usize, save: bool) -> (Vec<f32>, Vec<f32>) {
    let size = check(a, m);
    let kept = if save { size * steps } else { 0 };
    let mut z = vec![0.0; a.len()];
    let mut saved = vec![0.0; a.len() / size * kept];
    let mut rest = &mut saved[..];
    let mut parts = Vec::new();
    for _ in a.chunks_exact(size) {
        let (own, after) = rest.split_at_mut(kept);
        parts.push(own);
        rest = after;
    }
    let tasks = a.par_chunks(size).zip(z.par_chunks_mut(size)).zip(parts);
    tasks.for_each(|((a, z), saved)| {
        let (_, largest) = column_sum(a, m);
        transpose([m, m], 1.0 / largest, a, m, z, m);
        let (mut step, mut before) = (Step::new(m), vec![0.0; size]);
        for at in 0..steps {
            before.copy_from_slice(z);
            step.parts(a, &before);
            multiply(m, 0.25, rows(&before, m), rows(&step.outer, m), z, false);
            if save {
                saved[at * size..][..size].copy_from_slice(&before);
            }
        }
    });
    (z, saved)
}

/// The gradient of `a` from that of the inverses; `saved` is what [`forward`] gave.
pub fn backward(a: &[f32], m: usize, steps: usize, saved: &[f32], dz: &[f32]) -> Vec<f32> {
    let size = check(a, m);
    assert_eq!(dz.len(), a.len(), "inverse dz");
    assert_eq!(saved.len(), a.len() * steps, "inverse saved");
    let mut da = vec![0.0; a.len()];
    da.par_chunks_mut(size).enumerate().for_each(|(at, da)| {
        let a = &a[at * size..][..size];
        let saved = &saved[at * size * steps..][..size * steps];
        let mut dz = dz[at * size..][..size].to_vec();
        let mut step = Step::new(m);
        let zeros = || vec![0.0; size];
        let (mut d_outer, mut d_middle, mut d_inner, mut dp) = (zeros(), zeros(), zeros(), zeros());
        for z in saved.chunks_exact(size).rev() {
            step.parts(a, z);
            let p = rows(&step.p, m).transposed();
            multiply(
                m,
                0.25,
                rows(z, m).transposed(),
                rows(&dz, m),
                &mut d_outer,
                false,
            );
            multiply(m, -1.0, p, rows(&d_outer, m), &mut d_middle, false);
            multiply(m, -1.0, p, rows(&d_middle, m), &mut d_inner, false);
            let (outer, middle) = (rows(&step.middle, m), rows(&step.inner, m));
            multiply(
                m,
                -1.0,
                rows(&d_outer, m),
                outer.transposed(),
                &mut dp,
                false,
            );
            multiply(
                m,
                -1.0,
                rows(&d_middle, m),
                middle.transposed(),
                &mut dp,
                true,
            );
            dp.iter_mut().zip(&d_inner).for_each(|(dp, d)| *dp -= d);
            multiply(m, 1.0, rows(&dp, m), rows(z, m).transposed(), da, true);
            let mut before = zeros();
            let outer = rows(&step.outer, m).transposed();
            multiply(m, 0.25, rows(&dz, m), outer, &mut before, false);
            multiply(
                m,
                1.0,
                rows(a, m).transposed(),
                rows(&dp, m),
                &mut before,
                true,
            );
            dz = before;
        }
        // Z_0 = Aᵀ / s with s the sum of the largest column.
        let (column, largest) = column_sum(a, m);
        let mut through = 0.0;
        for i in 0..m {
            for j in 0..m {
                da[i * m + j] += dz[j * m + i] / largest;
                through -= dz[j * m + i] * a[i * m + j];
            }
        }
        for i in 0..m {
            da[i * m + column] += through / (largest * largest);
        }
    });
    da
}

fn check(a: &[f32], m: usize) -> usize {
    assert!(
        m > 0 && a.len().is_multiple_of(m * m),
        "inverse of {} values, m = {m}",
        a.len()
    );
    m * m
}

fn rows(x: &[f32], m: usize) -> Matrix<'_> {
    Matrix::rows(x, m)
}

fn multiply(m: usize, alpha: f32, a: Matrix, b: Matrix, out: &mut [f32], add: bool) {
    product([m, m, m], alpha, a, b, out, (m, 1), add);
}

/// The first column with the largest sum, and that sum.
fn column_sum(a: &[f32], m: usize) -> (usize, f32) {
    let mut sums = vec![0.0; m];
    for row in a.chunks_exact(m) {
        sums.iter_mut()
            .zip(row)
            .for_each(|(sum, value)| *sum += value);
    }
    let first = (0, f32::NEG_INFINITY);
    sums.into_iter()
        .enumerate()
        .fold(first, |held, (at, sum)| match sum > held.1 {
            true => (at, sum),
            false => held,
        })
}

/// The products inside a step: `P = A Z`, `7 I - P`, `15 I - P (7 I - P)` and `13 I - P (15 I - ..)`.
struct Step {
    m: usize,
    p: Vec<f32>,
    inner: Vec<f32>,
    middle: Vec<f32>,
    outer: Vec<f32>,
}

impl Step {
    fn new(m: usize) -> Self {
        let zeros = || vec![0.0; m * m];
        Step {
            m,
            p: zeros(),
            inner: zeros(),
            middle: zeros(),
            outer: zeros(),
        }
    }

    fn parts(&mut self, a: &[f32], z: &[f32]) {
        let m = self.m;
        let diagonal =
            |x: &mut [f32], value: f32| x.iter_mut().step_by(m + 1).for_each(|x| *x += value);
        multiply(m, 1.0, rows(a, m), rows(z, m), &mut self.p, false);
        for (inner, p) in self.inner.iter_mut().zip(&self.p) {
            *inner = -p;
        }
        diagonal(&mut self.inner, 7.0);
        let p = rows(&self.p, m);
        multiply(m, -1.0, p, rows(&self.inner, m), &mut self.middle, false);
        diagonal(&mut self.middle, 15.0);
        multiply(m, -1.0, p, rows(&self.middle, m), &mut self.outer, false);
        diagonal(&mut self.outer, 13.0);
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) use tests::{naive, weights};

#[cfg(any(test, fuzzing))]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    pub(crate) fn naive(a: &[f64], m: usize, steps: usize) -> Vec<f64> {
        let times = |a: &[f64], b: &[f64]| -> Vec<f64> {
            let at = |i: usize, j: usize| (0..m).map(|k| a[i * m + k] * b[k * m + j]).sum();
            (0..m * m).map(|place| at(place / m, place % m)).collect()
        };
        let less = |factor: f64, x: Vec<f64>| -> Vec<f64> {
            let one = |at: usize| {
                if at.is_multiple_of(m + 1) {
                    factor
                } else {
                    0.0
                }
            };
            x.iter().enumerate().map(|(at, x)| one(at) - x).collect()
        };
        let sums = (0..m).map(|j| (0..m).map(|i| a[i * m + j]).sum::<f64>());
        let largest = sums.fold(f64::NEG_INFINITY, f64::max);
        let mut z: Vec<f64> = (0..m * m)
            .map(|at| a[at % m * m + at / m] / largest)
            .collect();
        for _ in 0..steps {
            let p = times(a, &z);
            let inner = less(15.0, times(&p, &less(7.0, p.clone())));
            let outer = less(13.0, times(&p, &inner));
            z = times(&z, &outer).iter().map(|z| z / 4.0).collect();
        }
        z
    }

    /// `count` matrices of rows that sum to one, as the mixer has them.
    pub(crate) fn weights(seed: u64, count: usize, m: usize) -> Vec<f32> {
        let values = rand_vec(seed, count * m * m);
        let mut a: Vec<f32> = values.iter().map(|x| (2.0 * x).exp()).collect();
        for row in a.chunks_mut(m) {
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|x| *x /= sum);
        }
        a
    }

    /// Two matrices, at once.
    #[test]
    fn inverses_and_gradients_match_the_equation() {
        for (m, steps) in [(1, 2), (3, 0), (3, 1), (5, 6), (9, 3)] {
            let a = weights(1, 2, m);
            let dz = rand_vec(2, a.len());
            let (want, grads) = differences(&[&a], &dz, |v| {
                v[0].chunks(m * m)
                    .flat_map(|a| naive(a, m, steps))
                    .collect()
            });
            let (z, saved) = forward(&a, m, steps, true);
            assert_close("z", &z, &want, 2e-5);
            let da = backward(&a, m, steps, &saved, &dz);
            assert_close("da", &da, &grads[0], 2e-4);
        }
    }

    /// Enough steps invert a matrix that has an inverse.
    #[test]
    fn many_steps_invert() {
        let a = [0.7, 0.2, 0.1, 0.1, 0.8, 0.1, 0.2, 0.2, 0.6];
        let (z, _) = forward(&a, 3, 20, false);
        let mut one = [0.0; 9];
        multiply(3, 1.0, rows(&a, 3), rows(&z, 3), &mut one, false);
        assert_close(
            "A Z",
            &one,
            &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
            1e-4,
        );
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[
            inverses_and_gradients_match_the_equation,
            many_steps_invert,
        ]);
    }
}
