use super::*;
use crate::instructions::Instructions;
use crate::testing::{assert_close, rand_vec};

/// The sums in f64, of operands rounded as the precision says.
fn naive(
    precision: Precision,
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    before: &[f32],
    finish: Finish,
) -> Vec<f32> {
    let value = |matrix: Matrix, i: usize, j: usize| {
        let value = matrix.data[i * matrix.strides.0 + j * matrix.strides.1];
        match precision {
            Precision::F32 => value as f64,
            Precision::Bf16 => bf16::to_f32(bf16::round(value)) as f64,
        }
    };
    let mut out = Vec::new();
    for i in 0..m {
        for j in 0..n {
            let sum: f64 = (0..k).map(|c| value(a, i, c) * value(b, c, j)).sum();
            let held = if finish.add { before[i * n + j] } else { 0.0 };
            let bias = finish.bias.map_or(0.0, |bias| bias[j]);
            out.push((sum + held as f64 + bias as f64) as f32);
        }
    }
    out
}

fn levels(precision: Precision) -> Vec<Level> {
    let mut levels = vec![Level::Portable];
    if Level::best(precision) != Level::Portable {
        levels.push(Level::best(precision));
    }
    levels
}

const SIZES: [[usize; 3]; 14] = [
    [1, 1, 1],
    [2, 3, 1],
    [1, 40, 33],
    [12, 16, 32],
    [13, 17, 31],
    [11, 31, 65],
    [25, 513, 16],
    [70, 2, 300],
    [3, 1030, 17],
    [200, 64, 64],
    [35, 600, 40],
    [140, 520, 120],
    [37, 0, 5],
    [0, 4, 5],
];

#[test]
fn every_layout_level_and_finish_matches_the_sum() {
    for precision in [Precision::F32, Precision::Bf16] {
        for level in levels(precision) {
            for [m, k, n] in SIZES {
                // Rows, columns, and neither.
                let a = rand_vec(1, 2 * m * k.max(1));
                let b = rand_vec(2, 2 * k.max(1) * n);
                let bias = rand_vec(3, n);
                for (left, right) in [
                    (Matrix::rows(&a, k), Matrix::rows(&b, n)),
                    (Matrix::rows(&a, m).transposed(), Matrix::rows(&b, n)),
                    (Matrix::rows(&a, k), Matrix::rows(&b, k).transposed()),
                    (
                        Matrix {
                            data: &a,
                            strides: (2 * k, 2),
                        },
                        Matrix {
                            data: &b,
                            strides: (2, 2 * k),
                        },
                    ),
                ] {
                    for (add, bias) in [
                        (false, None),
                        (true, None),
                        (false, Some(&bias[..])),
                        (true, Some(&bias[..])),
                    ] {
                        let finish = Finish { add, bias };
                        let before = rand_vec(4, m * n);
                        let want = naive(precision, [m, k, n], left, right, &before, finish);
                        let mut got = before;
                        matmul_at(level, precision, [m, k, n], left, right, &mut got, finish);
                        let name = format!("{precision:?} {level:?} {m} x {k} x {n}");
                        assert_close(&name, &got, &want, 2e-5);
                        let mut chosen = rand_vec(4, m * n);
                        matmul(precision, [m, k, n], left, right, &mut chosen, finish);
                        assert_close(&format!("{name}, chosen"), &chosen, &want, 2e-5);
                        if !add {
                            let new = product(precision, [m, k, n], left, right, bias);
                            assert!(new == chosen, "{name}, new");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn many_tasks_and_stretches_match_and_threads_do_not_show() {
    for size in [[500, 700, 600], [300, 1100, 90], [64, 3000, 64]] {
        let [m, k, n] = size;
        let (a, b) = (rand_vec(1, m * k), rand_vec(2, k * n));
        let right = Matrix::rows(&b, n);
        for left in [Matrix::rows(&a, k), Matrix::rows(&a, m).transposed()] {
            for precision in [Precision::F32, Precision::Bf16] {
                let finish = Finish::default();
                let want = naive(precision, size, left, right, &[], finish);
                let run = |threads: usize| {
                    let mut got = vec![0.0; m * n];
                    Instructions::best().run(threads, || {
                        matmul(precision, size, left, right, &mut got, finish);
                    });
                    got
                };
                let one = run(1);
                assert_close("product", &one, &want, 1e-4);
                for threads in [2, 3, 5] {
                    assert!(run(threads) == one, "{precision:?} on {threads} threads");
                }
            }
        }
    }
}

#[test]
fn what_is_not_a_number_stays_where_it_belongs() {
    let [m, k, n] = [14, 5, 40];
    let (mut a, mut b) = (rand_vec(1, m * k), rand_vec(2, k * n));
    (a[3 * k + 2], b[k * n - 1]) = (f32::NAN, f32::INFINITY);
    for precision in [Precision::F32, Precision::Bf16] {
        let mut got = vec![0.0; m * n];
        let (a, b) = (Matrix::rows(&a, k), Matrix::rows(&b, n));
        matmul(precision, [m, k, n], a, b, &mut got, Finish::default());
        for (at, value) in got.iter().enumerate() {
            let touched = at / n == 3 || at % n == n - 1;
            assert_eq!(
                value.is_finite(),
                !touched,
                "{precision:?} at {at}: {value}"
            );
        }
    }
}

#[test]
#[should_panic(expected = "reaches past")]
fn short_operands_are_refused() {
    let row = Matrix::rows(&[1.0, 2.0, 3.0], 2);
    let size = [2, 2, 1];
    matmul(
        Precision::F32,
        size,
        row,
        row,
        &mut [0.0; 2],
        Finish::default(),
    );
}

#[test]
fn columns_are_summed() {
    for (rows, width) in [(0, 3), (1, 1), (7, 5), (3000, 40)] {
        let x = rand_vec(1, rows * width);
        let sum = |j: usize| (0..rows).map(|i| x[i * width + j] as f64).sum::<f64>() as f32;
        let want: Vec<f32> = (0..width).map(sum).collect();
        assert_close("sums", &column_sums(&x, width), &want, 1e-5);
    }
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        every_layout_level_and_finish_matches_the_sum,
        what_is_not_a_number_stays_where_it_belongs,
        columns_are_summed,
    ]);
}

/// A problem from bytes, against the sum.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let size = [bytes.length(90), bytes.length(200), bytes.length(90)];
    let [m, k, n] = size;
    let matrix = |bytes: &mut crate::fuzzing::Bytes, rows: usize, columns: usize| {
        let gap = bytes.number(1, 3);
        let strides = match bytes.flag() {
            true => (columns * gap, bytes.one_of(&[1, gap])),
            false => (bytes.one_of(&[1, gap]), rows * gap),
        };
        (bytes.values(span(rows, columns, strides), 1e4), strides)
    };
    let ((a, a_strides), (b, b_strides)) = (matrix(bytes, m, k), matrix(bytes, k, n));
    let [left, right] =
        [(&a, a_strides), (&b, b_strides)].map(|(data, strides)| Matrix { data, strides });
    let bias = bytes.values(n, 10.0);
    let before = bytes.values(m * n, 10.0);
    let finish = Finish {
        add: bytes.flag(),
        bias: bytes.flag().then_some(&bias[..]),
    };
    let precision = bytes.one_of(&[Precision::F32, Precision::Bf16]);
    let want = naive(precision, size, left, right, &before, finish);
    // Sums that cancel are not held to more than the rounding of their summands.
    let sizes = |values: &[f32]| values.iter().map(|value| value.abs()).collect::<Vec<f32>>();
    let (a, b, all_bias, all_before) = (sizes(&a), sizes(&b), sizes(&bias), sizes(&before));
    let [left_sizes, right_sizes] =
        [(&a, a_strides), (&b, b_strides)].map(|(data, strides)| Matrix { data, strides });
    let finish_sizes = Finish {
        add: finish.add,
        bias: finish.bias.map(|_| &all_bias[..]),
    };
    let rounding = naive(
        precision,
        size,
        left_sizes,
        right_sizes,
        &all_before,
        finish_sizes,
    );
    let near = |name: &str, got: &[f32]| {
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            let most = 1e-5 * rounding[at] + 1e-30;
            assert!(
                (got - want).abs() <= most,
                "{name} {size:?} [{at}]: {got} and {want}"
            );
        }
    };
    for level in levels(precision) {
        let mut got = before.clone();
        matmul_at(level, precision, size, left, right, &mut got, finish);
        near(&format!("{level:?}"), &got);
    }
    let mut got = before.clone();
    matmul(precision, size, left, right, &mut got, finish);
    near("chosen", &got);
}
