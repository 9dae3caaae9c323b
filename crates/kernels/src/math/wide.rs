//! Functions of 16 values in a register, for loops that are written with AVX-512 themselves.

use std::arch::x86_64::*;
use std::f32::consts::LN_2;

/// `(2^r - 1) / r` on half a unit to both sides of zero, to 1e-7.
const EXP2: [f32; 5] = [
    LN_2,
    0.240_222_83,
    0.055_505_59,
    0.009_669_661,
    0.001_330_035_9,
];

/// `2^x` of every lane to 2 units in the last place: 0 below -126 (no subnormals), infinity above 128, NaN stays NaN. A
/// factor `log2 e` that goes into what `x` is made of makes it an exponential, and spares the reduction its two roundings.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn exp2(x: __m512) -> __m512 {
    // The second operand comes back when one is NaN.
    let held = _mm512_min_ps(_mm512_set1_ps(129.0), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(held);
    let r = _mm512_sub_ps(held, n);
    let mut value = _mm512_set1_ps(EXP2[4]);
    for coefficient in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
        value = _mm512_fmadd_ps(value, r, _mm512_set1_ps(coefficient));
    }
    // Not less, or not comparable.
    let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
    _mm512_maskz_scalef_ps(kept, value, n)
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;

    fn all(x: [f32; 16]) -> [f32; 16] {
        let mut got = [0.0; 16];
        // SAFETY: the caller detected AVX-512; both arrays hold 16 values.
        unsafe { _mm512_storeu_ps(got.as_mut_ptr(), exp2(_mm512_loadu_ps(x.as_ptr()))) };
        got
    }

    #[test]
    fn exp2_is_close_and_saturates() {
        if !is_x86_feature_detected!("avx512f") {
            return;
        }
        let grid = (0..1_000_000).map(|i| -126.0 + i as f32 * (126.0 + 127.99) / 1e6);
        let grid: Vec<f32> = grid.chain([-126.0, -0.5, -0.0, 0.5, 1e-30]).collect();
        for x in grid.chunks(16) {
            let mut held = [1.0; 16];
            held[..x.len()].copy_from_slice(x);
            for (x, got) in held.into_iter().zip(all(held)) {
                let error = (f64::from(got) / f64::from(x).exp2() - 1.0).abs();
                assert!(error < 1.5 * f64::from(f32::EPSILON), "2^{x}: {got}");
            }
        }
        let mut special = [0.0; 16];
        let infinite = [f32::NEG_INFINITY, -1e30, -126.1, f32::INFINITY, 1e30, 128.0];
        special[..6].copy_from_slice(&infinite);
        (special[6], special[7]) = (f32::NAN, f32::from_bits(0xff80_0001));
        let got = all(special);
        assert_eq!(got[..3], [0.0; 3]);
        assert_eq!(got[3..6], [f32::INFINITY; 3]);
        assert!(got[6].is_nan() && got[7].is_nan());
        assert_eq!(got[8..], [1.0; 8]);
    }
}
