//! Factors of inputs that make rounding hurt less, found from the inputs seen.
//!
//! A layer computes `W x`; with factors `s` it computes `(W diag(s)) (x / s)`, which is the same before anything is rounded.
//! The inputs' part, `1 / s`, is kept beside the weight ([`Quants::inputs`]), so that nothing before the layer changes.
//!
//! - [`smooth`] (SmoothQuant; Xiao et al., 2022, arXiv 2211.10438, equation 4) moves outliers of the inputs into the weights
//!   before both are rounded to 8 bits;
//! - [`activation_aware`] (AWQ; Lin et al., 2023, arXiv 2306.00978, equations 4 and 5) enlarges the weights of large inputs
//!   before they are rounded: of `s = (mean |x|)^r`, the `r` with the least error in the outputs, then (as its authors'
//!   code) of ten ways to cut off the ends of every group the best.

use rayon::prelude::*;

use super::gptq::Inputs;
use super::round::{Scheme, Steps, nearest, shrunk};
use super::{QuantError, Quants};

/// Exponents that are tried.
const EXPONENTS: usize = 20;
/// Ends of a group that are tried: 1, 0.95, .. 0.55 of what they are.
const SHRINKS: usize = 10;

/// `w[:, i] * factors[i]`.
fn scaled(weights: &[f32], factors: &[f32]) -> Vec<f32> {
    let rows = weights.chunks_exact(factors.len().max(1));
    rows.flat_map(|row| row.iter().zip(factors).map(|(w, s)| w * s))
        .collect()
}

fn inverse(factors: &[f32]) -> Vec<f32> {
    factors.iter().map(|factor| 1.0 / factor).collect()
}

/// Divides factors by `sqrt(min max)`, so that weights keep their size.
fn centred(mut factors: Vec<f32>) -> Vec<f32> {
    let least = factors.iter().copied().fold(f32::INFINITY, f32::min);
    let most = factors.iter().copied().fold(0.0, f32::max);
    let middle = (least * most).sqrt();
    if middle > 0.0 && middle.is_finite() {
        factors.iter_mut().for_each(|factor| *factor /= middle);
    }
    factors
}

/// `s_i = max|x_i|^alpha / max|W_i|^(1 - alpha)`, at least 1e-5.
pub fn smoothing(alpha: f32, weights: &[f32], inputs: &Inputs) -> Vec<f32> {
    let mut most = vec![1e-5f32; inputs.largest.len()];
    for row in weights.chunks_exact(most.len().max(1)) {
        for (most, weight) in most.iter_mut().zip(row) {
            *most = most.max(weight.abs());
        }
    }
    let of = |(x, w): (&f32, &f32)| (x.powf(alpha) / w.powf(1.0 - alpha)).max(1e-5);
    inputs.largest.iter().zip(&most).map(of).collect()
}

/// Weights and inputs of 8 bits, outliers moved by [`smoothing`].
pub fn smooth(
    scheme: Scheme,
    alpha: f32,
    rows: usize,
    weights: &[f32],
    inputs: &Inputs,
) -> Result<Quants, QuantError> {
    let factors = centred(smoothing(alpha, weights, inputs));
    let mut quants = nearest(scheme, [rows, factors.len()], &scaled(weights, &factors))?;
    quants.inputs = Some(inverse(&factors));
    quants.brief_inputs = true;
    Ok(quants)
}

/// What quantised weights stand for, the factors of inputs within, minus the weights.
fn difference(quants: &Quants, weights: &[f32]) -> Vec<f32> {
    let (k, groups) = (quants.columns, quants.groups());
    let mut all = vec![0.0; weights.len()];
    all.par_chunks_mut(k).enumerate().for_each(|(row, to)| {
        for (column, to) in to.iter_mut().enumerate() {
            let (at, group) = (row * k + column, row * groups + column / quants.group);
            let zero = quants
                .zeros
                .as_ref()
                .map_or(0.0, |zeros| zeros[group].to_f32());
            let value = f32::from(quants.values[at]).mul_add(quants.scales[group].to_f32(), zero);
            let factor = quants.inputs.as_ref().map_or(1.0, |inputs| inputs[column]);
            *to = value * factor - weights[at];
        }
    });
    all
}

/// The squared error in the outputs over the inputs seen.
pub fn output_error(quants: &Quants, weights: &[f32], inputs: &Inputs) -> f64 {
    inputs.error(&difference(quants, weights))
}

/// Weights of 8 or 4 bits with the factors and the cut ends that AWQ finds.
pub fn activation_aware(
    scheme: Scheme,
    rows: usize,
    weights: &[f32],
    inputs: &Inputs,
) -> Result<Quants, QuantError> {
    let k = inputs.largest.len();
    let count = inputs.rows.max(1) as f64;
    let mean: Vec<f32> = inputs
        .absolute
        .iter()
        .map(|sum| (sum / count) as f32)
        .collect();
    let mut best: Option<(f64, Vec<f32>, Quants)> = None;
    for step in 0..EXPONENTS {
        let exponent = step as f32 / EXPONENTS as f32;
        let of = |mean: &f32| mean.powf(exponent).max(1e-4);
        let factors = centred(mean.iter().map(of).collect());
        let mut quants = nearest(scheme, [rows, k], &scaled(weights, &factors))?;
        if step > 0 {
            quants.inputs = Some(inverse(&factors));
        }
        let error = output_error(&quants, weights, inputs);
        if best.as_ref().is_none_or(|(least, ..)| error < *least) {
            best = Some((error, factors, quants));
        }
    }
    let Some((error, factors, quants)) = best else {
        return Err(QuantError("the inputs seen are not finite numbers".into()));
    };
    let mut cut = clipped(scheme, rows, &scaled(weights, &factors), &factors, inputs)?;
    cut.inputs = quants.inputs.clone();
    // The cuts look at each group alone.
    Ok(match output_error(&cut, weights, inputs) < error {
        true => cut,
        false => quants,
    })
}

/// Rounds weights (already with their factors), the ends of every group cut off where that makes the error of the group's own
/// outputs less.
fn clipped(
    scheme: Scheme,
    rows: usize,
    weights: &[f32],
    factors: &[f32],
    inputs: &Inputs,
) -> Result<Quants, QuantError> {
    let k = factors.len();
    let group = scheme.group_of(k);
    let groups = k.div_ceil(group).max(1);
    let mut shrinks = vec![1.0f32; rows * groups];
    shrinks
        .par_chunks_mut(groups)
        .enumerate()
        .for_each(|(row, shrinks)| {
            let weights = weights[row * k..][..k].chunks(group);
            for (at, (weights, shrink)) in weights.zip(shrinks).enumerate() {
                let mut least = f64::INFINITY;
                for step in 0..SHRINKS {
                    let tried = 1.0 - step as f32 / (2 * SHRINKS) as f32;
                    let steps = Steps::of(scheme, weights, tried);
                    let first = at * group;
                    let errors: Vec<f32> = weights
                        .iter()
                        .zip(&factors[first..])
                        .map(|(weight, factor)| (steps.round(*weight).1 - weight) / factor)
                        .collect();
                    let mut error = 0.0f64;
                    for (i, own) in errors.iter().enumerate() {
                        let row = &inputs.products[(first + i) * k + first..][..errors.len()];
                        let sum: f32 = row.iter().zip(&errors).map(|(p, e)| p * e).sum();
                        error += f64::from(own * sum);
                    }
                    if error < least {
                        (least, *shrink) = (error, tried);
                    }
                }
            }
        });
    shrunk(scheme, [rows, k], weights, &|row, at| {
        shrinks[row * groups + at]
    })
}
