//! Products of blocks that lie in the first cache levels, on AVX-512: no packing, a strip of the output in registers.
//!
//! `out[i][j] (+)= alpha sum_p left[i][p] right[p][j]`: the right operand is read as vectors along `j`, the left one is
//! broadcast value by value, so it may have any strides.

use std::arch::x86_64::*;

/// Rows held at a time; times [`VECTORS`] they fill 24 of the 32 registers.
const ROWS: usize = 6;
/// Vectors of 16 columns held at a time.
const VECTORS: usize = 4;

/// The operands; `right` and `out` are contiguous along their second dimension.
pub struct Strip {
    /// `[rows, inner]`.
    pub left: *const f32,
    /// Its strides.
    pub left_strides: (usize, usize),
    /// `[inner, columns]`.
    pub right: *const f32,
    /// From row to row of it.
    pub right_stride: usize,
    /// `[rows, columns]`.
    pub out: *mut f32,
    /// From row to row of it.
    pub out_stride: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Sums onto what `out` holds.
    pub add: bool,
}

impl Strip {
    /// The whole product.
    ///
    /// # Safety
    /// Every element named by the sizes and strides may be read (written, of `out`, which overlaps neither operand);
    /// AVX-512 is there.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn multiply(&self, rows: usize, inner: usize, columns: usize) {
        let mut column = 0;
        while column < columns {
            let wide = (columns - column).min(16 * VECTORS);
            // SAFETY: as promised by the caller.
            unsafe {
                match wide.div_ceil(16) {
                    4 => self.down::<4>(rows, inner, column, wide),
                    3 => self.down::<3>(rows, inner, column, wide),
                    2 => self.down::<2>(rows, inner, column, wide),
                    _ => self.down::<1>(rows, inner, column, wide),
                }
            }
            column += wide;
        }
    }

    /// All rows of `wide` columns.
    #[target_feature(enable = "avx512f")]
    unsafe fn down<const V: usize>(&self, rows: usize, inner: usize, column: usize, wide: usize) {
        let last = wide - 16 * (V - 1);
        let mask: __mmask16 = if last == 16 { !0 } else { (1 << last) - 1 };
        let mut row = 0;
        // SAFETY: as promised by the caller.
        unsafe {
            while row + ROWS <= rows {
                self.tile::<ROWS, V>(row, inner, column, mask);
                row += ROWS;
            }
            match rows - row {
                5 => self.tile::<5, V>(row, inner, column, mask),
                4 => self.tile::<4, V>(row, inner, column, mask),
                3 => self.tile::<3, V>(row, inner, column, mask),
                2 => self.tile::<2, V>(row, inner, column, mask),
                1 => self.tile::<1, V>(row, inner, column, mask),
                _ => {}
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn tile<const R: usize, const V: usize>(
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
            let mut right = self.right.add(column);
            let mut held = [_mm512_setzero_ps(); V];
            for _ in 0..inner {
                for v in 0..V - 1 {
                    held[v] = _mm512_loadu_ps(right.add(16 * v));
                }
                held[V - 1] = _mm512_maskz_loadu_ps(mask, right.add(16 * (V - 1)));
                for i in 0..R {
                    let value = _mm512_set1_ps(*left[i]);
                    for v in 0..V {
                        sums[i][v] = _mm512_fmadd_ps(value, held[v], sums[i][v]);
                    }
                    left[i] = left[i].wrapping_add(along);
                }
                right = right.wrapping_add(self.right_stride);
            }
            let alpha = _mm512_set1_ps(self.alpha);
            for i in 0..R {
                let out = self.out.add((row + i) * self.out_stride + column);
                for v in 0..V {
                    let mask = if v + 1 == V { mask } else { !0 };
                    let to = out.add(16 * v);
                    let sum = match self.add {
                        true => _mm512_fmadd_ps(alpha, sums[i][v], _mm512_maskz_loadu_ps(mask, to)),
                        false => _mm512_mul_ps(alpha, sums[i][v]),
                    };
                    _mm512_mask_storeu_ps(to, mask, sum);
                }
            }
        }
    }
}
