use half::f16;

use super::round::{Scheme, nearest};
use super::*;
use crate::testing::{assert_close, rand_vec};

#[cfg(test)]
mod calibrated;

fn levels() -> Vec<Level> {
    match Level::best() {
        Level::Portable => vec![Level::Portable],
        best => vec![Level::Portable, best],
    }
}

fn schemes() -> Vec<Scheme> {
    let mut all = Vec::new();
    for (bits, zeros) in [
        (Bits::Eight, false),
        (Bits::Four, false),
        (Bits::Four, true),
    ] {
        for group in [0, 8, 32, 128] {
            all.push(Scheme { bits, group, zeros });
        }
    }
    all
}

/// The weights that `quants` stands for, as the documentation says it.
fn values(quants: &Quants) -> Vec<f64> {
    let mut values = Vec::new();
    for row in 0..quants.rows {
        for column in 0..quants.columns {
            let group = row * quants.groups() + column / quants.group;
            let q = f64::from(quants.values[row * quants.columns + column]);
            let zero = quants
                .zeros
                .as_ref()
                .map_or(0.0, |zeros| zeros[group].to_f64());
            let factor = quants
                .inputs
                .as_ref()
                .map_or(1.0, |inputs| f64::from(inputs[column]));
            values.push((q * quants.scales[group].to_f64() + zero) * factor);
        }
    }
    values
}

fn naive(x: &[f32], quants: &Quants, bias: Option<&[f32]>) -> Vec<f32> {
    let weights = values(quants);
    let mut out = Vec::new();
    for x in x.chunks_exact(quants.columns) {
        for (row, weights) in weights.chunks_exact(quants.columns).enumerate() {
            let sum: f64 = x.iter().zip(weights).map(|(x, w)| f64::from(*x) * w).sum();
            out.push((sum + bias.map_or(0.0, |bias| f64::from(bias[row]))) as f32);
        }
    }
    out
}

const SIZES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [1, 32, 16],
    [2, 33, 17],
    [3, 7, 40],
    [5, 130, 31],
    [8, 64, 48],
    [13, 257, 5],
    [32, 40, 33],
    [37, 70, 50],
];

#[test]
fn every_scheme_level_and_number_of_rows_matches_the_sum() {
    for scheme in schemes() {
        for [m, k, n] in SIZES {
            let mut quants = nearest(scheme, [n, k], &rand_vec(1, n * k)).expect("fits");
            let x = rand_vec(2, m * k);
            let bias = rand_vec(3, n);
            for factors in [false, true] {
                if factors {
                    quants.inputs = Some(rand_vec(4, k));
                }
                let packed = Packed::new(&quants).expect("fits");
                assert_eq!(packed.quants(), Some(quants.clone()));
                let rows = packed.widened(0..n);
                let want: Vec<f32> = values(&quants).iter().map(|v| *v as f32).collect();
                assert_close("widened", &rows, &want, 1e-6);
                for level in levels() {
                    for bias in [None, Some(&bias[..])] {
                        let got = product_at(level, Precision::F32, &x, &packed, bias);
                        let name = format!("{scheme:?} {level:?} {m} x {k} x {n}");
                        assert_close(&name, &got, &naive(&x, &quants, bias), 2e-6);
                    }
                }
            }
        }
    }
}

#[test]
fn weights_of_16_bits_are_what_they_are() {
    for [m, k, n] in SIZES {
        let (weights, x) = (rand_vec(1, n * k), rand_vec(2, m * k));
        for bits in [Bits::Half, Bits::Brain] {
            let brief = |weight: &f32| match bits {
                Bits::Half => f16::from_f32(*weight).to_bits(),
                _ => half::bf16::from_f32(*weight).to_bits(),
            };
            let halves: Vec<u16> = weights.iter().map(brief).collect();
            let packed = Packed::of_halves(bits, [n, k], &halves);
            let wide = |half: &u16| match bits {
                Bits::Half => f16::from_bits(*half).to_f32(),
                _ => half::bf16::from_bits(*half).to_f32(),
            };
            let widened: Vec<f32> = halves.iter().map(wide).collect();
            assert_eq!(
                (packed.widened(0..n), packed.quants()),
                (widened.clone(), None)
            );
            let mut want = Vec::new();
            for x in x.chunks_exact(k) {
                for w in widened.chunks_exact(k) {
                    let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    want.push(terms.sum::<f64>() as f32);
                }
            }
            for level in levels() {
                let got = product_at(level, Precision::F32, &x, &packed, None);
                assert_close(
                    &format!("{bits:?} {level:?} {m} x {k} x {n}"),
                    &got,
                    &want,
                    2e-6,
                );
            }
        }
    }
}

/// Weights of every kind, and the values that they stand for.
fn of_every_kind(n: usize, k: usize) -> Vec<(String, Packed)> {
    let weights = rand_vec(1, n * k);
    let mut all = Vec::new();
    for scheme in schemes() {
        let quants = nearest(scheme, [n, k], &weights).expect("fits");
        all.push((format!("{scheme:?}"), Packed::new(&quants).expect("fits")));
    }
    let halves: Vec<u16> = weights
        .iter()
        .map(|x| f16::from_f32(*x).to_bits())
        .collect();
    all.push(("f16".into(), Packed::of_halves(Bits::Half, [n, k], &halves)));
    let brief = weights.iter().map(|x| half::bf16::from_f32(*x).to_bits());
    let brief: Vec<u16> = brief.collect();
    all.push((
        "bf16".into(),
        Packed::of_halves(Bits::Brain, [n, k], &brief),
    ));
    all
}

#[test]
fn many_rows_are_products_of_the_widened_weights_in_both_precisions() {
    // Fewer outputs than rows and more, odd widths, several stretches of the inner dimension, part of a panel.
    for [m, k, n] in [[33, 7, 3], [40, 600, 100], [70, 1037, 17], [400, 530, 31]] {
        for (name, packed) in of_every_kind(n, k) {
            let (x, bias) = (rand_vec(2, m * k), rand_vec(3, n));
            let wide = packed.widened(0..n);
            for precision in [Precision::F32, Precision::Bf16] {
                let rounded = |values: &[f32]| -> Vec<f64> {
                    let one = |value: &f32| match precision {
                        Precision::F32 => *value,
                        Precision::Bf16 => half::bf16::from_f32(*value).to_f32(),
                    };
                    values.iter().map(|value| f64::from(one(value))).collect()
                };
                let (left, right) = (rounded(&x), rounded(&wide));
                let mut want = Vec::new();
                for x in left.chunks_exact(k) {
                    for (w, bias) in right.chunks_exact(k).zip(&bias) {
                        let sum: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                        want.push((sum + f64::from(*bias)) as f32);
                    }
                }
                for level in levels() {
                    let got = product_at(level, precision, &x, &packed, Some(&bias));
                    let what = format!("{name} {precision:?} {level:?} {m} x {k} x {n}");
                    assert_close(&what, &got, &want, 5e-6);
                }
            }
        }
    }
}

#[test]
fn blocks_of_outputs_are_put_together() {
    let scheme = Scheme {
        bits: Bits::Eight,
        group: 0,
        zeros: false,
    };
    // More than a block of weights is.
    let [m, k, n] = [FEW + 1, 8192, 530];
    let quants = nearest(scheme, [n, k], &rand_vec(1, n * k)).expect("fits");
    let packed = Packed::new(&quants).expect("fits");
    let (x, bias) = (rand_vec(2, m * k), rand_vec(3, n));
    let want = naive(&x, &quants, Some(&bias));
    for level in levels() {
        let got = product_at(level, Precision::F32, &x, &packed, Some(&bias));
        assert_close(&format!("{level:?}"), &got, &want, 1e-5);
    }
}

#[test]
fn products_of_bytes_are_exact_sums_of_the_rounded_rows() {
    let scheme = |group| Scheme {
        bits: Bits::Eight,
        group,
        zeros: false,
    };
    for group in [0, 32] {
        for [m, k, n] in SIZES {
            let mut quants = nearest(scheme(group), [n, k], &rand_vec(1, n * k)).expect("fits");
            quants.brief_inputs = true;
            let x = rand_vec(2, m * k);
            let rounded: Vec<f32> = x
                .chunks_exact(k)
                .flat_map(|row| {
                    let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                    row.iter()
                        .map(move |x| (x * (127.0 / most)).round_ties_even() * (most / 127.0))
                })
                .collect();
            let packed = Packed::new(&quants).expect("fits");
            let want = naive(&rounded, &quants, None);
            let mut seen = Vec::new();
            for level in levels() {
                let got = product_at(level, Precision::F32, &x, &packed, None);
                assert_close(&format!("{level:?} {m} x {k} x {n}"), &got, &want, 2e-6);
                seen.push(got);
            }
            assert!(
                seen.iter().all(|got| *got == seen[0]),
                "levels agree to the bit"
            );
        }
    }
    // Nothing at all, and numbers that are not.
    let mut quants = nearest(scheme(0), [3, 4], &rand_vec(1, 12)).expect("fits");
    quants.brief_inputs = true;
    let packed = Packed::new(&quants).expect("fits");
    assert_eq!(product(Precision::F32, &[0.0; 4], &packed, None), [0.0; 3]);
    product(
        Precision::F32,
        &[f32::NAN, f32::INFINITY, 1.0, -1.0],
        &packed,
        None,
    );
}

#[test]
fn rounding_is_within_half_a_step() {
    for scheme in schemes() {
        let weights = rand_vec(7, 11 * 70);
        let quants = nearest(scheme, [11, 70], &weights).expect("fits");
        for (at, (value, weight)) in values(&quants).iter().zip(&weights).enumerate() {
            let group = at / 70 * quants.groups() + at % 70 / quants.group;
            let step = quants.scales[group].to_f64();
            // Scales and zeros are rounded to f16, which moves the ends of the range.
            let allowed = 0.5 * step + 0.02 * step;
            assert!(
                (value - f64::from(*weight)).abs() <= allowed,
                "{scheme:?} at {at}"
            );
        }
    }
    let scheme = Scheme {
        bits: Bits::Four,
        group: 32,
        zeros: false,
    };
    assert!(nearest(scheme, [1, 2], &[f32::NAN, f32::INFINITY]).is_err());
    let zeros = nearest(scheme, [1, 2], &[0.0; 2]).expect("fits");
    assert_eq!(values(&zeros), [0.0; 2]);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let scheme = Scheme {
        bits: Bits::Four,
        group: 8,
        zeros: false,
    };
    let quants = nearest(scheme, [3, 16], &rand_vec(1, 48)).expect("fits");
    let refused = |change: &dyn Fn(&mut Quants)| {
        let mut quants = quants.clone();
        change(&mut quants);
        Packed::new(&quants).expect_err("refused").to_string()
    };
    assert!(refused(&|q| q.group = 12).contains("multiple of 8"));
    assert!(refused(&|q| q.group = 0).contains("multiple of 8"));
    assert!(refused(&|q| q.values[3] = 8).contains("8 is outside"));
    assert!(refused(&|q| q.scales.truncate(1)).contains("6 scales, got 1"));
    assert!(refused(&|q| q.scales[0] = f16::NAN).contains("finite"));
    assert!(refused(&|q| q.zeros = Some(vec![])).contains("zeros, got 0"));
    assert!(refused(&|q| q.inputs = Some(vec![])).contains("16 factors"));
    assert!(refused(&|q| q.brief_inputs = true).contains("8 bits"));
}

/// Each group of the inputs as the nearest of 255 steps, by the documentation.
fn rounded_groups(x: &[f32], columns: usize, group: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for row in x.chunks_exact(columns) {
        for part in row.chunks(group) {
            let most = part.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let step = f64::from(most / 127.0);
            let near = |x: &f32| (step * (f64::from(*x) * 127.0 / f64::from(most)).round()) as f32;
            all.extend(part.iter().map(|x| if most > 0.0 { near(x) } else { 0.0 }));
        }
    }
    all
}

#[test]
fn rounded_inputs_give_the_sum_of_the_rounded_numbers() {
    for scheme in schemes() {
        for [m, k, n] in SIZES {
            let quants = nearest(scheme, [n, k], &rand_vec(1, n * k)).expect("fits");
            let (x, bias) = (rand_vec(2, m * k), rand_vec(3, n));
            let packed = Packed::new(&quants).expect("fits");
            // A number in the middle of two steps may go either way.
            let want = naive(&rounded_groups(&x, k, quants.group), &quants, Some(&bias));
            let precision = Precision::F32;
            for level in levels() {
                let got = multiply_at(level, true, precision, &x, &packed, Some(&bias));
                let name = format!("{scheme:?} {level:?} {m} x {k} x {n}");
                assert_close(&name, &got, &want, 1e-3);
            }
            let exact = product(precision, &x, &packed, Some(&bias));
            let got = rounded_product(precision, &x, &packed, Some(&bias));
            assert_close("near", &got, &exact, 0.02);
        }
    }
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        every_scheme_level_and_number_of_rows_matches_the_sum,
        weights_of_16_bits_are_what_they_are,
        products_of_bytes_are_exact_sums_of_the_rounded_rows,
        rounded_inputs_give_the_sum_of_the_rounded_numbers,
    ]);
}

/// A weight and rows from bytes, against the sum, and back from the packed form.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let [m, k, n] = [bytes.length(70), bytes.number(1, 300), bytes.number(1, 70)];
    let scheme = bytes.one_of(&schemes());
    let weights = bytes.values(n * k, 100.0);
    let mut quants = nearest(scheme, [n, k], &weights).expect("fits");
    if bytes.flag() {
        quants.inputs = Some(bytes.values(k, 10.0));
    }
    let packed = Packed::new(&quants).expect("fits");
    assert_eq!(packed.quants(), Some(quants.clone()));
    let x = bytes.values(m * k, 100.0);
    let bias = bytes.values(n, 10.0);
    let bias = bytes.flag().then_some(&bias[..]);
    let want = naive(&x, &quants, bias);
    // Sums that cancel are not held to more than the rounding of their summands, stored numbers and zeros apart.
    let mut apart = quants.clone();
    for value in &mut apart.values {
        *value = value.saturating_abs();
    }
    for zero in apart.zeros.iter_mut().flatten() {
        *zero = half::f16::from_f64(zero.to_f64().abs());
    }
    for factor in apart.inputs.iter_mut().flatten() {
        *factor = factor.abs();
    }
    let sizes: Vec<f32> = x.iter().map(|x| x.abs()).collect();
    let most: Option<Vec<f32>> = bias.map(|bias| bias.iter().map(|b| b.abs()).collect());
    let summands = naive(&sizes, &apart, most.as_deref());
    let precisions = [(Precision::F32, 1e-5), (Precision::Bf16, 1e-2)];
    for (level, (precision, share)) in levels()
        .into_iter()
        .flat_map(|level| precisions.map(|with| (level, with)))
    {
        let got = product_at(level, precision, &x, &packed, bias);
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            let most = share * f64::from(summands[at]) + 1e-30;
            let error = f64::from((got - want).abs());
            assert!(
                error <= most,
                "{scheme:?} {level:?} {precision:?} {m} x {k} x {n} [{at}]: {got} and {want}"
            );
        }
    }
}
