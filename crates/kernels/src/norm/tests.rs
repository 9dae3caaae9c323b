use super::*;
use crate::testing::{assert_close, differences, rand_vec};

const EPS: f32 = 1e-5;

/// `(rows, dim, groups of the weight)`: odd extents, a single value, several blocks.
const SHAPES: [(usize, usize, usize); 6] = [
    (1, 1, 1),
    (3, 5, 1),
    (6, 33, 3),
    (4, 64, 2),
    (7, 130, 1),
    (2, 257, 2),
];

/// Applies `row(row index, weight group)` to all rows.
fn all_rows(
    rows: usize,
    dim: usize,
    groups: usize,
    row: impl Fn(usize, usize) -> Vec<f64>,
) -> Vec<f64> {
    (0..rows)
        .flat_map(|r| {
            let y = row(r * dim, r % groups * dim);
            assert_eq!(y.len(), dim);
            y
        })
        .collect()
}

#[test]
fn rms_forms_match_naive_with_every_gradient() {
    for (rows, dim, groups) in SHAPES {
        for gate in [None, Some(Gate::BeforeNorm), Some(Gate::AfterNorm)] {
            for shape in [Rows::mean(dim, EPS), Rows::length(dim, EPS)] {
                let n = rows * dim;
                let (x, z) = (rand_vec(1, n), rand_vec(2, n));
                let (w, dy) = (rand_vec(3, groups * dim), rand_vec(4, n));
                let naive = |v: &[&[f64]]| {
                    let (x, z, w) = (v[0], v[1], v[2]);
                    all_rows(rows, dim, groups, |at, group| {
                        let gate = gate.map(|kind| (kind, &z[at..at + dim]));
                        let w = &w[group..group + dim];
                        naive::rms(&x[at..at + dim], gate, w, EPS as f64, shape.divisor as f64)
                    })
                };
                let (want, grads) = differences(&[&x, &z, &w], &dy, naive);
                let mut y = vec![0.0; n];
                let (mut dx, mut dz, mut dw) =
                    (vec![0.0; n], vec![0.0; n], vec![9.0; groups * dim]);
                match gate {
                    None => {
                        rms_norm(shape, &x, Some(&w), &mut y);
                        rms_norm_backward(shape, &x, Some(&w), &dy, &mut dx, Some(&mut dw));
                    }
                    Some(kind) => {
                        gated_rms_norm(shape, kind, &x, &z, Some(&w), &mut y);
                        gated_rms_norm_backward(
                            shape,
                            kind,
                            &x,
                            &z,
                            Some(&w),
                            &dy,
                            &mut dx,
                            &mut dz,
                            Some(&mut dw),
                        );
                    }
                }
                let name = format!("{rows}x{dim} {gate:?}");
                assert_close(&format!("{name} y"), &y, &want, 2e-6);
                // One value in a row: the gradient is a difference of nearly equal numbers.
                let tol = if dim == 1 { 2e-3 } else { 2e-5 };
                assert_close(&format!("{name} dx"), &dx, &grads[0], tol);
                assert_close(&format!("{name} dw"), &dw, &grads[2], 1e-5);
                if gate.is_some() {
                    assert_close(&format!("{name} dz"), &dz, &grads[1], tol);
                }
            }
        }
    }
}

#[test]
fn layer_norm_matches_naive_with_every_gradient() {
    for (rows, dim, groups) in SHAPES {
        let n = rows * dim;
        let shape = Rows::mean(dim, EPS);
        // A mean far from zero, which a one-pass variance would not survive.
        let x: Vec<f32> = rand_vec(1, n).iter().map(|x| x + 8.0).collect();
        let (w, b) = (rand_vec(2, groups * dim), rand_vec(3, groups * dim));
        let dy = rand_vec(4, n);
        let (want, grads) = differences(&[&x, &w, &b], &dy, |v| {
            all_rows(rows, dim, groups, |at, group| {
                let part = group..group + dim;
                naive::layer(
                    &v[0][at..at + dim],
                    &v[1][part.clone()],
                    &v[2][part],
                    EPS as f64,
                )
            })
        });
        let mut y = vec![0.0; n];
        layer_norm(shape, &x, Some(&w), Some(&b), &mut y);
        let (mut dx, mut dw, mut db) = (
            vec![0.0; n],
            vec![9.0; groups * dim],
            vec![9.0; groups * dim],
        );
        layer_norm_backward(
            shape,
            &x,
            Some(&w),
            &dy,
            &mut dx,
            Some(&mut dw),
            Some(&mut db),
        );
        let name = format!("layer {rows}x{dim}");
        assert_close(&format!("{name} y"), &y, &want, 1e-5);
        if dim > 1 {
            assert_close(&format!("{name} dx"), &dx, &grads[0], 3e-5);
            assert_close(&format!("{name} dw"), &dw, &grads[1], 2e-5);
        } else {
            assert!(dx[0].abs() < 1e-6 && dw[0].abs() < 1e-6);
        }
        assert_close(&format!("{name} db"), &db, &grads[2], 1e-5);
    }
}

#[test]
fn absent_parameters_stand_for_ones_and_zeros() {
    let (rows, dim) = (5, 19);
    let shape = Rows::mean(dim, EPS);
    let (x, dy) = (rand_vec(1, rows * dim), rand_vec(2, rows * dim));
    let (ones, zeros) = (vec![1.0; dim], vec![0.0; dim]);
    let run = |w: Option<&[f32]>, b: Option<&[f32]>| {
        let mut all = vec![vec![0.0; rows * dim]; 4];
        rms_norm(shape, &x, w, &mut all[0]);
        rms_norm_backward(shape, &x, w, &dy, &mut all[1], None);
        layer_norm(shape, &x, w, b, &mut all[2]);
        layer_norm_backward(shape, &x, w, &dy, &mut all[3], None, None);
        all
    };
    assert_eq!(run(None, None), run(Some(&ones), Some(&zeros)));
    let mut dbias = vec![0.0; dim];
    layer_norm_backward(
        shape,
        &x,
        None,
        &dy,
        &mut vec![0.0; rows * dim],
        None,
        Some(&mut dbias),
    );
    for i in 0..dim {
        let want: f32 = (0..rows).map(|r| dy[r * dim + i]).sum();
        assert!((dbias[i] - want).abs() < 1e-5);
    }
}

#[test]
fn many_rows_give_the_same_as_one_at_a_time() {
    let (rows, dim) = (700, 96);
    let shape = Rows::mean(dim, EPS);
    let (x, z, dy) = (
        rand_vec(1, rows * dim),
        rand_vec(2, rows * dim),
        rand_vec(3, rows * dim),
    );
    let w = rand_vec(4, 3 * dim);
    let mut y = vec![0.0; x.len()];
    gated_rms_norm(shape, Gate::BeforeNorm, &x, &z, Some(&w), &mut y);
    let (mut dx, mut dz, mut dw) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; w.len()]);
    let mut backward = || {
        gated_rms_norm_backward(
            shape,
            Gate::BeforeNorm,
            &x,
            &z,
            Some(&w),
            &dy,
            &mut dx,
            &mut dz,
            Some(&mut dw),
        );
        dw.clone()
    };
    let first = backward();
    assert_eq!(first, backward(), "weight gradient is not deterministic");
    let mut sums = vec![0.0f64; w.len()];
    for row in 0..rows {
        let at = row * dim..(row + 1) * dim;
        let group = row % 3 * dim;
        let w = &w[group..group + dim];
        let (mut y1, mut dx1, mut dz1, mut dw1) = (
            vec![0.0; dim],
            vec![0.0; dim],
            vec![0.0; dim],
            vec![0.0; dim],
        );
        let (x, z, dy) = (&x[at.clone()], &z[at.clone()], &dy[at.clone()]);
        gated_rms_norm(shape, Gate::BeforeNorm, x, z, Some(w), &mut y1);
        gated_rms_norm_backward(
            shape,
            Gate::BeforeNorm,
            x,
            z,
            Some(w),
            dy,
            &mut dx1,
            &mut dz1,
            Some(&mut dw1),
        );
        assert_eq!(y[at.clone()], y1);
        assert_eq!(dx[at.clone()], dx1);
        assert_eq!(dz[at], dz1);
        for i in 0..dim {
            sums[group + i] += dw1[i] as f64;
        }
    }
    let sums: Vec<f32> = sums.iter().map(|v| *v as f32).collect();
    assert_close("dw over blocks", &dw, &sums, 1e-5);
}

#[test]
fn zero_and_large_rows_stay_finite() {
    let dim = 8;
    let shape = Rows::mean(dim, EPS);
    for value in [0.0, 1e-20, 1e15] {
        let x = vec![value; dim];
        let (mut y, mut dx) = (vec![0.0; dim], vec![0.0; dim]);
        rms_norm(shape, &x, None, &mut y);
        rms_norm_backward(shape, &x, None, &x, &mut dx, None);
        assert!(
            y.iter().chain(&dx).all(|v| v.is_finite()),
            "rms of {value}: {y:?} {dx:?}"
        );
        layer_norm(shape, &x, None, None, &mut y);
        layer_norm_backward(shape, &x, None, &y.clone(), &mut dx, None, None);
        assert!(
            y.iter().chain(&dx).all(|v| v.is_finite()),
            "layer norm of {value}"
        );
    }
}

/// The sum and the norm one after the other, each tested above.
#[test]
fn sum_and_norm_in_one_pass_have_the_bits_of_two() {
    for (rows, dim) in [(1, 1), (3, 5), (700, 130), (0, 4), (2000, 64)] {
        let n = rows * dim;
        let shape = Rows::mean(dim, EPS);
        let (x, r, w, b) = (
            rand_vec(1, n),
            rand_vec(2, n),
            rand_vec(3, dim),
            rand_vec(4, dim),
        );
        let (ds, dy) = (rand_vec(5, n), rand_vec(6, n));
        let sum: Vec<f32> = x.iter().zip(&r).map(|(x, r)| x + r).collect();
        for (bias, past) in [(false, true), (true, true), (false, false), (true, false)] {
            let after = After {
                rows: shape,
                weight: &w,
                bias: bias.then_some(&b[..]),
            };
            let (mut s, mut y) = (vec![f32::NAN; n], vec![f32::NAN; n]);
            add_norm(after, &x, &r, &mut s, &mut y);
            assert_eq!(s, sum);
            let (mut want_y, mut want_dx) = (vec![0.0; n], vec![0.0; n]);
            let (mut want_dw, mut want_db) = (vec![0.0; dim], vec![0.0; dim]);
            match bias {
                false => {
                    rms_norm(shape, &sum, Some(&w), &mut want_y);
                    let dw = Some(&mut want_dw[..]);
                    rms_norm_backward(shape, &sum, Some(&w), &dy, &mut want_dx, dw);
                }
                true => {
                    layer_norm(shape, &sum, Some(&w), Some(&b), &mut want_y);
                    let (dw, db) = (Some(&mut want_dw[..]), Some(&mut want_db[..]));
                    layer_norm_backward(shape, &sum, Some(&w), &dy, &mut want_dx, dw, db);
                }
            }
            assert_eq!(y, want_y);
            if past {
                want_dx.iter_mut().zip(&ds).for_each(|(dx, ds)| *dx += ds);
            }
            let (mut dx, mut dw, mut db) = (vec![f32::NAN; n], vec![9.0; dim], vec![9.0; dim]);
            let past = past.then_some(&ds[..]);
            let own = bias.then_some(&mut db[..]);
            add_norm_backward(after, &s, past, &dy, &mut dx, &mut dw, own);
            assert_eq!(dx, want_dx);
            assert_eq!(dw, want_dw);
            assert!(!bias || db == want_db);
        }
    }
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        rms_forms_match_naive_with_every_gradient,
        layer_norm_matches_naive_with_every_gradient,
        many_rows_give_the_same_as_one_at_a_time,
        zero_and_large_rows_stay_finite,
        sum_and_norm_in_one_pass_have_the_bits_of_two,
    ]);
}

/// Norms, softmax and cross entropy of values from bytes, against the equations.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let (rows, dim) = (bytes.length(70), bytes.number(1, 300));
    let n = rows * dim;
    let x = bytes.values(n, 1e6);
    let z = bytes.values(n, 50.0);
    let (w, b) = (bytes.values(dim, 10.0), bytes.values(dim, 10.0));
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let narrow = |x: Vec<f64>| x.iter().map(|x| *x as f32).collect::<Vec<f32>>();
    let (wide_x, wide_z) = (wide(&x), wide(&z));
    let (wide_w, wide_b) = (wide(&w), wide(&b));
    let mut y = vec![f32::NAN; n];
    let eps = bytes.one_of(&[1e-5f32, 1e-12, 0.1]);
    let shape = bytes.one_of(&[Rows::mean(dim, eps), Rows::length(dim, eps)]);
    let gate = bytes.one_of(&[None, Some(Gate::BeforeNorm), Some(Gate::AfterNorm)]);
    let want = all_rows(rows, dim, 1, |at, _| {
        let gate = gate.map(|kind| (kind, &wide_z[at..at + dim]));
        let (eps, divisor) = (f64::from(eps), f64::from(shape.divisor));
        naive::rms(&wide_x[at..at + dim], gate, &wide_w, eps, divisor)
    });
    match gate {
        None => rms_norm(shape, &x, Some(&w), &mut y),
        Some(kind) => gated_rms_norm(shape, kind, &x, &z, Some(&w), &mut y),
    }
    assert_close("rms", &y, &narrow(want), 1e-5);
    layer_norm(Rows::mean(dim, eps), &x, Some(&w), Some(&b), &mut y);
    for (at, (x, y)) in x.chunks(dim).zip(y.chunks(dim)).enumerate() {
        let own = &wide_x[at * dim..][..dim];
        let want = narrow(naive::layer(own, &wide_w, &wide_b, f64::from(eps)));
        // The mean of large values is off by their rounding, which is as large as a deviation near to it.
        let largest = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let mean = own.iter().sum::<f64>() / dim as f64;
        let spread = own.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
        let lost = f64::from(largest) * 1e-6 / (spread + f64::from(eps)).sqrt();
        assert_close("layer norm", y, &want, 2e-5 + 20.0 * lost as f32);
    }
    let mut dx = vec![f32::NAN; n];
    crate::softmax::softmax(dim, &x, &mut y);
    for (x, y) in wide_x.chunks(dim).zip(y.chunks(dim)) {
        let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = x.iter().map(|x| (x - largest).exp()).sum();
        let want = x.iter().map(|x| (x - largest).exp() / total).collect();
        assert_close("softmax", y, &narrow(want), 2e-6);
    }
    crate::softmax::softmax_backward(dim, &y, &z, &mut dx);
    // A difference that cancels is not held to more than the rounding of what it is taken of.
    for ((y, z), dx) in y.chunks(dim).zip(z.chunks(dim)).zip(dx.chunks(dim)) {
        let products = || {
            let pairs = y.iter().zip(z);
            pairs.map(|(y, z)| f64::from(*y) * f64::from(*z))
        };
        let along: f64 = products().sum();
        let size: f64 = products().map(f64::abs).sum();
        for ((y, z), got) in y.iter().zip(z).zip(dx) {
            let (y, z) = (f64::from(*y), f64::from(*z));
            let (want, most) = (y * (z - along), 1e-5 * y * (z.abs() + size) + 1e-37);
            assert!(
                (f64::from(*got) - want).abs() <= most,
                "softmax's gradient: {got} and {want}"
            );
        }
    }
    let one = |number: usize| {
        number
            .checked_sub(1)
            .map_or(crate::cross_entropy::IGNORE, |class| class as i64)
    };
    let target: Vec<i64> = (0..rows).map(|_| one(bytes.number(0, dim))).collect();
    let mut lse = vec![f32::NAN; rows];
    let got = crate::cross_entropy::cross_entropy(dim, &x, &target, &mut lse);
    let (mut total, mut counted) = (0.0, 0);
    for (row, target) in wide_x.chunks(dim).zip(&target) {
        if let Ok(target) = usize::try_from(*target) {
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
            total += largest + sum.ln() - row[target];
            counted += 1;
        }
    }
    assert_eq!(got.counted, counted);
    let want = total / f64::max(counted as f64, 1.0);
    let error = (f64::from(got.loss) - want).abs();
    // Of large logits the difference is taken after their rounding.
    let largest = x
        .iter()
        .fold(0.0f64, |most, x| most.max(f64::from(x.abs())));
    let most = 1e-5 * (1.0 + want.abs()) + 2e-7 * largest;
    assert!(error <= most, "loss {} and {want}", got.loss);
}
