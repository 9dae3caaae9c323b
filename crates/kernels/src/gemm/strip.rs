//! Products of blocks that lie in the first cache levels, on AVX-512: no packing, a strip of the output in registers.
//!
//! `out[i][j] (+)= alpha sum_p left[i][p] right[p][j]`: the right operand is read as vectors along `j`, the left one is
//! broadcast value by value, so it may have any strides. A value is 32 bits, an f32 or a pair of bf16.

use std::arch::x86_64::*;

use super::Matrix;
use super::wide::{Ahead, Right};

/// Rows held at a time; times [`VECTORS`] they fill 24 of the 32 registers.
const ROWS: usize = 6;
/// Vectors of 16 columns held at a time.
const VECTORS: usize = 4;

/// The operands; `right` and `out` are contiguous along their second dimension.
pub struct Strip<B> {
    /// `[rows, inner]`.
    left: *const f32,
    /// Its strides.
    left_strides: (usize, usize),
    /// `[inner, columns]`.
    right: B,
    /// From row to row of it.
    right_stride: usize,
    /// `[rows, columns]`.
    out: *mut f32,
    /// From row to row of it.
    out_stride: usize,
    /// Factor of the product.
    alpha: f32,
    /// Sums onto what `out` holds.
    add: bool,
    /// Rows that are asked for, one with each row of `right`.
    ahead: Ahead,
}

impl<B: Right> Strip<B> {
    /// `left` with any strides, `right` and `out` with those from row to row.
    pub fn new(
        left: Matrix,
        right: B,
        right_stride: usize,
        (out, out_stride): (*mut f32, usize),
        alpha: f32,
        add: bool,
        ahead: Ahead,
    ) -> Self {
        Strip {
            left: left.data.as_ptr(),
            left_strides: left.strides,
            right,
            right_stride,
            out,
            out_stride,
            alpha,
            add,
            ahead,
        }
    }

    /// `left` as pairs of bf16 with any strides, and `right`.
    pub fn of_words(
        left: (*const u32, (usize, usize)),
        right: B,
        right_stride: usize,
        (out, out_stride): (*mut f32, usize),
        add: bool,
    ) -> Self {
        Strip {
            left: left.0.cast(),
            left_strides: left.1,
            right,
            right_stride,
            out,
            out_stride,
            alpha: 1.0,
            add,
            ahead: Ahead::NONE,
        }
    }
}

macro_rules! loops {
    ($multiply:ident, $down:ident, $tile:ident, $features:literal) => {
        impl<B: Right> Strip<B> {
            /// The whole product.
            ///
            /// # Safety
            /// Every element named by the sizes and strides may be read (written, of `out`, which overlaps neither operand);
            /// AVX-512 is there, for words AVX512-BF16.
            #[target_feature(enable = $features)]
            pub unsafe fn $multiply(&self, rows: usize, inner: usize, columns: usize) {
                let mut column = 0;
                while column < columns {
                    let wide = (columns - column).min(16 * VECTORS);
                    // SAFETY: as promised by the caller.
                    unsafe {
                        match wide.div_ceil(16) {
                            4 => self.$down::<4>(rows, inner, column, wide),
                            3 => self.$down::<3>(rows, inner, column, wide),
                            2 => self.$down::<2>(rows, inner, column, wide),
                            _ => self.$down::<1>(rows, inner, column, wide),
                        }
                    }
                    column += wide;
                }
            }

            /// All rows of `wide` columns.
            #[target_feature(enable = $features)]
            unsafe fn $down<const V: usize>(
                &self,
                rows: usize,
                inner: usize,
                column: usize,
                wide: usize,
            ) {
                let last = wide - 16 * (V - 1);
                let mask: __mmask16 = if last == 16 { !0 } else { (1 << last) - 1 };
                let mut row = 0;
                // SAFETY: as promised by the caller.
                unsafe {
                    while row + ROWS <= rows {
                        self.$tile::<ROWS, V>(row, inner, column, mask);
                        row += ROWS;
                    }
                    match rows - row {
                        5 => self.$tile::<5, V>(row, inner, column, mask),
                        4 => self.$tile::<4, V>(row, inner, column, mask),
                        3 => self.$tile::<3, V>(row, inner, column, mask),
                        2 => self.$tile::<2, V>(row, inner, column, mask),
                        1 => self.$tile::<1, V>(row, inner, column, mask),
                        _ => {}
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn $tile<const R: usize, const V: usize>(
                &self,
                row: usize,
                inner: usize,
                column: usize,
                mask: __mmask16,
            ) {
                let (down, along) = self.left_strides;
                let mut sums = [[_mm512_setzero_ps(); V]; R];
                // SAFETY: lanes past the columns are masked out; rows and inner elements exist.
                unsafe {
                    let mut left = [self.left; R];
                    for (i, left) in left.iter_mut().enumerate() {
                        *left = left.add((row + i) * down);
                    }
                    let ahead = match row + column {
                        0 => self.ahead,
                        _ => Ahead::NONE,
                    };
                    let mut right = column;
                    let mut held = [_mm512_setzero_ps(); V];
                    for p in 0..inner {
                        ahead.ask(p);
                        for v in 0..V - 1 {
                            held[v] = self.right.load(right + 16 * v, !0);
                        }
                        held[V - 1] = self.right.load(right + 16 * (V - 1), mask);
                        for i in 0..R {
                            let value = _mm512_set1_ps(*left[i]);
                            for v in 0..V {
                                sums[i][v] = B::multiply(sums[i][v], value, held[v]);
                            }
                            left[i] = left[i].wrapping_add(along);
                        }
                        right += self.right_stride;
                    }
                    let alpha = _mm512_set1_ps(self.alpha);
                    for i in 0..R {
                        let out = self.out.add((row + i) * self.out_stride + column);
                        for v in 0..V {
                            let mask = if v + 1 == V { mask } else { !0 };
                            let to = out.add(16 * v);
                            let sum = match self.add {
                                true => _mm512_fmadd_ps(
                                    alpha,
                                    sums[i][v],
                                    _mm512_maskz_loadu_ps(mask, to),
                                ),
                                false => _mm512_mul_ps(alpha, sums[i][v]),
                            };
                            _mm512_mask_storeu_ps(to, mask, sum);
                        }
                    }
                }
            }
        }
    };
}
loops!(multiply, down, tile, "avx512f,avx512bw,avx512vl");
loops!(
    multiply_words,
    down_words,
    tile_words,
    "avx512f,avx512bw,avx512vl,avx512bf16"
);
