//! The softmax of a block of scores on AVX-512, sixteen rows at a time.
//!
//! `e^(s - m)` is `2^((s - m) log2 e)`, the difference first: scores may be as large as [`super::super::OWN`].

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use super::super::{LANES, ROWS};
use super::Running;
use crate::math::wide::exp2;

/// As [`super::portable_soften`] after biases and mask. The output is only brought to new largest scores where there are any.
///
/// # Safety
/// `scores` and `o` are rows of [`ROWS`] values, `width` at most that and whole lanes; AVX-512 is there.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn soften(
    width: usize,
    scores: &mut [f32],
    running: &mut Running,
    o: &mut [f32],
) {
    let (keys, values) = (scores.len() / ROWS, o.len() / ROWS);
    let (scores, o) = (scores.as_mut_ptr(), o.as_mut_ptr());
    let log2_e = _mm512_set1_ps(LOG2_E);
    for lane in (0..width).step_by(LANES) {
        // SAFETY: lanes `lane..lane + 16` of each row exist.
        unsafe {
            let largest_at = running.largest.as_mut_ptr().add(lane);
            let before = _mm512_loadu_ps(largest_at);
            let mut largest = before;
            for key in 0..keys {
                // NaN is passed over: the second operand comes back when one is.
                let score = _mm512_loadu_ps(scores.add(key * ROWS + lane));
                largest = _mm512_max_ps(score, largest);
            }
            _mm512_storeu_ps(largest_at, largest);
            // Rows that no key has reached yet keep zero sums; -inf must not meet -inf.
            let none = _mm512_set1_ps(f32::NEG_INFINITY);
            let reached = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(largest, none);
            let base = _mm512_maskz_mov_ps(reached, largest);
            let mut sum = _mm512_setzero_ps();
            for key in 0..keys {
                let at = scores.add(key * ROWS + lane);
                let below = _mm512_sub_ps(_mm512_loadu_ps(at), base);
                let p = exp2(_mm512_mul_ps(below, log2_e));
                _mm512_storeu_ps(at, p);
                sum = _mm512_add_ps(sum, p);
            }
            let sum_at = running.sum.as_mut_ptr().add(lane);
            if _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(before, largest) == 0 {
                _mm512_storeu_ps(sum_at, _mm512_add_ps(_mm512_loadu_ps(sum_at), sum));
                continue;
            }
            let factor = exp2(_mm512_mul_ps(_mm512_sub_ps(before, base), log2_e));
            let sum = _mm512_fmadd_ps(factor, _mm512_loadu_ps(sum_at), sum);
            _mm512_storeu_ps(sum_at, sum);
            for value in 0..values {
                let at = o.add(value * ROWS + lane);
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
            }
        }
    }
}

/// As [`super::portable_soften_back`] after biases and mask.
///
/// # Safety
/// `scores` and `dp` are as many rows of [`ROWS`] values, `width` at most that and whole lanes; AVX-512 is there.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn soften_back(
    width: usize,
    scores: &mut [f32],
    dp: &mut [f32],
    lse: &[f32; ROWS],
    delta: &[f32; ROWS],
) {
    let keys = scores.len() / ROWS;
    let (scores, dp) = (scores.as_mut_ptr(), dp.as_mut_ptr());
    let log2_e = _mm512_set1_ps(LOG2_E);
    for lane in (0..width).step_by(LANES) {
        // SAFETY: lanes `lane..lane + 16` of each row exist.
        unsafe {
            let lse = _mm512_loadu_ps(lse.as_ptr().add(lane));
            let delta = _mm512_loadu_ps(delta.as_ptr().add(lane));
            for key in 0..keys {
                let at = key * ROWS + lane;
                let score = _mm512_loadu_ps(scores.add(at));
                let p = exp2(_mm512_mul_ps(_mm512_sub_ps(score, lse), log2_e));
                _mm512_storeu_ps(scores.add(at), p);
                let ds = _mm512_sub_ps(_mm512_loadu_ps(dp.add(at)), delta);
                _mm512_storeu_ps(dp.add(at), _mm512_mul_ps(p, ds));
            }
        }
    }
}
