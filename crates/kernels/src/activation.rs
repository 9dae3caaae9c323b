//! Pointwise activations and gated units: one loop, generic over the function.
//!
//! Values are f32 slices of any shape. Backwards take the input, not the output, and save nothing else.

use crate::math;
use crate::simd::{BLOCK, dispatched, each};

/// A pointwise function and its derivative; implementations are `#[inline(always)]`.
pub trait Pointwise: Copy + Send + Sync {
    /// `f(x)`.
    fn value(self, x: f32) -> f32;
    /// `f'(x)`.
    fn slope(self, x: f32) -> f32;
}

/// `x sigmoid(x)`, also called swish.
#[derive(Clone, Copy, Debug)]
pub struct Silu;

impl Pointwise for Silu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * math::sigmoid(x)
    }
    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        let s = math::sigmoid(x);
        s * x.mul_add(1.0 - s, 1.0)
    }
}

/// `x Phi(x)` with the exact normal distribution function.
#[derive(Clone, Copy, Debug)]
pub struct Gelu;

impl Pointwise for Gelu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * math::normal(x).0
    }
    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        let (distribution, density) = math::normal(x);
        x.mul_add(density, distribution)
    }
}

/// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, the approximation of GPT-2.
#[derive(Clone, Copy, Debug)]
pub struct GeluTanh;

/// `sqrt(2/pi)`.
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

impl Pointwise for GeluTanh {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        let inner = GELU_SCALE * x * (x * x).mul_add(GELU_CUBIC, 1.0);
        0.5 * x * (1.0 + math::tanh(inner))
    }
    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        // Beyond 20 the slope is 0 or 1, and squares could overflow.
        let x = if x > 20.0 { 20.0 } else { x };
        let x = if x < -20.0 { -20.0 } else { x };
        let square = x * x;
        let inner = GELU_SCALE * x * square.mul_add(GELU_CUBIC, 1.0);
        let t = math::tanh(inner);
        let inner_slope = GELU_SCALE * square.mul_add(3.0 * GELU_CUBIC, 1.0);
        0.5 * (1.0 + t) + 0.5 * (1.0 - t) * (1.0 + t) * x * inner_slope
    }
}

/// `max(x, 0)`; the slope at 0 is 0.
#[derive(Clone, Copy, Debug)]
pub struct Relu;

impl Pointwise for Relu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        if x < 0.0 { 0.0 } else { x }
    }
    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { 0.0 }
    }
}

/// `1 / (1 + e^-x)`.
#[derive(Clone, Copy, Debug)]
pub struct Sigmoid;

impl Pointwise for Sigmoid {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        math::sigmoid(x)
    }
    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        math::sigmoid(x) * math::sigmoid(-x)
    }
}

/// `ln(1 + e^x)`.
#[derive(Clone, Copy, Debug)]
pub struct Softplus;

impl Pointwise for Softplus {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        math::softplus(x)
    }
    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        math::sigmoid(x)
    }
}

/// `ln sigmoid(x) / temperature`.
#[derive(Clone, Copy, Debug)]
pub struct LogSigmoid {
    /// `1 / temperature`.
    pub scale: f32,
}

impl Pointwise for LogSigmoid {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        math::log_sigmoid(x) * self.scale
    }
    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        math::sigmoid(-x) * self.scale
    }
}

/// A choice of [`Pointwise`] made at run time, once per slice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// [`Silu`].
    Silu,
    /// [`Gelu`].
    Gelu,
    /// [`GeluTanh`].
    GeluTanh,
    /// [`Relu`].
    Relu,
    /// [`Sigmoid`].
    Sigmoid,
    /// [`Softplus`].
    Softplus,
    /// [`LogSigmoid`].
    LogSigmoid {
        /// Divides the logarithm; GLA uses 16.
        temperature: f32,
    },
}

macro_rules! chosen {
    ($activation:expr, $f:ident => $body:expr) => {
        match $activation {
            Activation::Silu => {
                let $f = Silu;
                $body
            }
            Activation::Gelu => {
                let $f = Gelu;
                $body
            }
            Activation::GeluTanh => {
                let $f = GeluTanh;
                $body
            }
            Activation::Relu => {
                let $f = Relu;
                $body
            }
            Activation::Sigmoid => {
                let $f = Sigmoid;
                $body
            }
            Activation::Softplus => {
                let $f = Softplus;
                $body
            }
            Activation::LogSigmoid { temperature } => {
                let $f = LogSigmoid {
                    scale: 1.0 / temperature,
                };
                $body
            }
        }
    };
}

impl Activation {
    /// `y = f(x)`.
    pub fn forward(self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "activation: x and y");
        let blocks = x.chunks(BLOCK).zip(y.chunks_mut(BLOCK));
        chosen!(self, f => each(blocks, x.len(), |(x, y)| map(f, x, y)));
    }

    /// `x = f(x)`, on this thread.
    pub fn replace(self, x: &mut [f32]) {
        chosen!(self, f => map_in_place(f, x));
    }

    /// `dx = dy f'(x)`.
    pub fn backward(self, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        assert_eq!(x.len(), dy.len(), "activation: x and dy");
        assert_eq!(x.len(), dx.len(), "activation: x and dx");
        let blocks = x
            .chunks(BLOCK)
            .zip(dy.chunks(BLOCK))
            .zip(dx.chunks_mut(BLOCK));
        chosen!(self, f => each(blocks, x.len(), |((x, dy), dx)| map_backward(f, x, dy, dx)));
    }

    /// The gated unit `y = f(a) b`: with [`Activation::Silu`], SwiGLU (Shazeer, 2020) and the output gates of Mamba
    /// and GLA.
    pub fn gated(self, a: &[f32], b: &[f32], y: &mut [f32]) {
        assert_eq!(a.len(), b.len(), "gated unit: a and b");
        assert_eq!(a.len(), y.len(), "gated unit: a and y");
        let blocks = a
            .chunks(BLOCK)
            .zip(b.chunks(BLOCK))
            .zip(y.chunks_mut(BLOCK));
        chosen!(self, f => each(blocks, a.len(), |((a, b), y)| gate(f, a, b, y)));
    }

    /// Gradients of [`Activation::gated`]: `da = dy b f'(a)`, `db = dy f(a)`.
    pub fn gated_backward(self, a: &[f32], b: &[f32], dy: &[f32], da: &mut [f32], db: &mut [f32]) {
        for other in [b.len(), dy.len(), da.len(), db.len()] {
            assert_eq!(a.len(), other, "gated unit: lengths");
        }
        let inputs = a.chunks(BLOCK).zip(b.chunks(BLOCK)).zip(dy.chunks(BLOCK));
        let blocks = inputs.zip(da.chunks_mut(BLOCK).zip(db.chunks_mut(BLOCK)));
        chosen!(self, f => each(blocks, a.len(), |(((a, b), dy), (da, db))| {
            gate_backward(f, a, b, dy, da, db);
        }));
    }
}

dispatched! {
    fn map<'a, F: Pointwise>(f: F, x: &'a [f32], y: &'a mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = f.value(*x);
        }
    }
}

dispatched! {
    fn map_in_place<'a, F: Pointwise>(f: F, x: &'a mut [f32]) {
        for x in x.iter_mut() {
            *x = f.value(*x);
        }
    }
}

dispatched! {
    fn map_backward<'a, F: Pointwise>(f: F, x: &'a [f32], dy: &'a [f32], dx: &'a mut [f32]) {
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            *dx = dy * f.slope(*x);
        }
    }
}

dispatched! {
    fn gate<'a, F: Pointwise>(f: F, a: &'a [f32], b: &'a [f32], y: &'a mut [f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = f.value(*a) * b;
        }
    }
}

dispatched! {
    fn gate_backward<'a, F: Pointwise>(
        f: F,
        a: &'a [f32],
        b: &'a [f32],
        dy: &'a [f32],
        da: &'a mut [f32],
        db: &'a mut [f32],
    ) {
        let outputs = da.iter_mut().zip(db.iter_mut());
        for ((outputs, dy), (a, b)) in outputs.zip(dy).zip(a.iter().zip(b)) {
            *outputs.0 = dy * b * f.slope(*a);
            *outputs.1 = dy * f.value(*a);
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) use tests::naive;

#[cfg(any(test, fuzzing))]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    const ALL: [Activation; 7] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Sigmoid,
        Activation::Softplus,
        Activation::LogSigmoid { temperature: 16.0 },
    ];

    /// Simpson's rule on the density: independent of the error function under test.
    fn normal_distribution(x: f64) -> f64 {
        let n = 2000;
        let h = x / n as f64;
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let sum: f64 = (0..=n)
            .map(|i| {
                let weight = if i == 0 || i == n {
                    1.0
                } else {
                    2.0 + 2.0 * (i % 2) as f64
                };
                weight * density(i as f64 * h)
            })
            .sum();
        0.5 + sum * h / 3.0
    }

    pub(crate) fn naive(activation: Activation, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match activation {
            Activation::Silu => x * sigmoid(x),
            Activation::Gelu => x * normal_distribution(x),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::Sigmoid => sigmoid(x),
            Activation::Softplus => x.exp().ln_1p(),
            Activation::LogSigmoid { temperature } => -(-x).exp().ln_1p() / temperature as f64,
        }
    }

    fn inputs() -> Vec<f32> {
        rand_vec(7, 301).iter().map(|v| v * 9.0).collect()
    }

    #[test]
    fn values_and_slopes_match_naive() {
        let x = inputs();
        let dy = rand_vec(8, x.len());
        for activation in ALL {
            let mut y = vec![0.0; x.len()];
            activation.forward(&x, &mut y);
            let want: Vec<f32> = x
                .iter()
                .map(|x| naive(activation, *x as f64) as f32)
                .collect();
            assert_close(&format!("{activation:?}"), &y, &want, 1e-6);

            let mut dx = vec![0.0; x.len()];
            activation.backward(&x, &dy, &mut dx);
            let h = 1e-5;
            let want: Vec<f32> = (0..x.len())
                .map(|i| {
                    let (up, down) = (x[i] as f64 + h, x[i] as f64 - h);
                    let slope = (naive(activation, up) - naive(activation, down)) / (2.0 * h);
                    (slope * dy[i] as f64) as f32
                })
                .collect();
            assert_close(&format!("{activation:?} slope"), &dx, &want, 2e-6);
        }
    }

    #[test]
    fn gated_unit_matches_its_parts() {
        let (a, b) = (inputs(), rand_vec(9, 301));
        let dy = rand_vec(10, a.len());
        for f in ALL {
            let n = a.len();
            let (mut y, mut da, mut db) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            f.gated(&a, &b, &mut y);
            f.gated_backward(&a, &b, &dy, &mut da, &mut db);
            let value: Vec<f32> = a.iter().map(|a| naive(f, *a as f64) as f32).collect();
            let product = |u: &[f32], v: &[f32]| -> Vec<f32> {
                u.iter().zip(v).map(|(u, v)| u * v).collect()
            };
            assert_close("gated", &y, &product(&value, &b), 1e-6);
            assert_close("gated db", &db, &product(&value, &dy), 1e-6);
            let mut want = vec![0.0; n];
            f.backward(&a, &product(&dy, &b), &mut want);
            assert_close("gated da", &da, &want, 1e-6);
        }
    }

    #[test]
    fn extreme_values_stay_finite() {
        let x = [-1e30, -1e4, -90.0, -0.0, 0.0, 90.0, 1e4, 1e18];
        let ones = [1.0; 8];
        for activation in ALL {
            let (mut y, mut dx) = ([0.0; 8], [0.0; 8]);
            activation.forward(&x, &mut y);
            activation.backward(&x, &ones, &mut dx);
            assert!(y.iter().all(|v| v.is_finite()), "{activation:?}: {y:?}");
            assert!(dx.iter().all(|v| v.is_finite()), "{activation:?}: {dx:?}");
        }
        let (mut y, mut dx) = ([0.0], [0.0]);
        for activation in ALL {
            activation.forward(&[f32::NAN], &mut y);
            assert!(y[0].is_nan(), "{activation:?} hides NaN");
            if activation != Activation::Relu {
                activation.backward(&[f32::NAN], &[1.0], &mut dx);
                assert!(dx[0].is_nan(), "{activation:?} hides NaN");
            }
        }
    }

    #[test]
    fn blocks_give_the_same_bits_as_one_call() {
        let x = rand_vec(11, 3 * BLOCK + 5);
        let mut y = vec![0.0; x.len()];
        Activation::Silu.forward(&x, &mut y);
        for (x, y) in x.iter().zip(&y) {
            assert_eq!(Silu.value(*x), *y);
        }
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[
            values_and_slopes_match_naive,
            gated_unit_matches_its_parts,
            extreme_values_stay_finite,
        ]);
    }
}
