//! Dot products of a few rows with many, both contiguous along the summed dimension: the scores of a decoded token.
//!
//! Sixteen dot products are summed in as many registers and then brought into the lanes of one by a tree of shuffles.

use std::arch::x86_64::*;

use super::wide::{Ahead, Right};
use crate::transpose::wide::lanes;

/// `out[r * out_stride + j] = q[r] . k[j]` for `count` keys `k_stride` apart, `q.len()` being 1 to 4. With each key the row
/// of `ahead` that is as far on is asked for.
///
/// # Safety
/// Each row of `q` holds `dim` values, as each of the keys; `out` has room; AVX-512 is there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn dots<K: Right>(
    q: &[&[f32]],
    dim: usize,
    k: K,
    k_stride: usize,
    count: usize,
    out: *mut f32,
    out_stride: usize,
    ahead: Ahead,
) {
    // SAFETY: as promised by the caller.
    unsafe {
        match q.len() {
            1 => rows::<K, 1, 16>(q, dim, k, k_stride, count, out, out_stride, ahead),
            2 => rows::<K, 2, 8>(q, dim, k, k_stride, count, out, out_stride, ahead),
            3 => rows::<K, 3, 5>(q, dim, k, k_stride, count, out, out_stride, ahead),
            _ => rows::<K, 4, 4>(q, dim, k, k_stride, count, out, out_stride, ahead),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn rows<K: Right, const R: usize, const C: usize>(
    q: &[&[f32]],
    dim: usize,
    k: K,
    k_stride: usize,
    count: usize,
    out: *mut f32,
    out_stride: usize,
    ahead: Ahead,
) {
    let mut first = 0;
    while first < count {
        let held = (count - first).min(C);
        let mut sums = [_mm512_setzero_ps(); 16];
        (first..first + held).for_each(|key| ahead.ask(key));
        let mut at = 0;
        while at < dim {
            let mask = lanes(dim - at);
            // SAFETY: lanes past `dim` are masked out; keys past the last one repeat it.
            unsafe {
                let mut left = [_mm512_setzero_ps(); R];
                for r in 0..R {
                    left[r] = _mm512_maskz_loadu_ps(mask, q[r].as_ptr().add(at));
                }
                for c in 0..C {
                    let key = first + c.min(held - 1);
                    let right = k.load(key * k_stride + at, mask);
                    for r in 0..R {
                        sums[r * C + c] = _mm512_fmadd_ps(left[r], right, sums[r * C + c]);
                    }
                }
            }
            at += 16;
        }
        let mut all = [0.0f32; 16];
        // SAFETY: `all` holds 16 values.
        unsafe { _mm512_storeu_ps(all.as_mut_ptr(), totals(sums)) };
        for r in 0..R {
            // SAFETY: `out` has room for the rows and the keys that are there.
            unsafe {
                let to = out.add(r * out_stride + first);
                std::ptr::copy_nonoverlapping(all.as_ptr().add(r * C), to, held);
            }
        }
        first += C;
    }
}

/// `out[i * out_stride] = a[i] . b[i]` for `count` pairs of rows, `a_stride` and `b_stride` apart.
///
/// # Safety
/// Each row holds `dim` values, `out` has room; AVX-512 is there.
#[target_feature(enable = "avx512f")]
pub unsafe fn pairs(
    dim: usize,
    (a, a_stride): (*const f32, usize),
    (b, b_stride): (*const f32, usize),
    count: usize,
    out: *mut f32,
    out_stride: usize,
) {
    for first in (0..count).step_by(16) {
        let held = (count - first).min(16);
        let mut sums = [_mm512_setzero_ps(); 16];
        for at in (0..dim).step_by(16) {
            let mask = lanes(dim - at);
            for (i, sum) in sums.iter_mut().enumerate() {
                // Rows past the last one repeat it.
                let row = first + i.min(held - 1);
                // SAFETY: lanes past `dim` are masked out; the row exists.
                unsafe {
                    let left = _mm512_maskz_loadu_ps(mask, a.add(row * a_stride + at));
                    let right = _mm512_maskz_loadu_ps(mask, b.add(row * b_stride + at));
                    *sum = _mm512_fmadd_ps(left, right, *sum);
                }
            }
        }
        let mut all = [0.0f32; 16];
        // SAFETY: `all` holds 16 values, and `out` has room for those that are there.
        unsafe {
            _mm512_storeu_ps(all.as_mut_ptr(), totals(sums));
            for (i, sum) in all.iter().enumerate().take(held) {
                out.add((first + i) * out_stride).write(*sum);
            }
        }
    }
}

/// The sum over the lanes of vector `i` in lane `i`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn totals(a: [__m512; 16]) -> __m512 {
    let zero = _mm512_setzero_ps();
    let (mut b, mut c, mut d) = ([zero; 8], [zero; 4], [zero; 2]);
    for i in 0..8 {
        let low = _mm512_shuffle_f32x4::<0x44>(a[2 * i], a[2 * i + 1]);
        let high = _mm512_shuffle_f32x4::<0xee>(a[2 * i], a[2 * i + 1]);
        b[i] = _mm512_add_ps(low, high);
    }
    for i in 0..4 {
        let even = _mm512_shuffle_f32x4::<0x88>(b[2 * i], b[2 * i + 1]);
        let odd = _mm512_shuffle_f32x4::<0xdd>(b[2 * i], b[2 * i + 1]);
        c[i] = _mm512_add_ps(even, odd);
    }
    for i in 0..2 {
        let (one, two) = (_mm512_castps_pd(c[2 * i]), _mm512_castps_pd(c[2 * i + 1]));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(one, two));
        let high = _mm512_castpd_ps(_mm512_unpackhi_pd(one, two));
        d[i] = _mm512_add_ps(low, high);
    }
    let even = _mm512_shuffle_ps::<0x88>(d[0], d[1]);
    let odd = _mm512_shuffle_ps::<0xdd>(d[0], d[1]);
    // Quarter j now holds the sums of vectors j, 4 + j, 8 + j, 12 + j.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_ps(order, _mm512_add_ps(even, odd))
}
