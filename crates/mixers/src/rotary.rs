//! Rotary frequencies, as they are and stretched to texts longer than those of the training.
//!
//! Su et al. (2021), arXiv 2104.09864: pair `i` of `d` turned features turns by `base^(-2i/d)` per token. Stretched:
//! `linear`, Chen et al. (2023), arXiv 2306.15595; `dynamic`, the NTK-aware base of the length at hand; `yarn`, Peng et al.
//! (2023), arXiv 2309.00071; `llama3`, Dubey et al. (2024), arXiv 2407.21783.

use std::f64::consts::TAU;
use std::sync::{Arc, OnceLock};

use anyformer_ops::Tensor;
use anyformer_ops::rope::{Rotations, rope_by};
use serde::{Deserialize, Serialize};

/// How the frequencies are stretched by `factor` beyond a training `length` in tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// Every frequency over `factor`.
    Linear {
        /// How much longer.
        factor: f64,
    },
    /// A larger base for sequences longer than `length`, chosen anew at every length.
    Dynamic {
        /// How much longer.
        factor: f64,
        /// Tokens of the longest sequence that is not stretched.
        length: usize,
    },
    /// Slow pairs over `factor`, fast ones as they are, a ramp between.
    Yarn {
        /// How much longer.
        factor: f64,
        /// Tokens of the longest training sequence.
        length: usize,
        /// Turns within `length` above which a pair is fast.
        #[serde(default = "beta_fast")]
        beta_fast: f64,
        /// Turns within `length` below which a pair is slow.
        #[serde(default = "beta_slow")]
        beta_slow: f64,
        /// Factor on turned queries and on turned keys; 0 takes `0.1 ln factor + 1`.
        #[serde(default)]
        attention_factor: f64,
        /// Round the ends of the ramp to whole pairs.
        #[serde(default = "truncate")]
        truncate: bool,
    },
    /// As `yarn`, the ramp over wavelengths and without a factor on the scores.
    Llama3 {
        /// How much longer.
        factor: f64,
        /// Tokens of the longest training sequence.
        length: usize,
        /// Turns within `length` below which a pair is slow.
        low_freq_factor: f64,
        /// Turns within `length` above which a pair is fast.
        high_freq_factor: f64,
    },
}

fn beta_fast() -> f64 {
    32.0
}

fn beta_slow() -> f64 {
    1.0
}

fn truncate() -> bool {
    true
}

/// The rotary positions of one mixer.
pub(crate) struct Rotary {
    base: f64,
    dim: usize,
    scaling: RopeScaling,
    /// Made when something is first turned: the shapes of a model are asked for before its file is known to fit them.
    inv_freq: OnceLock<Vec<f32>>,
}

impl Rotary {
    /// The first `dim` features of a head turn. What is wrong with the choice, where something is.
    pub(crate) fn new(base: f64, dim: usize, scaling: RopeScaling) -> Result<Self, String> {
        if dim == 0 || !dim.is_multiple_of(2) {
            return Err(format!(
                "rotary positions turn pairs of features, and {dim} features (rope_dim, or head_dim) are to turn; choose an even number or position = \"none\""
            ));
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let fine = match &scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Dynamic { factor, length } => {
                *factor >= 1.0 && factor.is_finite() && *length > 0 && dim > 2
            }
            RopeScaling::Yarn {
                factor,
                length,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => {
                [*factor, *beta_fast, *beta_slow].into_iter().all(positive)
                    && *length > 0
                    && *attention_factor >= 0.0
                    && base != 1.0
            }
            RopeScaling::Llama3 {
                factor,
                length,
                low_freq_factor,
                high_freq_factor,
            } => {
                [*factor, *low_freq_factor].into_iter().all(positive)
                    && *length > 0
                    && high_freq_factor > low_freq_factor
            }
        };
        if !fine || !positive(base) {
            return Err(format!(
                "rope_scaling {scaling:?} with rope_base {base} over {dim} features is no stretching: factors and lengths must be above 0"
            ));
        }
        Ok(Rotary {
            base,
            dim,
            scaling,
            inv_freq: OnceLock::new(),
        })
    }

    fn inv_freq(&self) -> &[f32] {
        self.inv_freq.get_or_init(|| self.frequencies(0))
    }

    /// What the dot products of turned queries and keys are multiplied by.
    pub(crate) fn score_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn {
                factor,
                attention_factor,
                ..
            } => {
                let one = match *attention_factor {
                    0.0 if *factor <= 1.0 => 1.0,
                    0.0 => 0.1 * factor.ln() + 1.0,
                    given => given,
                };
                one * one
            }
            _ => 1.0,
        }
    }

    /// Turns per token of every pair, in a sequence of `time` tokens.
    fn frequencies(&self, time: usize) -> Vec<f32> {
        let dim = self.dim as f64;
        let mut base = self.base;
        if let RopeScaling::Dynamic { factor, length } = self.scaling {
            let longer = time.max(length) as f64 / length as f64;
            base *= (factor * longer - (factor - 1.0)).powf(dim / (dim - 2.0));
        }
        let plain = |pair: usize| base.powf(-2.0 * pair as f64 / dim);
        let stretch = |pair: usize| self.stretched(pair, plain(pair)) as f32;
        (0..self.dim / 2).map(stretch).collect()
    }

    fn stretched(&self, pair: usize, plain: f64) -> f64 {
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => plain,
            RopeScaling::Linear { factor } => plain / factor,
            RopeScaling::Yarn {
                factor,
                length,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                // The pair that turns so often within `length`.
                let at = |turns: f64| {
                    let wave = *length as f64 / (turns * TAU);
                    self.dim as f64 * wave.ln() / (2.0 * self.base.ln())
                };
                let (mut low, mut high) = (at(*beta_fast), at(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(self.dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let slow = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain * (1.0 - slow) + plain / factor * slow
            }
            RopeScaling::Llama3 {
                factor,
                length,
                low_freq_factor,
                high_freq_factor,
            } => {
                let turns = *length as f64 * plain / TAU;
                let fast = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let fast = fast.clamp(0.0, 1.0);
                plain * fast + plain / factor * (1.0 - fast)
            }
        }
    }

    /// Turns each of `all` (`[batch, time, heads, head_dim]`) by `positions` (`[batch * time]`); `offsets` are the cumulative
    /// lengths of their sequences.
    pub(crate) fn turn<const N: usize>(
        &self,
        all: [Tensor<4>; N],
        positions: &[usize],
        offsets: &[usize],
    ) -> [Tensor<4>; N] {
        let length = match self.scaling {
            RopeScaling::Dynamic { length, .. } => length,
            _ => usize::MAX,
        };
        if positions.iter().all(|position| *position < length) {
            let rotations = Arc::new(Rotations::new(positions, self.inv_freq()));
            return all.map(|x| rope_by(x, rotations.clone()));
        }
        // Each sequence has frequencies of its own.
        let sequences: Vec<_> = offsets
            .windows(2)
            .filter(|pair| pair[1] > pair[0])
            .map(|pair| {
                let positions = &positions[pair[0]..pair[1]];
                let inv_freq = self.frequencies(positions[positions.len() - 1] + 1);
                let rotations = Arc::new(Rotations::new(positions, &inv_freq));
                (pair[0]..pair[1], rotations)
            })
            .collect();
        all.map(|x| {
            let shape = x.dims();
            let flat = x.reshape([1, shape[0] * shape[1], shape[2], shape[3]]);
            let turned = sequences.iter().map(|(range, rotations)| {
                rope_by(flat.clone().slice([0..1, range.clone()]), rotations.clone())
            });
            Tensor::cat(turned.collect(), 1).reshape(shape)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotary(scaling: RopeScaling) -> Rotary {
        Rotary::new(10_000.0, 16, scaling).expect("a stretching")
    }

    #[test]
    fn fast_pairs_stay_and_slow_ones_are_divided() {
        let plain = rotary(RopeScaling::None).frequencies(0);
        let llama = rotary(RopeScaling::Llama3 {
            factor: 8.0,
            length: 256,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
        });
        assert_eq!(llama.inv_freq()[0], plain[0]);
        assert!((llama.inv_freq()[7] * 8.0 / plain[7] - 1.0).abs() < 1e-6);
        let dynamic = rotary(RopeScaling::Dynamic {
            factor: 2.0,
            length: 32,
        });
        assert_eq!(dynamic.frequencies(32), plain);
        assert!(dynamic.frequencies(64)[7] < plain[7]);
        let linear = rotary(RopeScaling::Linear { factor: 4.0 });
        assert_eq!(linear.inv_freq()[3] * 4.0, plain[3]);
    }

    #[test]
    fn what_stretches_nothing_is_refused() {
        for scaling in [
            RopeScaling::Linear { factor: 0.0 },
            RopeScaling::Dynamic {
                factor: 2.0,
                length: 0,
            },
        ] {
            assert!(Rotary::new(10_000.0, 16, scaling).is_err());
        }
        assert!(Rotary::new(10_000.0, 7, RopeScaling::None).is_err());
    }
}
