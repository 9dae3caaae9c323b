//! Choosing the next token from scores.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleOptions {
    /// Scores are divided by this; 0 always takes the highest score.
    pub temperature: f32,
    /// Only the so many highest scores take part; 0 for all.
    pub top_k: usize,
    /// Only the smallest set of tokens that holds this share of the probability takes part; 1 for all.
    pub top_p: f32,
    /// Seed of the choice.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> Self {
        SampleOptions {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// An option out of its range.
#[derive(Debug, thiserror::Error)]
#[error("sample: {0}")]
pub struct SampleError(String);

/// A seeded chooser.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SampleOptions,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A chooser; refuses a negative temperature and a `top_p` outside `(0, 1]`.
    pub fn new(options: SampleOptions) -> Result<Self, SampleError> {
        if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
            return Err(SampleError(format!(
                "expected a temperature of at least 0, got {}",
                options.temperature
            )));
        }
        if !(options.top_p > 0.0 && options.top_p <= 1.0) {
            return Err(SampleError(format!(
                "expected top_p above 0 and at most 1, got {}",
                options.top_p
            )));
        }
        Ok(Sampler {
            options,
            rng: ChaCha8Rng::seed_from_u64(options.seed),
        })
    }

    /// The next token for one row of scores. Scores that are not numbers never win.
    pub fn choose(&mut self, scores: &[f32]) -> u32 {
        let mut order: Vec<u32> = (0..scores.len() as u32)
            .filter(|id| !scores[*id as usize].is_nan())
            .collect();
        // Equal scores: the lower id first, so that greedy choice is reproducible.
        order.sort_by(|a, b| {
            scores[*b as usize]
                .total_cmp(&scores[*a as usize])
                .then(a.cmp(b))
        });
        let Some(&best) = order.first() else { return 0 };
        if self.options.temperature == 0.0 {
            return best;
        }
        if self.options.top_k > 0 {
            order.truncate(self.options.top_k);
        }
        let top = scores[best as usize];
        let weight = |id: &u32| {
            let score = (scores[*id as usize] - top) / self.options.temperature;
            f64::from(score).exp()
        };
        let mut weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        if self.options.top_p < 1.0 {
            let mut held = 0.0;
            let enough = f64::from(self.options.top_p) * total;
            let kept = weights
                .iter()
                .position(|weight| {
                    held += weight;
                    held >= enough
                })
                .map_or(weights.len(), |last| last + 1);
            weights.truncate(kept);
        }
        let mut draw = self.rng.random::<f64>() * weights.iter().sum::<f64>();
        for (id, weight) in order.iter().zip(&weights) {
            draw -= weight;
            if draw <= 0.0 {
                return *id;
            }
        }
        order[weights.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(options: SampleOptions, scores: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(options).expect("in range");
        let mut counts = vec![0u32; scores.len()];
        for _ in 0..4000 {
            counts[sampler.choose(scores) as usize] += 1;
        }
        counts
            .iter()
            .map(|count| f64::from(*count) / 4000.0)
            .collect()
    }

    #[test]
    fn draws_follow_the_softmax_and_the_cuts() {
        let scores = [2f32.ln(), 0.0, f32::NAN, f32::NEG_INFINITY, 1f32.ln()];
        let all = shares(SampleOptions::default(), &scores);
        assert!((all[0] - 0.5).abs() < 0.04 && (all[1] - 0.25).abs() < 0.04);
        assert_eq!(all[2] + all[3], 0.0);
        let top_k = SampleOptions {
            top_k: 1,
            ..Default::default()
        };
        assert_eq!(shares(top_k, &scores)[0], 1.0);
        let top_p = SampleOptions {
            top_p: 0.6,
            ..Default::default()
        };
        assert_eq!(shares(top_p, &scores)[4], 0.0);
        let greedy = SampleOptions {
            temperature: 0.0,
            ..Default::default()
        };
        assert_eq!(shares(greedy, &scores)[0], 1.0);
        assert!(
            Sampler::new(SampleOptions {
                top_p: 0.0,
                ..greedy
            })
            .is_err()
        );
        assert!(
            Sampler::new(SampleOptions {
                temperature: -1.0,
                ..greedy
            })
            .is_err()
        );
    }
}
