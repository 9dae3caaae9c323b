//! Rounding that knows the inputs of a layer.

use super::*;
use crate::quant::gptq::{Inputs, Options, quantise};
use crate::quant::search::{activation_aware, output_error, smooth, smoothing};

/// Rows that depend on each other, some columns much larger.
fn correlated(rows: usize, columns: usize) -> Vec<f32> {
    let hidden = rand_vec(11, rows * 6);
    let mix = rand_vec(12, 6 * columns);
    let noise = rand_vec(13, rows * columns);
    let mut x = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            let sum: f32 = (0..6)
                .map(|at| hidden[row * 6 + at] * mix[at * columns + column])
                .sum();
            let size = if column % 17 == 3 { 20.0 } else { 1.0 };
            x.push(size * (sum + 0.1 * noise[row * columns + column]));
        }
    }
    x
}

#[test]
fn errors_of_outputs_fall_with_what_is_known_of_the_inputs() {
    let (n, k) = (24, 96);
    let weights = rand_vec(21, n * k);
    let x = correlated(300, k);
    let mut inputs = Inputs::new(k);
    x.chunks(100 * k).for_each(|x| inputs.add(x));
    assert_eq!(inputs.rows, 300);
    for zeros in [false, true] {
        for group in [0, 32] {
            let scheme = Scheme {
                bits: Bits::Four,
                group,
                zeros,
            };
            let near = nearest(scheme, [n, k], &weights).expect("fits");
            let error = |quants: &Quants| output_error(quants, &weights, &inputs);
            // The error is that of the outputs themselves.
            let exact: f64 = {
                let difference: Vec<f64> = values(&near)
                    .iter()
                    .zip(&weights)
                    .map(|(a, b)| a - f64::from(*b))
                    .collect();
                let of = |x: &[f32], d: &[f64]| -> f64 {
                    x.iter().zip(d).map(|(x, d)| f64::from(*x) * d).sum()
                };
                let rows = x.chunks_exact(k);
                rows.flat_map(|x| difference.chunks_exact(k).map(move |d| of(x, d).powi(2)))
                    .sum()
            };
            assert!((error(&near) / exact - 1.0).abs() < 1e-3);
            for by_size in [false, true] {
                let options = Options {
                    by_size,
                    ..Default::default()
                };
                let better = quantise(scheme, options, n, &weights, &inputs).expect("fits");
                assert!(
                    error(&better) < 0.5 * error(&near),
                    "{scheme:?} {options:?}"
                );
            }
            let better = activation_aware(scheme, n, &weights, &inputs).expect("fits");
            assert!(error(&better) < 0.9 * error(&near), "{scheme:?}");
        }
    }
    // Inputs that have nothing to do with each other leave nothing to make up for.
    let mut apart = Inputs::new(k);
    for at in 0..k {
        apart.products[at * k + at] = 2.0;
    }
    let scheme = Scheme {
        bits: Bits::Four,
        group: 32,
        zeros: true,
    };
    let near = nearest(scheme, [n, k], &weights).expect("fits");
    assert_eq!(
        quantise(scheme, Options::default(), n, &weights, &apart).expect("fits"),
        near
    );
    // Nor do inputs that were never seen.
    let none = Inputs::new(k);
    assert_eq!(
        quantise(scheme, Options::default(), n, &weights, &none).expect("fits"),
        near
    );
    let mut broken = Inputs::new(k);
    broken.products[5] = f32::NAN;
    assert!(quantise(scheme, Options::default(), n, &weights, &broken).is_err());
}

#[test]
fn smoothing_cancels_before_rounding_and_helps_after_it() {
    let (n, k) = (24, 96);
    let (weights, x) = (rand_vec(21, n * k), correlated(300, k));
    let mut inputs = Inputs::new(k);
    inputs.add(&x);
    let scheme = Scheme {
        bits: Bits::Eight,
        group: 0,
        zeros: false,
    };
    // At alpha 1 the factors are the sizes of the inputs, at 0 one over those of the weights.
    assert_close(
        "alpha 1",
        &smoothing(1.0, &weights, &inputs),
        &inputs.largest,
        1e-6,
    );
    let factors = smoothing(0.5, &weights, &inputs);
    let exact = |factors: Option<&[f32]>| -> Vec<f32> {
        let mut out = Vec::new();
        for x in x.chunks_exact(k) {
            for w in weights.chunks_exact(k) {
                let term = |at: usize| {
                    let s = factors.map_or(1.0, |factors| f64::from(factors[at]));
                    f64::from(x[at]) / s * (f64::from(w[at]) * s)
                };
                out.push((0..k).map(term).sum::<f64>() as f32);
            }
        }
        out
    };
    let plain = exact(None);
    assert_close("identity", &exact(Some(&factors)), &plain, 1e-7);
    let error = |quants: &Quants| {
        let packed = Packed::new(quants).expect("fits");
        let got = product(Precision::F32, &x, &packed, None);
        got.iter()
            .zip(&plain)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>()
    };
    let mut direct = nearest(scheme, [n, k], &weights).expect("fits");
    direct.brief_inputs = true;
    let smoothed = smooth(scheme, 0.5, n, &weights, &inputs).expect("fits");
    assert!(error(&smoothed) < 0.5 * error(&direct));
}
