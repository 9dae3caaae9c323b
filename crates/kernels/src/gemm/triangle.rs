//! Products with a lower triangle, by groups of rows, without what is zero farther from the diagonal.

use std::ops::Range;

use super::{Matrix, product};

/// Rows of a triangle that are taken together: a multiple of the rows of a strip.
const TOGETHER: usize = 24;

/// The groups of rows of a triangle.
fn together(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(TOGETHER)
        .map(move |first| first..(first + TOGETHER).min(len))
}

/// `out = alpha a b` on and below the diagonal of `[len, len]`, for `a [len, k]` and `b [k, len]`; of what is above it some is
/// written as well.
pub(crate) fn product_below(
    [len, k]: [usize; 2],
    alpha: f32,
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    stride: usize,
) {
    for rows in together(len) {
        let (sizes, out) = ([rows.len(), k, rows.end], &mut out[rows.start * stride..]);
        product(
            sizes,
            alpha,
            a.from(rows.start, 0),
            b,
            out,
            (stride, 1),
            false,
        );
    }
}

/// `out (+)= lower x` for `lower [len, len]`, of which nothing counts above the diagonal but is zero near it, and contiguous rows
/// `x` and `out [len, n]`.
pub(crate) fn lower_product(
    [len, n]: [usize; 2],
    lower: Matrix,
    x: Matrix,
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    for rows in together(len) {
        let (sizes, out) = ([rows.len(), rows.end, n], &mut out[rows.start * stride..]);
        let lower = lower.from(rows.start, 0);
        product(sizes, 1.0, lower, x, out, (stride, 1), add);
    }
}

/// As [`lower_product`], by the transposed of `lower`.
pub(crate) fn lower_transposed_product(
    [len, n]: [usize; 2],
    lower: Matrix,
    x: Matrix,
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    for rows in together(len) {
        let sizes = [rows.len(), len - rows.start, n];
        let upper = lower.from(rows.start, rows.start).transposed();
        let out = &mut out[rows.start * stride..];
        product(
            sizes,
            1.0,
            upper,
            x.from(rows.start, 0),
            out,
            (stride, 1),
            add,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    #[test]
    fn triangles_match_the_whole() {
        for len in [1, 23, 24, 25, 64, 70] {
            let (k, n) = (9, 21);
            let (a, b) = (rand_vec(1, len * k), rand_vec(2, len * k));
            let mut triangle = vec![f32::NAN; len * len];
            let right = Matrix::rows(&b, k).transposed();
            product_below(
                [len, k],
                2.0,
                Matrix::rows(&a, k),
                right,
                &mut triangle,
                len,
            );
            for i in 0..len {
                for j in 0..=i {
                    let sum: f32 = (0..k).map(|c| a[i * k + c] * b[j * k + c]).sum();
                    let got = triangle[i * len + j];
                    assert!((got - 2.0 * sum).abs() < 1e-5, "{i}, {j} of {len}: {got}");
                }
                // Above the diagonal and near it.
                let end = (i / TOGETHER + 1) * TOGETHER;
                triangle[i * len + i + 1..i * len + end.min(len)].fill(0.0);
            }
            let whole: Vec<f32> = triangle
                .iter()
                .map(|x| if x.is_nan() { 0.0 } else { *x })
                .collect();
            let x = rand_vec(3, len * n);
            let rows = Matrix::rows(&x, n);
            for (add, turn) in [(false, false), (true, true), (true, false), (false, true)] {
                let (mut got, mut want) = (rand_vec(4, len * n), rand_vec(4, len * n));
                let lower = Matrix::rows(&triangle, len);
                let all = Matrix::rows(&whole, len);
                let all = match turn {
                    false => {
                        lower_product([len, n], lower, rows, &mut got, n, add);
                        all
                    }
                    true => {
                        lower_transposed_product([len, n], lower, rows, &mut got, n, add);
                        all.transposed()
                    }
                };
                product([len, len, n], 1.0, all, rows, &mut want, (n, 1), add);
                assert_close("triangle", &got, &want, 1e-5);
            }
        }
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[triangles_match_the_whole]);
    }
}
