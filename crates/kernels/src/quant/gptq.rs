//! GPTQ (Frantar et al., 2022, arXiv 2210.17323, algorithm 1): weights are rounded column by column, and the error of each is
//! made up for by those that are not rounded yet, in the way that keeps `|X Wᵀ - X Ŵᵀ|` small for the inputs `X` seen.

use rayon::prelude::*;

use super::round::{Scheme, Steps, empty, fill_steps};
use super::{QuantError, Quants};
use crate::gemm::Matrix;
use crate::matmul::{Finish, Precision, matmul};

/// Sums over the inputs of a layer.
#[derive(Clone, Debug)]
pub struct Inputs {
    columns: usize,
    /// Rows seen.
    pub rows: usize,
    /// `XᵀX`, `[columns, columns]`.
    pub products: Vec<f32>,
    /// `sum |x|` of each column.
    pub absolute: Vec<f64>,
    /// `max |x|` of each column.
    pub largest: Vec<f32>,
}

impl Inputs {
    /// Nothing seen yet.
    pub fn new(columns: usize) -> Self {
        Inputs {
            columns,
            rows: 0,
            products: vec![0.0; columns * columns],
            absolute: vec![0.0; columns],
            largest: vec![0.0; columns],
        }
    }

    /// Adds rows `x [rows, columns]`.
    pub fn add(&mut self, x: &[f32]) {
        let (k, rows) = (self.columns, x.len() / self.columns.max(1));
        self.rows += rows;
        for row in x.chunks_exact(k.max(1)) {
            for ((sum, most), value) in self.absolute.iter_mut().zip(&mut self.largest).zip(row) {
                *sum += f64::from(value.abs());
                *most = most.max(value.abs());
            }
        }
        let x = Matrix::rows(x, k);
        let finish = Finish {
            add: true,
            bias: None,
        };
        let products = &mut self.products;
        matmul(
            Precision::F32,
            [k, rows, k],
            x.transposed(),
            x,
            products,
            finish,
        );
    }

    /// `|X D|²` summed over the rows of `D [rows, columns]`: the error that a change of the weights makes in the outputs.
    pub fn error(&self, difference: &[f32]) -> f64 {
        let k = self.columns;
        let rows = difference.len() / k.max(1);
        let mut with = vec![0.0; difference.len()];
        let (a, b) = (Matrix::rows(difference, k), Matrix::rows(&self.products, k));
        matmul(
            Precision::F32,
            [rows, k, k],
            a,
            b,
            &mut with,
            Finish::default(),
        );
        let terms = difference.iter().zip(&with);
        terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }
}

/// What [`quantise`] may do beside the scheme.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Added to the diagonal of `XᵀX`, as a share of its mean.
    pub damping: f64,
    /// Columns in the order of falling `Σ x²` (act-order); scales then are those of the weights as they were.
    pub by_size: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            damping: 0.01,
            by_size: false,
        }
    }
}

/// Quantises `weights [rows, columns]` for the inputs seen.
///
/// Refuses weights that no f16 scale reaches, and inputs that are not finite.
pub fn quantise(
    scheme: Scheme,
    options: Options,
    rows: usize,
    weights: &[f32],
    inputs: &Inputs,
) -> Result<Quants, QuantError> {
    let k = inputs.columns;
    assert_eq!(weights.len(), rows * k, "weights for GPTQ");
    let mut order: Vec<usize> = (0..k).collect();
    if options.by_size {
        let size = |at: &usize| inputs.products[at * k + at];
        order.sort_by(|a, b| size(b).total_cmp(&size(a)).then(a.cmp(b)));
    }
    let diagonal = (0..k).map(|at| f64::from(inputs.products[at * k + at]));
    let damping = options.damping * diagonal.sum::<f64>() / k.max(1) as f64;
    // Rows of the upper triangle of the factor of the inverse, in the order of the columns.
    let mut hessian = vec![0.0f64; k * k];
    for (i, from) in order.iter().enumerate() {
        for (j, column) in order.iter().enumerate() {
            hessian[i * k + j] = f64::from(inputs.products[from * k + column]);
        }
        let own = &mut hessian[i * k + i];
        // A column that is always 0 stands alone.
        *own = if *own == 0.0 { 1.0 } else { *own } + damping;
    }
    let upper = inverse_factor(hessian, k).ok_or_else(|| {
        QuantError("the inputs seen are not finite numbers, or their products are singular".into())
    })?;
    let upper: Vec<f32> = upper.iter().map(|value| *value as f32).collect();
    let group = scheme.group_of(k);
    let groups = k.div_ceil(group).max(1);
    let mut quants = empty(scheme, [rows, k]);
    let mut steps = vec![Steps::of(scheme, &[], 1.0); rows * groups];
    let all = quants
        .values
        .par_chunks_mut(k)
        .zip(steps.par_chunks_mut(groups));
    all.zip(weights.par_chunks(k))
        .for_each(|((values, steps), weights)| {
            one_row(
                scheme, options, group, &order, &upper, weights, values, steps,
            );
        });
    fill_steps(&mut quants, &steps)?;
    Ok(quants)
}

/// Rounds one row. Rows know nothing of each other.
#[allow(clippy::too_many_arguments)]
fn one_row(
    scheme: Scheme,
    options: Options,
    group: usize,
    order: &[usize],
    upper: &[f32],
    weights: &[f32],
    values: &mut [i8],
    steps: &mut [Steps],
) {
    let k = order.len();
    // In the order of the columns; columns not rounded yet make up for those that are.
    let mut left: Vec<f32> = order.iter().map(|column| weights[*column]).collect();
    if options.by_size {
        for (steps, weights) in steps.iter_mut().zip(weights.chunks(group)) {
            *steps = Steps::of(scheme, weights, 1.0);
        }
    }
    for (at, column) in order.iter().enumerate() {
        let own = column / group;
        if !options.by_size && at % group == 0 {
            steps[own] = Steps::of(scheme, &left[at..(at + group).min(k)], 1.0);
        }
        let (number, rounded) = steps[own].round(left[at]);
        values[*column] = number;
        let row = &upper[at * k + at..(at + 1) * k];
        let error = (left[at] - rounded) / row[0];
        for (left, factor) in left[at..].iter_mut().zip(row) {
            *left -= error * factor;
        }
    }
}

/// The upper triangular `U` with `UᵀU = A⁻¹` for symmetric positive `A [n, n]`; `None` where it is not positive.
///
/// With the rows and columns of `A` in reverse order as `L Lᵀ`, `U` is the inverse of `L` in reverse order.
fn inverse_factor(a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    let mut lower: Vec<f64> = a.into_iter().rev().collect();
    for j in 0..n {
        let (done, rest) = lower.split_at_mut((j + 1) * n);
        let own = &mut done[j * n..];
        let square = own[j] - own[..j].iter().map(|value| value * value).sum::<f64>();
        // Also refuses NaN.
        if !(square > 0.0 && square.is_finite()) {
            return None;
        }
        own[j] = square.sqrt();
        let own = &own[..=j];
        rest.par_chunks_mut(n).with_min_len(64).for_each(|row| {
            let sum = dot(&row[..j], own);
            row[j] = (row[j] - sum) / own[j];
        });
    }
    // Column by column of the inverse, kept as rows: `inverse[j]` solves `L x = e_j`.
    let mut upper = vec![0.0; n * n];
    upper.par_chunks_mut(n).enumerate().for_each(|(at, row)| {
        let j = n - 1 - at;
        let mut x = vec![0.0; n];
        x[j] = 1.0 / lower[j * n + j];
        for i in j + 1..n {
            let sum = dot(&lower[i * n + j..i * n + i], &x[j..i]);
            x[i] = -sum / lower[i * n + i];
        }
        for (i, value) in x.into_iter().enumerate().skip(j) {
            row[n - 1 - i] = value;
        }
    });
    // What was found is row `at` with the columns before it: the transpose of the factor wanted.
    let mut turned = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            turned[j * n + i] = upper[i * n + j];
        }
    }
    Some(turned)
}

/// `sum a b` in eight sums, so that it becomes vector instructions.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a_blocks, a_rest) = a.as_chunks::<8>();
    let (b_blocks, b_rest) = b[..a.len()].as_chunks::<8>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for at in 0..8 {
            sums[at] += a[at] * b[at];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}
