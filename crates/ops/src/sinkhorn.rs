//! Balancing of score matrices as an op; see [`anyformer_kernels::sinkhorn`].

use std::sync::Arc;

use anyformer_kernels::sinkhorn as kernel;
use burn::tensor::Tensor;

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu};

/// What is no entry's: far below every score.
const NOBODY: f32 = -1e9;

/// Makes scores `[lines, rows, rows]` into (nearly) doubly stochastic matrices by `steps` times taking the log-sum-exp of each row,
/// then of each column, off. `own` are the rows and columns of each matrix that count; the others become zero.
///
/// With `causal` only entries before the diagonal count, a column's sum runs down to the row at hand, and rows are balanced first
/// and last; columns are then summed without their maximum, entries being at most about 0.
pub fn balance(scores: Tensor<3>, own: &Arc<Vec<usize>>, steps: usize, causal: bool) -> Tensor<3> {
    let [lines, rows, columns] = scores.dims();
    assert!(
        rows == columns && own.len() == lines && own.iter().all(|own| *own <= rows),
        "balance: {lines} matrices of {rows} x {columns}, {own:?} of them count"
    );
    if !on_cpu(&scores) {
        return composed(scores, own, steps, causal);
    }
    let op = Balance {
        own: own.clone(),
        steps,
        causal,
    };
    single(op, [erase(scores)])
}

#[derive(Debug)]
struct Balance {
    own: Arc<Vec<usize>>,
    steps: usize,
    causal: bool,
}

impl Balance {
    fn kernel(&self, scores: View) -> kernel::Balance<'_> {
        kernel::Balance {
            size: scores.shape[1],
            own: &self.own,
            steps: self.steps,
            causal: self.causal,
        }
    }
}

impl Kernel for Balance {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let scores = inputs[0];
        output(scores.shape, self.kernel(scores).forward(scores.data))
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let scores = inputs[0];
        let gradient = self.kernel(scores).backward(scores.data, only(grads).data);
        vec![Some(Array::new(scores.shape, gradient))]
    }
}

/// Takes the log-sum-exp along `axis` off.
fn normalise(x: Tensor<3>, axis: usize) -> Tensor<3> {
    let top = x.clone().detach().max_dim(axis);
    let sum = (x.clone() - top.clone()).exp().sum_dim(axis);
    x - top - sum.log()
}

/// Takes off each entry the logarithm of the sum of exponentials of its column down to its own row. A sum below 1e-30 counts as that.
fn normalise_so_far(x: Tensor<3>, triangle: Tensor<3>) -> Tensor<3> {
    let sums = triangle.matmul(x.clone().exp());
    x - (sums + 1e-30).log()
}

fn composed(scores: Tensor<3>, own: &[usize], steps: usize, causal: bool) -> Tensor<3> {
    let [lines, rows, _] = scores.dims();
    let device = scores.device();
    let table = |value: &dyn Fn(usize, usize, usize) -> f32| {
        let values: Vec<f32> = own
            .iter()
            .flat_map(|own| (0..rows * rows).map(move |at| value(*own, at / rows, at % rows)))
            .collect();
        Tensor::<1>::from_data(values.as_slice(), &device).reshape([lines, rows, rows])
    };
    let allowed = table(&|own, row, column| {
        let there = row < own && column < own;
        match there && (column < row || !causal) {
            true => 0.0,
            false => NOBODY,
        }
    });
    let mut balanced = scores + allowed.clone();
    if causal {
        // Nothing is above 0 from here on.
        balanced = normalise(balanced, 2) + allowed.clone();
    }
    let triangle = causal.then(|| table(&|_, row, column| f32::from(u8::from(column <= row))));
    for _ in 0..steps {
        balanced = match &triangle {
            None => normalise(normalise(balanced, 2) + allowed.clone(), 1) + allowed.clone(),
            Some(triangle) => {
                let columns = normalise_so_far(balanced, triangle.clone()) + allowed.clone();
                normalise(columns, 2) + allowed.clone()
            }
        };
    }
    balanced.exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn the_kernel_agrees_with_the_composed_form() {
        for causal in [false, true] {
            let own = Arc::new(vec![5, 3, 1]);
            let scores = values(1, 3 * 25).iter().map(|x| 3.0 * x).collect();
            agree("balance", 1e-4, &[scores], |x| {
                let scores = x[0].clone().reshape([3, 5, 5]);
                balance(scores, &own, 3, causal).reshape([75])
            });
        }
    }
}
