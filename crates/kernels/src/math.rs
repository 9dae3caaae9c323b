//! Scalar functions that LLVM can vectorise: no branch, no table, no call, so that a loop over a slice that is run
//! through [`crate::instructions::dispatch`] becomes SIMD code of the widest kind the processor has.
//!
//! They are written with fused multiply-adds: outside such a dispatched loop they give the same bits, slowly.
//! Polynomials are Chebyshev interpolants on the reduced range, rounded to f32.

#[cfg(target_arch = "x86_64")]
pub(crate) mod wide;

use std::f32::consts::LOG2_E;

/// `1.5 * 2^23`: adding it to a number below `2^22` rounds that number to the nearest integer, held in the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// High part of ln 2, with enough trailing zero bits that its product with an exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;
/// Largest argument whose exponential is finite in f32.
const EXP_MAX: f32 = 88.722_83;
/// Below this the exponential is no normal f32: flushed to zero.
const EXP_MIN: f32 = -87.336_54;

#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut value = coefficients[N - 1];
    let mut index = N - 1;
    while index > 0 {
        index -= 1;
        value = value.mul_add(x, coefficients[index]);
    }
    value
}

/// `e^x` to 2 units in the last place. 0 below -87.34 (no subnormals), infinity above 88.72, NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let tail = polynomial(
        r,
        [
            0.5,
            0.166_665_76,
            0.041_666_556,
            0.008_363_178,
            0.001_392_618_2,
        ],
    );
    let mantissa = (r * r).mul_add(tail, r) + 1.0;
    // Adds n to the exponent of the mantissa: the low bits of `shifted` are n, modulo 2^23 and more.
    let value = f32::from_bits(mantissa.to_bits().wrapping_add(shifted.to_bits() << 23));
    let value = if x <= EXP_MAX {
        value
    } else {
        x + f32::INFINITY
    };
    if x < EXP_MIN { 0.0 } else { value }
}

/// `2 atanh(s) = 2 s + s z R(z)` with `z = s^2` in `[0, 1/9]`; this is R.
#[inline(always)]
fn atanh_tail(z: f32) -> f32 {
    polynomial(
        z,
        [
            0.666_666_7,
            0.400_000_1,
            0.285_703_06,
            0.222_647_12,
            0.174_647_02,
            0.207_876_18,
        ],
    )
}

/// Natural logarithm to 2 units in the last place, subnormal numbers included. `ln 0 = -inf`, NaN below zero.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    let subnormal = x < f32::MIN_POSITIVE;
    let scaled = if subnormal { x * 8_388_608.0 } else { x };
    let offset = if subnormal { -23.0 } else { 0.0 };
    // Splits x = m * 2^n with m in [sqrt(1/2), sqrt(2)).
    let bits = (scaled.to_bits() as i32).wrapping_sub(0x3f35_04f3);
    let n = (bits >> 23) as f32 + offset;
    let m = f32::from_bits((bits & 0x007f_ffff).wrapping_add(0x3f35_04f3) as u32);
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    // ln(1 + f) = 2 atanh(s) and 2 s = f - s f.
    let small = (-s).mul_add((-z).mul_add(atanh_tail(z), f), n * LN_2_LOW);
    let value = n.mul_add(LN_2_HIGH, small + f);
    let value = if x < f32::INFINITY { value } else { x };
    let value = if x == 0.0 { f32::NEG_INFINITY } else { value };
    if x < 0.0 { f32::NAN } else { value }
}

/// `ln(1 + x)` for `x` in `[0, 1]` only, relatively exact for small `x`.
#[inline(always)]
pub fn ln_1p_unit(x: f32) -> f32 {
    let s = x / (2.0 + x);
    let z = s * s;
    (-s).mul_add((-z).mul_add(atanh_tail(z), x), x)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `ln(1 + e^x)`; above 20 this is x itself in f32.
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    let positive = if x < 0.0 { 0.0 } else { x };
    positive + ln_1p_unit(exp(-x.abs()))
}

/// `ln sigmoid(x) = -softplus(-x)`.
#[inline(always)]
pub fn log_sigmoid(x: f32) -> f32 {
    let negative = if x > 0.0 { 0.0 } else { x };
    negative - ln_1p_unit(exp(-x.abs()))
}

/// Hyperbolic tangent, relatively exact for small arguments.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let z = x * x;
    let tail = polynomial(
        z,
        [
            -0.333_333_34,
            0.133_333_04,
            -0.053_959_31,
            0.021_769_34,
            -0.008_345_321,
            0.002_294_304_8,
        ],
    );
    let near = (x * z).mul_add(tail, x);
    let size = x.abs();
    let far = 1.0 - 2.0 / (exp(2.0 * size) + 1.0);
    if size < 0.625 { near } else { far.copysign(x) }
}

/// The standard normal distribution at `x`: the probability of less than `x`, absolute error below 2e-7 (relative 3e-6 in
/// the lower tail), and the density. Both share one exponential.
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    /// `1 / sqrt(2 pi)`.
    const SCALE: f32 = 0.398_942_3;
    let e = exp(-0.5 * x * x);
    // The tail beyond |x| is e times a polynomial in t = 1 / (1 + 0.3 |x|), for every x with e above zero.
    let t = 1.0 / x.abs().mul_add(0.300_520_4, 1.0);
    let tail = e * polynomial(
        t,
        [
            5.700_303_5e-6,
            0.119_724_125,
            0.121_887_66,
            0.095_943_7,
            0.139_489_1,
            -0.071_366_56,
            0.223_297_13,
            -0.167_119_83,
            0.038_139_008,
        ],
    );
    (if x < 0.0 { tail } else { 1.0 - tail }, SCALE * e)
}

/// `(sin x, cos x)` to 1e-7 for `|x|` up to 1e6; the reduction to a quarter turn is done in f64.
#[inline(always)]
pub fn sin_cos(x: f32) -> (f32, f32) {
    const ROUND_64: f64 = 6_755_399_441_055_744.0;
    let shifted = (x as f64).mul_add(std::f64::consts::FRAC_2_PI, ROUND_64);
    let turns = shifted - ROUND_64;
    let r = turns.mul_add(-std::f64::consts::FRAC_PI_2, x as f64) as f32;
    let quarter = shifted.to_bits() as u32;
    let z = r * r;
    let sine_tail = polynomial(z, [-1.0 / 6.0, 1.0 / 120.0, -1.0 / 5040.0, 1.0 / 362_880.0]);
    let sine = (r * z).mul_add(sine_tail, r);
    let cosine_tail = polynomial(z, [-0.5, 1.0 / 24.0, -1.0 / 720.0, 1.0 / 40_320.0]);
    let cosine = z.mul_add(cosine_tail, 1.0);
    let swap = quarter & 1 != 0;
    let (s, c) = (
        if swap { cosine } else { sine },
        if swap { sine } else { cosine },
    );
    // Sines are negative in the quarters 2 and 3, cosines in 1 and 2.
    let s = f32::from_bits(s.to_bits() ^ ((quarter & 2) << 30));
    let c = f32::from_bits(c.to_bits() ^ ((quarter.wrapping_add(1) & 2) << 30));
    (s, c)
}

#[cfg(test)]
mod tests {
    use std::f64::consts::FRAC_1_SQRT_2;

    use super::*;

    /// `count` values from `from` to `to`.
    fn grid(from: f64, to: f64, count: usize) -> impl Iterator<Item = f32> {
        (0..=count).map(move |i| (from + (to - from) * i as f64 / count as f64) as f32)
    }

    fn worst(name: &str, xs: impl Iterator<Item = f32>, f: impl Fn(f32) -> f64) -> f64 {
        let mut worst = (0.0, 0.0f32);
        for x in xs {
            let error = f(x);
            assert!(!error.is_nan(), "{name}({x}) is not comparable");
            if error > worst.0 {
                worst = (error, x);
            }
        }
        assert!(worst.1.is_finite(), "{name}: {worst:?}");
        worst.0
    }

    fn relative(got: f32, want: f64) -> f64 {
        if want == 0.0 {
            got.abs() as f64
        } else {
            ((got as f64 - want) / want).abs()
        }
    }

    const ULP: f64 = f32::EPSILON as f64;

    #[test]
    fn exp_is_close_and_saturates() {
        let error = worst("exp", grid(-87.33, 88.72, 400_000), |x| {
            relative(exp(x), (x as f64).exp())
        });
        assert!(error < ULP, "exp is off by {error}");
        let near = worst("exp", grid(-1.0, 1.0, 100_000), |x| {
            relative(exp(x), (x as f64).exp())
        });
        assert!(near < ULP, "exp is off by {near}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(1e30), f32::INFINITY);
        assert!(exp(EXP_MAX).is_finite() && exp(88.7229).is_infinite());
        assert!(exp(EXP_MIN) >= f32::MIN_POSITIVE * 0.999);
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
    }

    #[test]
    fn ln_is_close_over_every_exponent() {
        let all = (0..2_000_000u32).map(|i| f32::from_bits(1 + i * 1069));
        let error = worst("ln", all.filter(|x| x.is_finite()), |x| {
            relative(ln(x), (x as f64).ln())
        });
        assert!(error < 1.2 * ULP, "ln is off by {error}");
        let near = worst("ln", grid(0.5, 2.0, 200_000), |x| {
            relative(ln(x), (x as f64).ln())
        });
        assert!(near < 1.2 * ULP, "ln is off by {near}");
        assert_eq!(ln(1.0), 0.0);
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(-0.0), f32::NEG_INFINITY);
        assert_eq!(ln(f32::INFINITY), f32::INFINITY);
        assert!(ln(-1.0).is_nan() && ln(f32::NEG_INFINITY).is_nan() && ln(f32::NAN).is_nan());
    }

    #[test]
    fn ln_1p_unit_keeps_small_arguments() {
        let error = worst("ln_1p", grid(0.0, 1.0, 200_000), |x| {
            relative(ln_1p_unit(x), (x as f64).ln_1p())
        });
        assert!(error < ULP, "ln_1p is off by {error}");
        assert_eq!(ln_1p_unit(1e-30), 1e-30);
    }

    #[test]
    fn sigmoid_and_its_logarithms() {
        let f = |x: f32| 1.0 / (1.0 + (-x as f64).exp());
        let error = worst("sigmoid", grid(-87.0, 100.0, 200_000), |x| {
            relative(sigmoid(x), f(x))
        });
        assert!(error < 2.0 * ULP, "sigmoid is off by {error}");
        assert_eq!(sigmoid(f32::NEG_INFINITY), 0.0);
        assert_eq!(sigmoid(f32::INFINITY), 1.0);
        assert!(sigmoid(f32::NAN).is_nan());

        let soft = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        let error = worst("softplus", grid(-87.0, 100.0, 200_000), |x| {
            relative(softplus(x), soft(x as f64))
        });
        assert!(error < 2.0 * ULP, "softplus is off by {error}");
        let error = worst("log_sigmoid", grid(-100.0, 87.0, 200_000), |x| {
            relative(log_sigmoid(x), -soft(-x as f64))
        });
        assert!(error < 2.0 * ULP, "log_sigmoid is off by {error}");
        for x in [20.0, 20.001, 55.5, 1e30, f32::INFINITY] {
            assert_eq!(softplus(x), x);
            assert_eq!(log_sigmoid(-x), -x);
            assert_eq!(softplus(-f32::INFINITY), 0.0);
        }
        assert!(softplus(f32::NAN).is_nan() && log_sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_and_normal() {
        let error = worst("tanh", grid(-20.0, 20.0, 400_000), |x| {
            relative(tanh(x), (x as f64).tanh())
        });
        assert!(error < 2.0 * ULP, "tanh is off by {error}");
        assert_eq!(tanh(1e-20), 1e-20);
        assert_eq!(tanh(-f32::INFINITY), -1.0);
        assert_eq!(tanh(1e30), 1.0);
        assert!(tanh(f32::NAN).is_nan());

        for x in [-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0] {
            assert!((normal(x).0 + normal(-x).0 - 1.0).abs() < 3e-7);
        }
        let cdf = |x: f64| 0.5 + 0.5 * erf_reference(x.abs() * FRAC_1_SQRT_2).copysign(x);
        let error = worst("normal", grid(-7.0, 7.0, 20_000), |x| {
            (normal(x).0 as f64 - cdf(x as f64)).abs()
        });
        assert!(error < 2e-7, "the normal distribution is off by {error}");
        // Against the asymptotic series of the tail, to its fourth term.
        let error = worst("tail", grid(-12.0, -8.0, 20_000), |x| {
            let (x, z) = (x as f64, (x as f64).powi(-2));
            let series = 1.0 - z + 3.0 * z * z - 15.0 * z.powi(3) + 105.0 * z.powi(4);
            relative(
                normal(x as f32).0,
                (-0.5 * x * x).exp() / (-x * (2.0 * std::f64::consts::PI).sqrt()) * series,
            )
        });
        assert!(error < 5e-6, "the tail is off by {error}");
        assert_eq!(normal(f32::INFINITY), (1.0, 0.0));
        assert_eq!(normal(f32::NEG_INFINITY), (0.0, 0.0));
        assert!(normal(f32::NAN).0.is_nan());
    }

    /// The Maclaurin series with positive terms, `2/sqrt(pi) e^(-x^2) sum 2^n x^(2n+1) / (2n+1)!!`.
    fn erf_reference(x: f64) -> f64 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= 2.0 * x * x / (2.0 * n + 1.0);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
    }

    #[test]
    fn sin_cos_is_close_far_out() {
        for (from, to) in [(-10.0, 10.0), (-1e6, 1e6)] {
            let error = worst("sin_cos", grid(from, to, 200_000), |x| {
                let (s, c) = sin_cos(x);
                let (s64, c64) = (x as f64).sin_cos();
                (s as f64 - s64).abs().max((c as f64 - c64).abs())
            });
            assert!(error < 1.2e-7, "sin_cos is off by {error}");
        }
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
        assert!(sin_cos(f32::NAN).0.is_nan());
    }

    #[test]
    fn normal_density_matches() {
        let error = worst("density", grid(-8.0, 8.0, 10_000), |x| {
            let x64 = x as f64;
            let want = (-0.5 * x64 * x64).exp() / (2.0 * std::f64::consts::PI).sqrt();
            (normal(x).1 as f64 - want).abs()
        });
        assert!(error < 1e-7, "density is off by {error}");
    }
}
