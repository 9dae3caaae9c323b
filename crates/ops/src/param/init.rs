//! The first values of a parameter.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// How a new parameter is filled.
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// One value.
    Constant(f32),
    /// Normal with mean zero and this standard deviation.
    Normal(f32),
    /// Uniform in a range.
    Uniform(f32, f32),
    /// Uniform in `±1/sqrt(fan_in)`: the default of PyTorch's linear and convolution layers.
    FanIn(usize),
    /// Uniform in `±gain·sqrt(6/(fan_in+fan_out))`.
    Xavier {
        /// Inputs of one output.
        fan_in: usize,
        /// Outputs of one input.
        fan_out: usize,
        /// Factor on the bound.
        gain: f32,
    },
    /// Another initialiser, its values multiplied by a factor.
    Scaled(Box<Init>, f32),
    /// Whatever the function returns (exactly as many values as the shape holds).
    With(Box<dyn FnOnce(&mut ChaCha8Rng, usize) -> Vec<f32>>),
}

/// One standard normal number (Box–Muller; the second of the pair is dropped).
pub fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    (radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()) as f32
}

impl Init {
    pub(super) fn values(self, rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
        let uniform = |rng: &mut ChaCha8Rng, low: f32, high: f32| {
            (0..count)
                .map(|_| low + (high - low) * rng.random::<f32>())
                .collect()
        };
        match self {
            Init::Zeros => vec![0.0; count],
            Init::Ones => vec![1.0; count],
            Init::Constant(value) => vec![value; count],
            Init::Normal(deviation) => (0..count).map(|_| deviation * normal(rng)).collect(),
            Init::Uniform(low, high) => uniform(rng, low, high),
            Init::FanIn(fan_in) => {
                let bound = 1.0 / (fan_in.max(1) as f32).sqrt();
                uniform(rng, -bound, bound)
            }
            Init::Xavier {
                fan_in,
                fan_out,
                gain,
            } => {
                let bound = gain * (6.0 / (fan_in + fan_out) as f32).sqrt();
                uniform(rng, -bound, bound)
            }
            Init::Scaled(init, factor) => {
                let mut values = init.values(rng, count);
                values.iter_mut().for_each(|value| *value *= factor);
                values
            }
            Init::With(fill) => fill(rng, count),
        }
    }
}
