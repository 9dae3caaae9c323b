//! What our loops read on their right side, and what they ask for ahead of time.

use crate::instructions::Instructions;
use std::arch::x86_64::*;

use crate::bf16::Held;

/// The right operand: a pointer to values that are read 16 at a time.
pub trait Right: Copy {
    /// The values from `at` on whose lanes are in the mask, others zero.
    ///
    /// # Safety
    /// Those values may be read, and [`there`] says yes.
    unsafe fn load(self, at: usize, mask: __mmask16) -> __m512;

    /// `sum + left right`, lane by lane.
    ///
    /// # Safety
    /// [`there`] says yes; for [`Words`] AVX512-BF16 is there, and the function that this one becomes a part of has it.
    #[inline(always)]
    unsafe fn multiply(sum: __m512, left: __m512, right: __m512) -> __m512 {
        // SAFETY: as promised by the caller.
        unsafe { _mm512_fmadd_ps(left, right, sum) }
    }
}

/// Values as they are.
#[derive(Clone, Copy)]
pub struct Plain(pub *const f32);

impl Right for Plain {
    #[inline(always)]
    unsafe fn load(self, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: as promised by the caller.
        unsafe { _mm512_maskz_loadu_ps(mask, self.0.wrapping_add(at)) }
    }
}

/// Values held as bf16, widened in the register.
#[derive(Clone, Copy)]
pub struct Brief(pub *const u16);

impl Right for Brief {
    #[inline(always)]
    unsafe fn load(self, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: as promised by the caller.
        unsafe {
            let values = _mm256_maskz_loadu_epi16(mask, self.0.wrapping_add(at).cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values)))
        }
    }
}

/// Pairs of neighbours along the summed dimension in bf16, a word each: a product is that of two pairs.
#[derive(Clone, Copy)]
pub struct Words(pub *const u32);

impl Right for Words {
    #[inline(always)]
    unsafe fn load(self, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: as promised by the caller.
        unsafe {
            let words = _mm512_maskz_loadu_epi32(mask, self.0.wrapping_add(at).cast());
            _mm512_castsi512_ps(words)
        }
    }

    #[inline(always)]
    unsafe fn multiply(sum: __m512, left: __m512, right: __m512) -> __m512 {
        // SAFETY: as promised by the caller; all types are 512 bits without invalid values.
        unsafe {
            let [left, right] = [left, right].map(|x| std::mem::transmute::<__m512, __m512bh>(x));
            _mm512_dpbf16_ps(sum, left, right)
        }
    }
}

/// True where our loops run: with AVX-512F, and BW and VL for what is held as bf16.
pub fn there() -> bool {
    Instructions::Avx512.usable()
}

/// Rows that are needed next. A loop asks for them one by one, so that they come while it works.
#[derive(Clone, Copy)]
pub struct Ahead {
    start: *const u8,
    /// Bytes from row to row.
    stride: usize,
    /// Bytes of a row.
    row: usize,
}

impl Ahead {
    /// Nothing.
    pub const NONE: Ahead = Ahead {
        start: std::ptr::null(),
        stride: 0,
        row: 0,
    };

    /// Rows of `dim` values, `stride` values apart. Rows past the last one may be asked for.
    pub fn new(rows: Held, stride: usize, dim: usize) -> Self {
        let (start, bytes) = match rows {
            Held::F32(values) => (values.as_ptr().cast(), 4),
            Held::Bf16(values) => (values.as_ptr().cast(), 2),
        };
        Ahead {
            start,
            stride: bytes * stride,
            row: bytes * dim,
        }
    }

    /// Asks for row `row`, into the second cache level: into the first, no more than its two dozen misses could be on their
    /// way at once.
    #[inline(always)]
    pub fn ask(self, row: usize) {
        for line in (0..self.row).step_by(64) {
            let at = self.start.wrapping_add(row * self.stride + line);
            // SAFETY: a hint; no address is wrong for it.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
        }
    }
}
