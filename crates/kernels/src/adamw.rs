//! AdamW (Loshchilov and Hutter, 2019) in one pass over a parameter, and the norm that gradient clipping needs.

use crate::simd::{BLOCK, collect, dispatched, each};

/// One update: `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`,
/// `p = p (1 - lr wd) - lr m^ / (sqrt(v^) + eps)` with `m^`, `v^` corrected for their start at zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay; multiplied by the learning rate.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// Multiplies the gradient first: less than 1 when the gradient is clipped.
    pub gradient_scale: f32,
}

/// The numbers that the loop uses.
#[derive(Clone, Copy)]
struct Factors {
    gradient: f32,
    keep1: f32,
    take1: f32,
    keep2: f32,
    take2: f32,
    /// `1 - lr wd`.
    shrink: f32,
    /// `lr / (1 - b1^step)`.
    rate: f32,
    /// `1 / sqrt(1 - b2^step)`.
    root: f32,
    eps: f32,
}

impl AdamW {
    /// Updates a parameter and its moments in place.
    pub fn update(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        assert!(self.step > 0, "adamw: steps count from 1");
        for other in [g.len(), m.len(), v.len()] {
            assert_eq!(p.len(), other, "adamw: lengths differ");
        }
        let power = |beta: f64| 1.0 - beta.powf(self.step as f64);
        let factors = Factors {
            gradient: self.gradient_scale,
            keep1: self.beta1 as f32,
            take1: (1.0 - self.beta1) as f32,
            keep2: self.beta2 as f32,
            take2: (1.0 - self.beta2) as f32,
            shrink: (1.0 - self.learning_rate * self.weight_decay) as f32,
            rate: (self.learning_rate / power(self.beta1)) as f32,
            root: (1.0 / power(self.beta2).sqrt()) as f32,
            eps: self.eps as f32,
        };
        let values = p.len();
        let moments = m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK));
        let blocks = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(moments);
        each(blocks, values, |((p, g), (m, v))| {
            update_block(factors, p, g, m, v)
        });
    }
}

dispatched! {
    fn update_block<'a>(
        f: Factors,
        p: &'a mut [f32],
        g: &'a [f32],
        m: &'a mut [f32],
        v: &'a mut [f32],
    ) {
        for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v.iter_mut())) {
            let g = g * f.gradient;
            *m = f.keep1 * *m + f.take1 * g;
            *v = f.keep2 * *v + f.take2 * g * g;
            let denominator = v.sqrt() * f.root + f.eps;
            *p = *p * f.shrink - f.rate * *m / denominator;
        }
    }
}

/// `sum x^2` in f64, the same whatever the number of threads.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    collect(x.chunks(BLOCK), x.len(), square_block).iter().sum()
}

dispatched! {
    fn square_block<'a>(x: &'a [f32]) -> f64 {
        const LANES: usize = 16;
        let mut lanes = [0.0f64; LANES];
        let (blocks, rest) = x.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                let value = block[lane] as f64;
                lanes[lane] = value.mul_add(value, lanes[lane]);
            }
        }
        let mut total = 0.0;
        for value in rest {
            total += *value as f64 * *value as f64;
        }
        for lane in lanes {
            total += lane;
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    #[test]
    fn three_steps_match_f64() {
        for n in [1, 15, 33, 3 * BLOCK + 7] {
            let mut p = rand_vec(1, n);
            let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
            let mut p64: Vec<f64> = p.iter().map(|v| *v as f64).collect();
            let (mut m64, mut v64) = (vec![0.0f64; n], vec![0.0f64; n]);
            let (lr, b1, b2, eps, wd, scale) = (1e-2f64, 0.9f64, 0.95f64, 1e-8, 0.1, 0.3f32);
            for step in 1..=3 {
                let g = rand_vec(10 + step, n);
                let optimiser = AdamW {
                    learning_rate: lr,
                    beta1: b1,
                    beta2: b2,
                    eps,
                    weight_decay: wd,
                    step,
                    gradient_scale: scale,
                };
                optimiser.update(&mut p, &g, &mut m, &mut v);
                for i in 0..n {
                    let g = g[i] as f64 * scale as f64;
                    p64[i] -= lr * wd * p64[i];
                    m64[i] = b1 * m64[i] + (1.0 - b1) * g;
                    v64[i] = b2 * v64[i] + (1.0 - b2) * g * g;
                    let mean = m64[i] / (1.0 - b1.powi(step as i32));
                    let var = v64[i] / (1.0 - b2.powi(step as i32));
                    p64[i] -= lr * mean / (var.sqrt() + eps);
                }
            }
            let narrow = |x: &[f64]| x.iter().map(|v| *v as f32).collect::<Vec<f32>>();
            assert_close("p", &p, &narrow(&p64), 1e-6);
            assert_close("m", &m, &narrow(&m64), 1e-6);
            assert_close("v", &v, &narrow(&v64), 1e-6);
        }
    }

    #[test]
    fn zero_gradient_only_decays() {
        let optimiser = AdamW {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.5,
            step: 1,
            gradient_scale: 1.0,
        };
        let (mut p, mut m, mut v) = ([2.0], [0.0], [0.0]);
        optimiser.update(&mut p, &[0.0], &mut m, &mut v);
        assert_eq!((p, m, v), ([1.9], [0.0], [0.0]));
        optimiser.update(&mut p, &[f32::NAN], &mut m, &mut v);
        assert!(p[0].is_nan(), "a NaN gradient is not hidden");
    }

    #[test]
    fn squares_match_f64() {
        for n in [0, 1, 17, BLOCK, 5 * BLOCK + 13] {
            let x = rand_vec(3, n);
            let want: f64 = x.iter().map(|v| *v as f64 * *v as f64).sum();
            assert!((sum_of_squares(&x) - want).abs() <= 1e-12 * want);
        }
        assert_eq!(sum_of_squares(&[1e30]), 1e30f32 as f64 * 1e30f32 as f64);
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[three_steps_match_f64, squares_match_f64]);
    }
}
