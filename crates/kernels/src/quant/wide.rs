//! The loops with AVX-512: lanes are outputs, one instruction takes a column of 16 of them.

use std::arch::x86_64::*;

use half::f16;

use super::{Bits, LANES, Line, Panel, Rows};

/// Sums of one row that run side by side, as one alone waits for itself.
const CHAINS: usize = 4;

/// A way to hold weights in words.
pub(super) trait Code {
    /// Weights in a word.
    const PER: usize;
    /// What the scale is multiplied by to make up for what [`Code::at`] gives.
    const FACTOR: f32;
    /// Weight `at` of every word, as f32.
    ///
    /// # Safety
    /// AVX-512 (F and BW) is there.
    unsafe fn at(words: __m512i, at: usize, table: __m512) -> __m512;
}

pub(super) struct Eight;
impl Code for Eight {
    const PER: usize = 4;
    // The byte stands at the top of the word, which keeps its sign.
    const FACTOR: f32 = 1.0 / (1 << 24) as f32;
    #[inline(always)]
    unsafe fn at(words: __m512i, at: usize, _: __m512) -> __m512 {
        const NONE: i32 = 0x80;
        let byte = |lane: usize| ((4 * lane + at) as i32) << 24 | NONE << 16 | NONE << 8 | NONE;
        // SAFETY: as promised by the caller.
        unsafe {
            let (a, b, c, d) = (byte(0), byte(1), byte(2), byte(3));
            let order = _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
            _mm512_cvtepi32_ps(_mm512_shuffle_epi8(words, order))
        }
    }
}

pub(super) struct Four;
impl Code for Four {
    const PER: usize = 8;
    const FACTOR: f32 = 1.0;
    #[inline(always)]
    unsafe fn at(words: __m512i, at: usize, table: __m512) -> __m512 {
        // SAFETY: as promised by the caller.
        unsafe {
            let shift = _mm512_set1_epi32(4 * at as i32);
            // Of an index only the lower four bits count.
            _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shift), table)
        }
    }
}

pub(super) struct Half;
impl Code for Half {
    const PER: usize = 2;
    const FACTOR: f32 = 1.0;
    #[inline(always)]
    unsafe fn at(words: __m512i, at: usize, _: __m512) -> __m512 {
        // SAFETY: as promised by the caller.
        unsafe {
            let shift = _mm512_set1_epi32(16 * at as i32);
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srlv_epi32(words, shift)))
        }
    }
}

pub(super) struct Brain;
impl Code for Brain {
    const PER: usize = 2;
    const FACTOR: f32 = 1.0;
    #[inline(always)]
    unsafe fn at(words: __m512i, at: usize, _: __m512) -> __m512 {
        // SAFETY: as promised by the caller. A bfloat16 is the upper half of an f32.
        unsafe {
            let bits = match at {
                0 => _mm512_slli_epi32::<16>(words),
                _ => _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000u32 as i32)),
            };
            _mm512_castsi512_ps(bits)
        }
    }
}

/// What 4 bits stand for.
#[target_feature(enable = "avx512f")]
pub(super) fn table(panel: Panel) -> __m512 {
    let from = if panel.zeros.is_some() { 0.0 } else { -8.0 };
    let values: [f32; LANES] = std::array::from_fn(|at| at as f32 + from);
    // SAFETY: as many values are read as there are.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// 16 scales or zeros of a group.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn halves(values: &[f16], group: usize) -> __m512 {
    let values = &values[group * LANES..][..LANES];
    // SAFETY: 16 values of 16 bits were just taken.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())) }
}

/// The sums of a panel with 1 to 8 rows.
///
/// # Safety
/// AVX-512 (F and BW) is there.
pub(super) unsafe fn multiply(bits: Bits, panel: Panel, rows: Rows, sums: &mut [[f32; LANES]]) {
    macro_rules! by_rows {
        ($code:ty, $($count:literal)*) => {
            match sums.len() {
                // SAFETY: as promised by the caller.
                $($count => unsafe { block::<$code, $count>(panel, rows, sums) },)*
                count => panic!("{count} rows at once"),
            }
        };
    }
    match bits {
        Bits::Eight => by_rows!(Eight, 1 2 3 4 5 6 7 8),
        Bits::Four => by_rows!(Four, 1 2 3 4 5 6 7 8),
        Bits::Half => by_rows!(Half, 1 2 3 4 5 6 7 8),
        Bits::Brain => by_rows!(Brain, 1 2 3 4 5 6 7 8),
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn block<C: Code, const ROWS: usize>(panel: Panel, rows: Rows, sums: &mut [[f32; LANES]]) {
    assert!(sums.len() == ROWS && rows.values.len() == ROWS * rows.stride);
    assert!(panel.lines.len() * C::PER <= rows.stride);
    // No more than values of a line, so that each has a place that the compiler knows.
    let chains = (CHAINS / ROWS).clamp(1, C::PER);
    let groups = panel.lines.len().div_ceil(panel.per_group);
    let table = table(panel);
    let mut total = [_mm512_setzero_ps(); ROWS];
    let mut x: [*const f32; ROWS] =
        std::array::from_fn(|row| rows.values[row * rows.stride..].as_ptr());
    for (group, lines) in panel.lines.chunks(panel.per_group).enumerate() {
        let mut parts = [[_mm512_setzero_ps(); CHAINS]; ROWS];
        for Line(words) in lines {
            // SAFETY: a line is 64 bytes; `x` points at `PER` values for every line of the panel, as checked above; the
            // instructions are there as the caller promised.
            unsafe {
                let words = _mm512_load_si512(words.as_ptr().cast());
                for at in 0..C::PER {
                    let weights = C::at(words, at, table);
                    for row in 0..ROWS {
                        let part = &mut parts[row][at % chains];
                        *part = _mm512_fmadd_ps(weights, _mm512_set1_ps(*x[row].add(at)), *part);
                    }
                }
                for x in &mut x {
                    *x = x.add(C::PER);
                }
            }
        }
        let scale = _mm512_mul_ps(halves(panel.scales, group), _mm512_set1_ps(C::FACTOR));
        for row in 0..ROWS {
            let [a, b, c, d] = parts[row];
            let part = match chains {
                1 => a,
                2 => _mm512_add_ps(a, b),
                _ => _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)),
            };
            total[row] = _mm512_fmadd_ps(part, scale, total[row]);
            if let Some(zeros) = panel.zeros {
                let sum = _mm512_set1_ps(rows.sums[row * groups + group]);
                total[row] = _mm512_fmadd_ps(halves(zeros, group), sum, total[row]);
            }
        }
    }
    for (to, total) in sums.iter_mut().zip(total) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), total) };
    }
}
