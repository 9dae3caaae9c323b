//! Balancing: matrices of scores become (nearly) doubly stochastic by steps that take the logarithm of the sum of exponentials
//! of every row, then of every column, off (Sinkhorn, 1964; Tay et al., 2020, arXiv 2002.11296).
//!
//! The causal form knows entries before the diagonal only. A column's sum runs down to the row at hand, rows come first and last.
//! Everything is done with logarithms: a column whose entries are all tiny is as good as another. The backward pass makes
//! the steps again and keeps them, a matrix at a time.

use rayon::prelude::*;

use crate::math;
use crate::simd::{dispatched, max, sum};

/// What is asked of a set of matrices.
#[derive(Clone, Copy, Debug)]
pub struct Balance<'a> {
    /// Rows and columns of every matrix.
    pub size: usize,
    /// Rows and columns of each matrix that count; others are zero.
    pub own: &'a [usize],
    /// Times that rows and columns are balanced.
    pub steps: usize,
    /// Entries before the diagonal only.
    pub causal: bool,
}

#[derive(Clone, Copy)]
enum Half {
    Rows,
    Columns,
    ColumnsSoFar,
}

/// Added to sums of columns so far, as in the composed form.
const LEAST: f32 = 1e-30;

impl Balance<'_> {
    /// The balanced matrices `[count, size, size]` of scores.
    ///
    /// Panics when the sizes do not fit.
    pub fn forward(&self, scores: &[f32]) -> Vec<f32> {
        self.each(&[scores], |[scores], own| {
            let mut matrix = self.part(scores, own);
            for half in self.halves() {
                half.apply(&mut matrix, own, self.causal);
            }
            matrix
                .iter_mut()
                .for_each(|value| *value = math::exp(*value));
            matrix
        })
    }

    /// The gradient of the scores from that of the matrices.
    pub fn backward(&self, scores: &[f32], gradient: &[f32]) -> Vec<f32> {
        self.each(&[scores, gradient], |[scores, gradient], own| {
            let halves = self.halves();
            let mut states = vec![self.part(scores, own)];
            for half in &halves {
                let mut next = states[states.len() - 1].clone();
                half.apply(&mut next, own, self.causal);
                states.push(next);
            }
            let mut grad = self.part(gradient, own);
            let last = &states[states.len() - 1];
            grad.iter_mut()
                .zip(last)
                .for_each(|(grad, value)| *grad *= math::exp(*value));
            for (half, states) in halves.iter().zip(states.windows(2)).rev() {
                half.back([&states[0], &states[1]], &mut grad, own, self.causal);
            }
            grad
        })
    }

    fn halves(&self) -> Vec<Half> {
        match self.causal {
            true => {
                let steps = [Half::ColumnsSoFar, Half::Rows].repeat(self.steps);
                [vec![Half::Rows], steps].concat()
            }
            false => [Half::Rows, Half::Columns].repeat(self.steps),
        }
    }

    /// The part of a matrix that counts, `[own, own]`.
    fn part(&self, matrix: &[f32], own: usize) -> Vec<f32> {
        let rows = matrix.chunks(self.size).take(own);
        rows.flat_map(|row| row[..own].iter().copied()).collect()
    }

    /// What `work` makes `[own, own]` of each matrix of the values; zeros where nothing counts.
    fn each<const N: usize>(
        &self,
        values: &[&[f32]; N],
        work: impl Fn([&[f32]; N], usize) -> Vec<f32> + Send + Sync,
    ) -> Vec<f32> {
        let (size, count) = (self.size * self.size, self.own.len());
        assert!(
            values.iter().all(|values| values.len() == count * size)
                && self.own.iter().all(|own| *own <= self.size),
            "balance: {count} matrices of {} and values of other sizes",
            self.size
        );
        let mut out = vec![0.0; count * size];
        let tasks = out.par_chunks_mut(size.max(1)).zip(self.own).enumerate();
        tasks.for_each(|(at, (out, own))| {
            let part = work(values.map(|values| &values[at * size..][..size]), *own);
            let rows = part.chunks(*own.max(&1)).zip(out.chunks_mut(self.size));
            for (row, (from, to)) in rows.enumerate() {
                let reach = if self.causal { row } else { *own };
                to[..reach].copy_from_slice(&from[..reach]);
            }
        });
        out
    }
}

impl Half {
    fn apply(self, matrix: &mut [f32], own: usize, causal: bool) {
        match self {
            Half::Rows => balance_rows(own, causal, matrix),
            Half::Columns => balance_columns(own, matrix),
            Half::ColumnsSoFar => balance_so_far(own, matrix),
        }
    }

    /// Turns the gradient of what came out into that of what went in; `states` are these two.
    fn back(self, states: [&[f32]; 2], grad: &mut [f32], own: usize, causal: bool) {
        match self {
            Half::Rows => rows_back(own, causal, states[1], grad),
            Half::Columns => columns_back(own, states[1], grad),
            Half::ColumnsSoFar => so_far_back(own, states[0], states[1], grad),
        }
    }
}

dispatched! {
    fn balance_rows<'a>(own: usize, causal: bool, matrix: &'a mut [f32]) {
        let mut powers = vec![0.0; own];
        for (at, row) in matrix.chunks_exact_mut(own.max(1)).enumerate() {
            let reach = if causal { at } else { own };
            if reach == 0 {
                continue;
            }
            let (row, powers) = (&mut row[..reach], &mut powers[..reach]);
            let top = max(row);
            for i in 0..reach {
                powers[i] = math::exp(row[i] - top);
            }
            let off = top + math::ln(sum(powers));
            for value in row {
                *value -= off;
            }
        }
    }
}

dispatched! {
    fn balance_columns<'a>(own: usize, matrix: &'a mut [f32]) {
        let mut top = vec![f32::NEG_INFINITY; own];
        let mut sums = vec![0.0; own];
        for row in matrix.chunks_exact(own.max(1)) {
            for j in 0..own {
                top[j] = top[j].max(row[j]);
            }
        }
        for row in matrix.chunks_exact(own.max(1)) {
            for j in 0..own {
                sums[j] += math::exp(row[j] - top[j]);
            }
        }
        for j in 0..own {
            top[j] += math::ln(sums[j]);
        }
        for row in matrix.chunks_exact_mut(own.max(1)) {
            for j in 0..own {
                row[j] -= top[j];
            }
        }
    }
}

dispatched! {
    fn balance_so_far<'a>(own: usize, matrix: &'a mut [f32]) {
        let mut sums = vec![0.0; own];
        for (at, row) in matrix.chunks_exact_mut(own.max(1)).enumerate() {
            for j in 0..at {
                sums[j] += math::exp(row[j]);
                row[j] -= math::ln(sums[j] + LEAST);
            }
        }
    }
}

dispatched! {
    fn rows_back<'a>(own: usize, causal: bool, after: &'a [f32], grad: &'a mut [f32]) {
        let rows = after.chunks_exact(own.max(1)).zip(grad.chunks_exact_mut(own.max(1)));
        for (at, (after, grad)) in rows.enumerate() {
            let reach = if causal { at } else { own };
            let grad = &mut grad[..reach];
            let total = sum(grad);
            for i in 0..reach {
                grad[i] -= math::exp(after[i]) * total;
            }
        }
    }
}

dispatched! {
    fn columns_back<'a>(own: usize, after: &'a [f32], grad: &'a mut [f32]) {
        let mut totals = vec![0.0; own];
        for row in grad.chunks_exact(own.max(1)) {
            for j in 0..own {
                totals[j] += row[j];
            }
        }
        let rows = after.chunks_exact(own.max(1)).zip(grad.chunks_exact_mut(own.max(1)));
        for (after, grad) in rows {
            for j in 0..own {
                grad[j] -= math::exp(after[j]) * totals[j];
            }
        }
    }
}

dispatched! {
    fn so_far_back<'a>(own: usize, before: &'a [f32], after: &'a [f32], grad: &'a mut [f32]) {
        // Of every column, the sum over the rows below of the gradient by their sum.
        let mut below = vec![0.0; own];
        for at in (0..own).rev() {
            let (before, after) = (&before[at * own..][..at], &after[at * own..][..at]);
            let grad = &mut grad[at * own..][..at];
            for j in 0..at {
                below[j] += grad[j] * math::exp(after[j] - before[j]);
                grad[j] -= math::exp(before[j]) * below[j];
            }
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

#[cfg(any(test, fuzzing))]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec, with_fewer_instructions};

    fn naive(b: Balance, x: &[f64]) -> Vec<f64> {
        let n = b.size;
        let mut out = vec![0.0; x.len()];
        for (line, own) in b.own.iter().enumerate() {
            let seen = |i: usize, j: usize| i < *own && j < *own && (j < i || !b.causal);
            let mut m: Vec<Vec<f64>> = (0..n)
                .map(|i| (0..n).map(|j| x[(line * n + i) * n + j]).collect())
                .collect();
            let sum = |m: &Vec<Vec<f64>>, pairs: Vec<(usize, usize)>| {
                let seen = pairs.into_iter().filter(|(i, j)| seen(*i, *j));
                seen.map(|(i, j)| m[i][j].exp()).sum::<f64>().ln()
            };
            let rows = |m: &mut Vec<Vec<f64>>| {
                let old = m.clone();
                for i in 0..n {
                    let off = sum(&old, (0..n).map(|j| (i, j)).collect());
                    m[i].iter_mut().for_each(|value| *value -= off);
                }
            };
            let columns = |m: &mut Vec<Vec<f64>>| {
                let old = m.clone();
                for (i, j) in (0..n * n).map(|at| (at / n, at % n)) {
                    let down = if b.causal { i + 1 } else { n };
                    m[i][j] -= sum(&old, (0..down).map(|i| (i, j)).collect());
                }
            };
            if b.causal {
                rows(&mut m);
            }
            for _ in 0..b.steps {
                if b.causal {
                    columns(&mut m);
                    rows(&mut m);
                } else {
                    rows(&mut m);
                    columns(&mut m);
                }
            }
            for (i, j) in (0..n * n)
                .map(|at| (at / n, at % n))
                .filter(|(i, j)| seen(*i, *j))
            {
                out[(line * n + i) * n + j] = m[i][j].exp();
            }
        }
        out
    }

    /// Output and gradient for scores of this size.
    fn check(b: Balance, largest: f32) {
        let count = b.own.len() * b.size * b.size;
        let x: Vec<f32> = rand_vec(1, count).iter().map(|x| largest * x).collect();
        let dy = rand_vec(2, count);
        let (want, grads) = differences(&[&x], &dy, |v| naive(b, v[0]));
        let name = format!("{b:?}");
        assert_close(&name, &b.forward(&x), &want, 1e-5);
        assert_close(&name, &b.backward(&x, &dy), &grads[0], 2e-4);
    }

    fn matches_naive_with_its_gradient() {
        for causal in [false, true] {
            for (size, own) in [(1, vec![1]), (3, vec![3, 1, 0, 2]), (9, vec![9, 7])] {
                for steps in [0, 1, 4] {
                    let b = Balance {
                        size,
                        own: &own,
                        steps,
                        causal,
                    };
                    check(b, 4.0);
                }
            }
        }
    }

    /// A problem from bytes, against the naive form.
    pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
        let size = bytes.number(1, 9);
        let own: Vec<usize> = (0..bytes.number(1, 3))
            .map(|_| bytes.number(0, size))
            .collect();
        let b = Balance {
            size,
            own: &own,
            steps: bytes.number(0, 5),
            causal: bytes.flag(),
        };
        check(b, bytes.one_of(&[1.0, 0.0, 4.0]));
    }

    #[test]
    fn balanced_matrices_match_the_naive_form() {
        matches_naive_with_its_gradient();
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        with_fewer_instructions(&[matches_naive_with_its_gradient]);
    }

    #[test]
    fn scores_far_apart_are_balanced_all_the_same() {
        // Column 1 is far below column 0 in every row.
        let x = [0.0, -500.0, 0.0, -500.5];
        let b = Balance {
            size: 2,
            own: &[2],
            steps: 30,
            causal: false,
        };
        let y = b.forward(&x);
        for j in 0..2 {
            assert!((y[j] + y[2 + j] - 1.0).abs() < 1e-5, "{y:?}");
            assert!((y[2 * j] + y[2 * j + 1] - 1.0).abs() < 1e-3, "{y:?}");
        }
    }
}
