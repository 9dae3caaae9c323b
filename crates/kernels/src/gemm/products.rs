//! Block products in the precision that their caller chose: as they are, or of operands rounded to bf16.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Matrix, product, span};
#[cfg(target_arch = "x86_64")]
use super::{strip::Strip, wide::Words};
use crate::bf16;
#[cfg(target_arch = "x86_64")]
use crate::matmul::pack;
use crate::matmul::{Level, Precision};

/// Multiplies blocks; of bf16 with room for packed operands.
#[derive(Clone, Debug)]
pub(crate) enum Products {
    /// As [`product`].
    F32,
    /// Operands are rounded to the nearest bf16, sums are f32.
    Bf16 {
        /// The left operand, as pairs of neighbours along the inner dimension.
        left: Vec<u32>,
        /// The right one.
        right: Vec<u32>,
        level: Level,
    },
}

impl Products {
    pub(crate) fn new(precision: Precision) -> Self {
        Self::at(Level::best(precision), precision)
    }

    /// By the code that `level` names, which must be there.
    pub(crate) fn at(level: Level, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Products::F32,
            Precision::Bf16 => Products::Bf16 {
                left: Vec::new(),
                right: Vec::new(),
                level,
            },
        }
    }

    /// `out = a b` or `out += a b`, arguments as of [`product`]; the output is contiguous along one dimension.
    ///
    /// Panics when an operand reaches past its slice.
    pub(crate) fn run(
        &mut self,
        [m, k, n]: [usize; 3],
        a: Matrix,
        b: Matrix,
        out: &mut [f32],
        strides: (usize, usize),
        add: bool,
    ) {
        let Products::Bf16 { left, right, level } = self else {
            product([m, k, n], 1.0, a, b, out, strides, add);
            return;
        };
        assert!(
            span(m, k, a.strides) <= a.data.len()
                && span(k, n, b.strides) <= b.data.len()
                && span(m, n, strides) <= out.len(),
            "a block product reaches past its operands"
        );
        if *level == Level::Portable {
            let [a, b] = [(m, k, a), (k, n, b)].map(|(rows, columns, x)| rounded(rows, columns, x));
            let (a, b) = (Matrix::rows(&a, k), Matrix::rows(&b, n));
            product([m, k, n], 1.0, a, b, out, strides, add);
            return;
        }
        #[cfg(target_arch = "x86_64")]
        {
            // The transposed product has the transposed operands in the other order.
            let (rows, columns, a, b, stride) = match strides.1 == 1 {
                true => (m, n, a, b, strides.0),
                false => (n, m, b.transposed(), a.transposed(), strides.1),
            };
            assert!(strides.0 == 1 || strides.1 == 1, "a block of a product");
            if rows * columns == 0 {
                return;
            }
            let units = k.div_ceil(2);
            // SAFETY: operands lie within their slices, as just checked, the output is borrowed mutably; this level was chosen
            // where AVX-512 and AVX512-BF16 were detected, or by a test that did.
            unsafe {
                let from = columns.next_multiple_of(16);
                down(columns, k, b.transposed(), right);
                let along = a.strides.1 == 1 && k > 1;
                let left_strides = match along {
                    true => {
                        pairs(rows, k, a, left);
                        (units, 1)
                    }
                    false => {
                        down(rows, k, a, left);
                        (1, rows.next_multiple_of(16))
                    }
                };
                let to = (out.as_mut_ptr(), stride);
                let words = Words(right.as_ptr());
                Strip::of_words((left.as_ptr(), left_strides), words, from, to, add)
                    .multiply_words(rows, units, columns);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("a level that is not there: {left:?}, {right:?}");
    }
}

/// A matrix as contiguous rows, rounded.
fn rounded(rows: usize, columns: usize, x: Matrix) -> Vec<f32> {
    let at = |i: usize, j: usize| x.data[i * x.strides.0 + j * x.strides.1];
    let all = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
    all.map(|(i, j)| bf16::to_f32(bf16::round(at(i, j))))
        .collect()
}

/// Makes room for words of which every one is written before it is read.
#[cfg(target_arch = "x86_64")]
fn room(words: &mut Vec<u32>, count: usize) {
    if words.len() < count {
        words.resize(count, 0);
    }
}

/// `x [outer, inner]` as `[inner / 2, outer]`, rows rounded up to whole vectors.
///
/// # Safety
/// Elements lie within the slice; AVX-512 and AVX512-BF16 are there.
#[cfg(target_arch = "x86_64")]
unsafe fn down(outer: usize, inner: usize, x: Matrix, words: &mut Vec<u32>) {
    let width = outer.next_multiple_of(16);
    let side = pack::Side::new(Precision::Bf16, outer, inner, x, width);
    room(words, width * side.units());
    // SAFETY: as promised by the caller, and there is room for the panel.
    unsafe { pack::panel(&side, 0..outer, 0..side.units(), words.as_mut_ptr()) };
}

/// Rows of `x [rows, inner]`, each contiguous, as `[rows, inner / 2]`.
///
/// # Safety
/// As of [`down`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs(rows: usize, inner: usize, x: Matrix, words: &mut Vec<u32>) {
    let units = inner.div_ceil(2);
    // Whole vectors are written; what is past a row is written over by the next one.
    room(words, rows * units + 16);
    for row in 0..rows {
        for at in (0..units).step_by(16) {
            // SAFETY: values past the row are masked out; there is room for a vector past the last row.
            unsafe {
                let from = x.data.as_ptr().add(row * x.strides.0 + 2 * at);
                let some = pack::load_pairs(from, inner - 2 * at);
                _mm512_storeu_si512(words.as_mut_ptr().add(row * units + at).cast(), some);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    #[test]
    fn blocks_of_rounded_operands_match_in_every_layout() {
        let best = Level::best(Precision::Bf16);
        for [m, k, n] in [
            [64, 64, 64],
            [64, 64, 17],
            [1, 1, 1],
            [5, 33, 70],
            [48, 7, 64],
            [16, 130, 3],
        ] {
            let (a, b) = (rand_vec(1, m * k), rand_vec(2, k * n));
            for (turned, out_turned, add) in [
                ([false, false], false, false),
                ([true, false], true, true),
                ([false, true], false, true),
                ([true, true], true, false),
            ] {
                let of = |data, rows, columns, turned| match turned {
                    false => Matrix::rows(data, columns),
                    true => Matrix {
                        data,
                        strides: (1, rows),
                    },
                };
                let (a, b) = (of(&a[..], m, k, turned[0]), of(&b[..], k, n, turned[1]));
                let strides = if out_turned { (1, m) } else { (n, 1) };
                let start = rand_vec(3, m * n);
                let (wide_a, wide_b) = (rounded(m, k, a), rounded(k, n, b));
                let mut want = start.clone();
                for i in 0..m {
                    for j in 0..n {
                        let sum: f64 = (0..k)
                            .map(|p| f64::from(wide_a[i * k + p]) * f64::from(wide_b[p * n + j]))
                            .sum();
                        let to = &mut want[i * strides.0 + j * strides.1];
                        *to = sum as f32 + if add { *to } else { 0.0 };
                    }
                }
                for level in [Level::Portable, best] {
                    let mut products = Products::at(level, Precision::Bf16);
                    let mut got = start.clone();
                    products.run([m, k, n], a, b, &mut got, strides, add);
                    assert_close(&format!("{level:?} {m} x {k} x {n}"), &got, &want, 1e-5);
                }
            }
        }
    }
}
