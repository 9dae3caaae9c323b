//! Transposition of strided matrices, 16 x 16 at a time where AVX-512 is there.
#![allow(unsafe_code)]

use crate::gemm::span;
#[cfg(target_arch = "x86_64")]
use crate::instructions::Instructions;

/// `to[j][i] = factor from[i][j]` for `from [rows, columns]` and `to [columns, rows]`, both contiguous along their second
/// dimension with these strides from row to row.
///
/// Panics when either reaches past its slice.
pub(crate) fn transpose(
    [rows, columns]: [usize; 2],
    factor: f32,
    from: &[f32],
    from_stride: usize,
    to: &mut [f32],
    to_stride: usize,
) {
    assert!(
        span(rows, columns, (from_stride, 1)) <= from.len()
            && span(columns, rows, (to_stride, 1)) <= to.len(),
        "a transposition reaches past its operands"
    );
    #[cfg(target_arch = "x86_64")]
    if Instructions::Avx512.usable() {
        // SAFETY: every element lies within its slice, as just checked; AVX-512 was detected.
        unsafe { wide::blocks([rows, columns], factor, from, from_stride, to, to_stride) };
        return;
    }
    for i in 0..rows {
        for j in 0..columns {
            to[j * to_stride + i] = factor * from[i * from_stride + j];
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod wide {
    use std::arch::x86_64::*;

    /// The lowest `count` lanes, all of them from 16.
    pub(crate) fn lanes(count: usize) -> __mmask16 {
        if count >= 16 { !0 } else { (1 << count) - 1 }
    }

    /// Block after block.
    ///
    /// # Safety
    /// The elements named by sizes and strides lie within the slices; AVX-512 is there.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn blocks(
        [rows, columns]: [usize; 2],
        factor: f32,
        from: &[f32],
        from_stride: usize,
        to: &mut [f32],
        to_stride: usize,
    ) {
        let factor = _mm512_set1_ps(factor);
        for row in (0..rows).step_by(16) {
            let high = (rows - row).min(16);
            for column in (0..columns).step_by(16) {
                let wide = (columns - column).min(16);
                let mut block = [_mm512_setzero_si512(); 16];
                for (i, line) in block.iter_mut().enumerate().take(high) {
                    // SAFETY: lanes past the columns are masked out.
                    unsafe {
                        let at = from.as_ptr().add((row + i) * from_stride + column);
                        let values = _mm512_maskz_loadu_ps(lanes(wide), at);
                        *line = _mm512_castps_si512(_mm512_mul_ps(values, factor));
                    }
                }
                let block = transposed(block);
                for (j, line) in block.iter().enumerate().take(wide) {
                    // SAFETY: lanes past the rows are masked out.
                    unsafe {
                        let at = to.as_mut_ptr().add((column + j) * to_stride + row);
                        _mm512_mask_storeu_ps(at, lanes(high), _mm512_castsi512_ps(*line));
                    }
                }
            }
        }
    }

    /// Lane `j` of vector `i` to lane `i` of vector `j`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(crate) fn transposed(r: [__m512i; 16]) -> [__m512i; 16] {
        let mut t = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        // u[4 g + c]: within each quarter, column c of rows 4 g to 4 g + 3.
        let mut u = [_mm512_setzero_si512(); 16];
        for g in 0..4 {
            u[4 * g] = _mm512_unpacklo_epi64(t[4 * g], t[4 * g + 2]);
            u[4 * g + 1] = _mm512_unpackhi_epi64(t[4 * g], t[4 * g + 2]);
            u[4 * g + 2] = _mm512_unpacklo_epi64(t[4 * g + 1], t[4 * g + 3]);
            u[4 * g + 3] = _mm512_unpackhi_epi64(t[4 * g + 1], t[4 * g + 3]);
        }
        let mut out = [_mm512_setzero_si512(); 16];
        for c in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]);
            let high = _mm512_shuffle_i32x4::<0xdd>(u[c], u[4 + c]);
            let low2 = _mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]);
            let high2 = _mm512_shuffle_i32x4::<0xdd>(u[8 + c], u[12 + c]);
            out[c] = _mm512_shuffle_i32x4::<0x88>(low, low2);
            out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
            out[4 + c] = _mm512_shuffle_i32x4::<0x88>(high, high2);
            out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::rand_vec;

    #[test]
    fn every_size_is_transposed_and_nothing_else_written() {
        for [rows, columns] in [[1, 1], [3, 20], [16, 16], [17, 33], [64, 5], [0, 4]] {
            let (from_stride, to_stride) = (columns + 3, rows + 2);
            let from = rand_vec(1, rows * from_stride + 1);
            let mut to = vec![7.0; columns * to_stride + 1];
            transpose([rows, columns], 2.0, &from, from_stride, &mut to, to_stride);
            for (at, value) in to.iter().enumerate() {
                let (j, i) = (at / to_stride, at % to_stride);
                let want = match i < rows && j < columns {
                    true => 2.0 * from[i * from_stride + j],
                    false => 7.0,
                };
                assert_eq!(*value, want, "{rows} x {columns} at {at}");
            }
        }
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[
            every_size_is_transposed_and_nothing_else_written,
        ]);
    }
}
