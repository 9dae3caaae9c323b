//! Choosing the next token from scores.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

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
    /// Only tokens at least so likely, relative to the likeliest, take part; 0 for all.
    pub min_p: f32,
    /// Scores of tokens that were seen are divided by this where positive and multiplied where negative (Keskar et al.,
    /// CTRL, 2019, arXiv 1909.05858); 1 for no change.
    pub repetition_penalty: f32,
    /// Taken from the scores of tokens that were chosen before, -2 to 2; 0 for no change.
    pub presence_penalty: f32,
    /// The same, once for each time that they were chosen.
    pub frequency_penalty: f32,
    /// Seed of the choice.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> Self {
        SampleOptions {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
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
    bias: Arc<BTreeMap<u32, f32>>,
    seen: BTreeSet<u32>,
    /// How often each token was chosen, where that changes its score.
    made: BTreeMap<u32, u32>,
}

impl Sampler {
    /// A chooser; refuses a negative temperature, a `top_p` outside `(0, 1]`, a `min_p` outside `[0, 1]`, a repetition penalty that
    /// is not above 0, and another penalty outside `[-2, 2]`.
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
        if !(0.0..=1.0).contains(&options.min_p) {
            return Err(SampleError(format!(
                "expected min_p of at least 0 and at most 1, got {}",
                options.min_p
            )));
        }
        if !(options.repetition_penalty > 0.0 && options.repetition_penalty.is_finite()) {
            return Err(SampleError(format!(
                "expected repetition_penalty above 0, got {}",
                options.repetition_penalty
            )));
        }
        for (name, penalty) in [
            ("presence_penalty", options.presence_penalty),
            ("frequency_penalty", options.frequency_penalty),
        ] {
            if !(-2.0..=2.0).contains(&penalty) {
                return Err(SampleError(format!(
                    "expected {name} of at least -2 and at most 2, got {penalty}"
                )));
            }
        }
        Ok(Sampler {
            options,
            rng: ChaCha8Rng::seed_from_u64(options.seed),
            bias: Arc::default(),
            seen: BTreeSet::new(),
            made: BTreeMap::new(),
        })
    }

    /// Adds to the scores of some tokens.
    pub fn with_bias(mut self, bias: Arc<BTreeMap<u32, f32>>) -> Self {
        self.bias = bias;
        self
    }

    /// Tokens that the penalty for repetition counts as seen, beside those that were chosen.
    pub fn see(&mut self, ids: &[u32]) {
        if self.options.repetition_penalty != 1.0 {
            self.seen.extend(ids);
        }
    }

    /// The next token for one row of scores. Scores that are not numbers never win.
    pub fn choose(&mut self, scores: &[f32]) -> u32 {
        let plain = self.seen.is_empty() && self.made.is_empty() && self.bias.is_empty();
        let chosen = match plain {
            true => self.draw(scores),
            false => self.draw(&self.adjusted(scores)),
        };
        self.see(&[chosen]);
        if self.options.presence_penalty != 0.0 || self.options.frequency_penalty != 0.0 {
            *self.made.entry(chosen).or_default() += 1;
        }
        chosen
    }

    /// Scores after what was seen, made, and asked for.
    fn adjusted(&self, scores: &[f32]) -> Vec<f32> {
        let mut scores = scores.to_vec();
        let mut change = |id: u32, change: &dyn Fn(f32) -> f32| {
            if let Some(score) = scores.get_mut(id as usize) {
                *score = change(*score);
            }
        };
        let options = &self.options;
        for (id, bias) in &*self.bias {
            change(*id, &|score| score + bias);
        }
        for id in &self.seen {
            change(*id, &|score| match score > 0.0 {
                true => score / options.repetition_penalty,
                false => score * options.repetition_penalty,
            });
        }
        for (id, count) in &self.made {
            let all = options.presence_penalty + options.frequency_penalty * *count as f32;
            change(*id, &|score| score - all);
        }
        scores
    }

    fn draw(&mut self, scores: &[f32]) -> u32 {
        if self.options.temperature == 0.0 {
            return highest(scores).unwrap_or(0);
        }
        let wanted = match self.options.top_k {
            0 => usize::MAX,
            top_k => top_k,
        };
        let mut ranked = Ranked::new(scores, wanted);
        let Some(best) = ranked.get(0) else { return 0 };
        let (top, temperature) = (scores[best as usize], self.options.temperature);
        let weight = |id: u32| f64::from((scores[id as usize] - top) / temperature).exp();
        let total: f64 = ranked.order.iter().map(|id| weight(*id)).sum();
        let mut share = total;
        if self.options.top_p < 1.0 || self.options.min_p > 0.0 {
            // How many stay, likeliest first; the likeliest weighs 1 and always does.
            let enough = f64::from(self.options.top_p) * total;
            let least = f64::from(self.options.min_p);
            let (mut kept, mut held) = (0, 0.0);
            while let Some(id) = ranked.get(kept) {
                let own = weight(id);
                if kept > 0 && own < least {
                    break;
                }
                held += own;
                kept += 1;
                if self.options.top_p < 1.0 && held >= enough {
                    break;
                }
            }
            ranked.order.truncate(kept);
            share = held;
        }
        let mut draw = self.rng.random::<f64>() * share;
        let (mut at, mut last) = (0, best);
        while let Some(id) = ranked.get(at) {
            let own = weight(id);
            // What weighs nothing is never drawn.
            if own == 0.0 {
                break;
            }
            draw -= own;
            if draw <= 0.0 {
                return id;
            }
            (at, last) = (at + 1, id);
        }
        last
    }
}

/// Equal scores: the lower id first, so that greedy choice is reproducible.
fn before(scores: &[f32]) -> impl Fn(&u32, &u32) -> Ordering + '_ {
    |a, b| {
        let by_score = scores[*b as usize].total_cmp(&scores[*a as usize]);
        by_score.then(a.cmp(b))
    }
}

/// The token of the highest score.
fn highest(scores: &[f32]) -> Option<u32> {
    let known = (0..scores.len() as u32).filter(|id| !scores[*id as usize].is_nan());
    known.min_by(before(scores))
}

/// Tokens by falling score, sorted only as far as somebody looks: few tokens hold most of the probability.
struct Ranked<'a> {
    scores: &'a [f32],
    order: Vec<u32>,
    sorted: usize,
}

impl<'a> Ranked<'a> {
    /// The `count` likeliest.
    fn new(scores: &'a [f32], count: usize) -> Self {
        let known = (0..scores.len() as u32).filter(|id| !scores[*id as usize].is_nan());
        let mut order: Vec<u32> = known.collect();
        if count < order.len() {
            order.select_nth_unstable_by(count, before(scores));
            order.truncate(count);
        }
        Ranked {
            scores,
            order,
            sorted: 0,
        }
    }

    /// The token at a rank.
    fn get(&mut self, at: usize) -> Option<u32> {
        while at >= self.sorted && self.sorted < self.order.len() {
            let count = (self.sorted * 3).max(64);
            let rest = &mut self.order[self.sorted..];
            let count = count.min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count, before(self.scores));
            }
            rest[..count].sort_unstable_by(before(self.scores));
            self.sorted += count;
        }
        self.order.get(at).copied()
    }
}

/// The log probability of a token under one row of scores.
pub fn log_prob(scores: &[f32], id: u32) -> f32 {
    let known = |score: &&f32| !score.is_nan();
    let top = scores
        .iter()
        .filter(known)
        .copied()
        .fold(f32::MIN, f32::max);
    let sum = scores
        .iter()
        .filter(known)
        .map(|score| f64::from(score - top).exp());
    let score = scores
        .get(id as usize)
        .copied()
        .unwrap_or(f32::NEG_INFINITY);
    (f64::from(score - top) - sum.sum::<f64>().ln()) as f32
}

/// The so many likeliest tokens, likeliest first.
pub fn likeliest(scores: &[f32], count: usize) -> Vec<u32> {
    let mut ranked = Ranked::new(scores, count);
    ranked.order.sort_unstable_by(before(scores));
    ranked.order
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
        let min_p = SampleOptions {
            min_p: 0.6,
            ..Default::default()
        };
        assert_eq!(shares(min_p, &scores)[0], 1.0);
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
    #[test]
    fn what_was_seen_is_less_likely_and_probabilities_sum_to_one() {
        let options = SampleOptions {
            temperature: 0.0,
            repetition_penalty: 2.0,
            ..Default::default()
        };
        let mut sampler = Sampler::new(options).expect("in range");
        let scores = [3.0, 2.0, -1.0];
        assert_eq!(sampler.choose(&scores), 0);
        assert_eq!(sampler.choose(&scores), 1);
        assert_eq!(sampler.choose(&scores), 0);
        let mut other = Sampler::new(options).expect("in range");
        other.see(&[0]);
        assert_eq!(other.choose(&scores), 1);
        let all: f32 = (0..3).map(|id| log_prob(&scores, id).exp()).sum();
        assert!((all - 1.0).abs() < 1e-6);
        assert_eq!(likeliest(&[1.0, f32::NAN, 3.0, 3.0], 2), [2, 3]);
        assert_eq!(likeliest(&scores, 9), [0, 1, 2]);
    }

    #[test]
    fn what_was_made_is_less_likely_each_time_and_a_bias_counts_always() {
        let options = SampleOptions {
            temperature: 0.0,
            frequency_penalty: 0.5,
            ..Default::default()
        };
        let choices = |options: SampleOptions, bias: &[(u32, f32)], seen: &[u32]| {
            let bias = Arc::new(bias.iter().copied().collect());
            let mut sampler = Sampler::new(options).expect("in range").with_bias(bias);
            sampler.see(seen);
            (0..5)
                .map(|_| sampler.choose(&[2.0, 1.2, 0.6]))
                .collect::<Vec<_>>()
        };
        // 2.0, 1.5, then 1.2 against 1.0, 1.0 against 0.7, and 0.7 against 0.5 and 0.6.
        assert_eq!(choices(options, &[], &[0]), [0, 0, 1, 0, 1]);
        let presence = SampleOptions {
            frequency_penalty: 0.0,
            presence_penalty: 1.0,
            ..options
        };
        // 1.0, 0.2 and -0.4 once each was made.
        assert_eq!(choices(presence, &[], &[0]), [0, 1, 0, 0, 0]);
        assert_eq!(choices(options, &[(2, 100.0), (9, 5.0)], &[]), [2; 5]);
        let none = SampleOptions {
            frequency_penalty: 0.0,
            ..options
        };
        assert_eq!(choices(none, &[(0, -100.0)], &[]), [1; 5]);
        for penalty in [2.1, -2.1, f32::NAN] {
            let far = SampleOptions {
                frequency_penalty: penalty,
                ..none
            };
            assert!(Sampler::new(far).is_err(), "{penalty}");
        }
    }

    #[test]
    fn ranks_found_as_asked_for_are_those_of_a_whole_sort() {
        let scores: Vec<f32> = (0..1000).map(|at| ((at * 7919) % 331) as f32).collect();
        let mut ranked = Ranked::new(&scores, usize::MAX);
        let one_by_one: Vec<u32> = (0..1001).map_while(|at| ranked.get(at)).collect();
        assert_eq!(one_by_one, likeliest(&scores, 1000));
        assert_eq!(highest(&scores), Some(one_by_one[0]));
        assert_eq!(highest(&[f32::NAN]), None);
    }
}
