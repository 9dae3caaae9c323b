use super::*;
use crate::testing::{assert_close, rand_vec};

#[test]
fn strided_products_match_the_sum() {
    for [m, k, n] in [
        [1, 1, 1],
        [3, 5, 2],
        [16, 33, 17],
        [4, 0, 3],
        [70, 20, 9],
        [11, 64, 130],
    ] {
        let (a, b) = (rand_vec(1, m * (k + 2)), rand_vec(2, n * (k + 1)));
        for (alpha, add) in [(1.0, false), (-0.5, true)] {
            let before = rand_vec(3, m * (n + 3));
            let (mut got, mut want) = (before.clone(), before);
            let left = Matrix::rows(&a, k + 2);
            let right = Matrix::rows(&b, k + 1).transposed();
            product([m, k, n], alpha, left, right, &mut got, (n + 3, 1), add);
            for i in 0..m {
                for j in 0..n {
                    let at = i * (n + 3) + j;
                    let sum: f32 = (0..k)
                        .map(|c| a[i * (k + 2) + c] * b[j * (k + 1) + c])
                        .sum();
                    want[at] = alpha * sum + if add { want[at] } else { 0.0 };
                }
            }
            assert_close("product", &got, &want, 1e-5);
        }
    }
}

#[test]
fn dot_products_match_the_sum() {
    for [rows, dim, count] in [
        [1, 64, 64],
        [2, 20, 9],
        [3, 33, 17],
        [4, 128, 5],
        [4, 1, 1],
        [1, 16, 40],
    ] {
        let (stride, out_stride) = (dim + 3, count + 2);
        let (q, k) = (rand_vec(1, rows * dim), rand_vec(2, count * stride));
        let held: Vec<&[f32]> = q.chunks(dim).collect();
        let mut got = vec![5.0; rows * out_stride];
        dots(
            &held,
            Held::F32(&k),
            stride,
            count,
            &mut got,
            out_stride,
            None,
        );
        let mut twin = vec![5.0; rows * out_stride];
        few_dots(&held, &k, stride, count, &mut twin, out_stride);
        let mut want = vec![5.0; rows * out_stride];
        for r in 0..rows {
            for j in 0..count {
                want[r * out_stride + j] =
                    (0..dim).map(|c| q[r * dim + c] * k[j * stride + c]).sum();
            }
        }
        assert_close("dots", &got, &want, 1e-5);
        assert_close("portable dots", &twin, &want, 1e-5);
        let brief: Vec<u16> = k.iter().map(|value| bf16::round(*value)).collect();
        let wide: Vec<f32> = brief.iter().map(|value| bf16::to_f32(*value)).collect();
        let mut got = vec![5.0; rows * out_stride];
        let mut twin = got.clone();
        let next = Next::new((Held::Bf16(&brief), stride), dim);
        let keys = Held::Bf16(&brief);
        dots(&held, keys, stride, count, &mut got, out_stride, Some(next));
        few_dots(&held, &wide, stride, count, &mut twin, out_stride);
        assert_close("dots in bf16", &got, &twin, 1e-5);
        let (mut got, mut twin) = (rand_vec(3, rows * stride), rand_vec(3, rows * stride));
        let weights = Matrix::rows(&want, out_stride);
        weigh(
            [rows, count, dim],
            weights,
            keys,
            stride,
            &mut got,
            stride,
            Some(next),
        );
        let values = Matrix::rows(&wide, stride);
        product(
            [rows, count, dim],
            1.0,
            weights,
            values,
            &mut twin,
            (stride, 1),
            true,
        );
        assert_close("weighted sums in bf16", &got, &twin, 1e-5);
    }
}

#[test]
fn dot_products_of_rows_match_the_sum() {
    for [count, dim] in [[1, 1], [16, 16], [33, 5], [20, 70]] {
        let (a, b) = (
            rand_vec(1, count * (dim + 2)),
            rand_vec(2, count * (dim + 1)),
        );
        for stride in [0, dim + 1] {
            let mut got = vec![7.0; 3 * count - 2];
            row_dots(dim, Rows(&a, dim + 2), Rows(&b, stride), &mut got, 3);
            for (at, got) in got.iter().enumerate() {
                let i = at / 3;
                let terms = (0..dim).map(|c| a[i * (dim + 2) + c] * b[i * stride + c]);
                let want = if at % 3 == 0 { terms.sum::<f32>() } else { 7.0 };
                assert!(
                    (got - want).abs() < 1e-5,
                    "{count} x {dim} at {at}: {got}, {want}"
                );
            }
        }
    }
}

#[test]
fn every_order_of_strides_matches_the_sum() {
    let [m, k, n] = [23, 37, 71];
    let (a, b) = (rand_vec(1, m * k), rand_vec(2, k * n));
    let layouts = |data, rows, columns| {
        let turned = Matrix::rows(data, rows).transposed();
        [Matrix::rows(data, columns), turned]
    };
    for left in layouts(&a, m, k) {
        for right in layouts(&b, k, n) {
            for (strides, size) in [((n, 1), m * n), ((1, m), m * n), ((2 * n, 2), 2 * m * n)] {
                let (mut got, mut want) = (vec![0.5; size], vec![0.5; size]);
                product([m, k, n], 2.0, left, right, &mut got, strides, true);
                for i in 0..m {
                    for j in 0..n {
                        let at = |x: Matrix, i: usize, j: usize| {
                            x.data[i * x.strides.0 + j * x.strides.1]
                        };
                        let sum: f32 = (0..k).map(|c| at(left, i, c) * at(right, c, j)).sum();
                        want[i * strides.0 + j * strides.1] += 2.0 * sum;
                    }
                }
                assert_close("product", &got, &want, 1e-5);
            }
        }
    }
}

#[test]
#[should_panic(expected = "reaches past")]
fn short_operands_are_refused() {
    let row = Matrix::rows(&[1.0, 2.0, 3.0], 2);
    product([2, 2, 1], 1.0, row, row, &mut [0.0; 2], (1, 1), false);
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        strided_products_match_the_sum,
        dot_products_match_the_sum,
        dot_products_of_rows_match_the_sum,
        every_order_of_strides_matches_the_sum,
    ]);
}
