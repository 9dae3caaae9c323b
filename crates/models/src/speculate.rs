//! Guessing ahead: the tokens that followed the same last tokens before are run in one pass and kept as far as the sampler
//! chooses them (prompt lookup; verification as in Leviathan et al., Fast Inference from Transformers via Speculative
//! Decoding, 2023, arXiv 2211.17192).
//!
//! A guess is one sequence of tokens, not a distribution, so a token is accepted when the sampler, asked with the model's own
//! scores in their order, chooses it: the text is the one that the same seed gives without guessing, at any temperature.
//! Scores of a pass over several tokens and of as many steps differ in their last bits, so two equally likely tokens may
//! be told apart otherwise.

use anyformer_ops::lengths::cumulative;
use anyformer_ops::tensor_values;

use crate::config::ModelError;
use crate::model::Model;
use crate::state::ModelState;

/// The longest run of last tokens that is looked for earlier in the text, and the shortest.
const LONGEST: usize = 4;
const SHORTEST: usize = 2;

/// Up to `count` tokens that followed the last few of `ids` where these stood before; none where they did not. Longer runs
/// are looked for first, and of several places the last is taken.
pub fn lookup(ids: &[u32], count: usize) -> &[u32] {
    if count == 0 {
        return &[];
    }
    for run in (SHORTEST..=LONGEST).rev() {
        let Some(start) = ids.len().checked_sub(run) else {
            continue;
        };
        let last = &ids[start..];
        let found = (0..start).rev().find(|at| ids[*at..at + run] == *last);
        if let Some(at) = found {
            let from = at + run;
            return &ids[from..(from + count).min(ids.len())];
        }
    }
    &[]
}

/// One pass over a token and the guesses behind it, for each of some sequences, packed end to end.
pub struct Pass {
    pieces: Vec<Vec<u32>>,
    /// The first row of each sequence in `scores`.
    starts: Vec<usize>,
    scores: Vec<f32>,
    vocab: usize,
    before: ModelState,
    after: ModelState,
}

impl Pass {
    /// Runs a piece of at least one token for each sequence of `state`.
    pub fn run(
        model: &Model,
        pieces: Vec<Vec<u32>>,
        state: &ModelState,
    ) -> Result<Self, ModelError> {
        let slices: Vec<&[u32]> = pieces.iter().map(Vec::as_slice).collect();
        let (scores, after) = model.scores_of_each(&slices, state)?;
        let starts = cumulative(pieces.iter().map(Vec::len));
        Ok(Pass {
            pieces,
            starts,
            vocab: scores.dims()[1],
            scores: tensor_values(scores),
            before: state.clone(),
            after,
        })
    }

    /// Tokens that were run of a sequence.
    pub fn ids(&self, sequence: usize) -> &[u32] {
        &self.pieces[sequence]
    }

    /// Scores after the token `at` of a sequence.
    pub fn scores(&self, sequence: usize, at: usize) -> &[f32] {
        let row = self.starts[sequence] + at;
        &self.scores[row * self.vocab..(row + 1) * self.vocab]
    }

    /// The state after the first `used` tokens of each sequence. A cache with a row per token is cut; any other state is made
    /// again from the one before the pass, by the tokens that stay, of all such sequences at once.
    pub fn state(self, model: &Model, used: &[usize]) -> Result<ModelState, ModelError> {
        let whole = |sequence: usize| used[sequence] == self.pieces[sequence].len();
        let count = self.pieces.len();
        if (0..count).all(whole) {
            return Ok(self.after);
        }
        let mut states: Vec<Option<ModelState>> = (0..count)
            .map(|sequence| {
                let one = || self.after.select(&[sequence]);
                match used[sequence] {
                    _ if whole(sequence) => Some(one()),
                    0 => Some(self.before.select(&[sequence])),
                    used => one().rolled_back(self.before.times[sequence] + used),
                }
            })
            .collect();
        let again: Vec<usize> = (0..count).filter(|at| states[*at].is_none()).collect();
        if !again.is_empty() {
            let pieces = again.iter().map(|at| &self.pieces[*at][..used[*at]]);
            let pieces: Vec<&[u32]> = pieces.collect();
            let made = model
                .scores_of_each(&pieces, &self.before.select(&again))?
                .1;
            if again.len() == count {
                return Ok(made);
            }
            for (place, at) in again.into_iter().enumerate() {
                states[at] = Some(made.select(&[place]));
            }
        }
        let states: Vec<&ModelState> = states.iter().flatten().collect();
        Ok(ModelState::join(&states))
    }
}

/// How many tokens were guessed, and how many of these were right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guesses {
    /// Tokens guessed.
    pub made: usize,
    /// Tokens that the sampler then chose.
    pub accepted: usize,
}

/// One sequence that is continued token by token, with or without guessing ahead.
pub struct Steps<'a> {
    model: &'a Model,
    state: Option<ModelState>,
    pass: Option<(Pass, usize)>,
    /// All tokens, as far as they are known.
    text: Vec<u32>,
    count: usize,
    guesses: Guesses,
}

impl<'a> Steps<'a> {
    /// Goes on from `state`, which has read `text`; guesses up to `count` tokens ahead, 0 for none.
    pub fn new(model: &'a Model, state: ModelState, text: &[u32], count: usize) -> Self {
        Steps {
            model,
            state: Some(state),
            pass: None,
            text: text.to_vec(),
            count,
            guesses: Guesses::default(),
        }
    }

    /// Reads a token; the scores of the next.
    pub fn next(&mut self, id: u32) -> Result<Vec<f32>, ModelError> {
        self.text.push(id);
        if let Some((pass, used)) = &mut self.pass
            && pass.ids(0).get(*used) == Some(&id)
        {
            *used += 1;
            self.guesses.accepted += 1;
            return Ok(pass.scores(0, *used - 1).to_vec());
        }
        let state = self.settled()?;
        let guess = lookup(&self.text, self.count);
        if guess.is_empty() {
            let (scores, next) = self.model.step(&[id], &state)?;
            self.state = Some(next);
            return Ok(tensor_values(scores));
        }
        self.guesses.made += guess.len();
        let ids = std::iter::once(id).chain(guess.iter().copied()).collect();
        let pass = Pass::run(self.model, vec![ids], &state)?;
        let scores = pass.scores(0, 0).to_vec();
        self.pass = Some((pass, 1));
        Ok(scores)
    }

    /// The state after every token that was read, and what became of the guesses.
    pub fn finish(mut self) -> Result<(ModelState, Guesses), ModelError> {
        Ok((self.settled()?, self.guesses))
    }

    fn settled(&mut self) -> Result<ModelState, ModelError> {
        if let Some((pass, used)) = self.pass.take() {
            return pass.state(self.model, &[used]);
        }
        self.state
            .take()
            .ok_or_else(|| ModelError::Input("the pass before failed".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ModelConfig, SampleOptions, Sampler};
    use anyformer_ops::Device;
    use serde_json::{Value, json};

    #[test]
    fn the_last_place_of_the_longest_run_is_copied() {
        assert_eq!(lookup(&[1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 2), [8, 1]);
        assert_eq!(lookup(&[5, 1, 2, 7, 1, 2], 9), [7, 1, 2]);
        assert_eq!(lookup(&[1, 2, 3], 4), [0; 0]);
        assert_eq!(lookup(&[4, 4, 4], 4), [4]);
        assert_eq!(lookup(&[], 4), [0; 0]);
    }

    fn model(mixers: Value) -> Model {
        let config = json!({
            "dim": 32, "layers": 2, "mixers": mixers, "reads": {"tokens": {"vocab": 8}},
            "gives": {"next_token": {"tied": false}}, "initializer_range": 0.3,
        });
        let config = ModelConfig::from_json(&config).expect("a config");
        Model::new(&config, &Device::flex(), 7).expect("a model")
    }

    fn continued(model: &Model, temperature: f32, count: usize) -> (Vec<u32>, ModelState, Guesses) {
        let prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2];
        let options = SampleOptions {
            temperature,
            seed: 3,
            ..SampleOptions::default()
        };
        let mut sampler = Sampler::new(options).expect("in range");
        let (scores, state) = model.prefill(&prompt, 1, None, None).expect("runs");
        let mut steps = Steps::new(model, state, &prompt, count);
        let (mut scores, mut made) = (tensor_values(scores), Vec::new());
        for _ in 0..60 {
            let id = sampler.choose(&scores);
            made.push(id);
            scores = steps.next(id).expect("runs");
        }
        let (state, guesses) = steps.finish().expect("runs");
        (made, state, guesses)
    }

    /// The text is the same with and without, and so is the state, where it can be cut and where it is made again.
    #[test]
    fn guessing_changes_neither_text_nor_state() {
        for mixers in [
            json!([{"name": "attention"}]),
            json!([{"name": "gla"}]),
            json!([{"name": "mamba"}, {"name": "local", "window": 8}]),
        ] {
            let model = model(mixers.clone());
            for temperature in [0.0, 0.7] {
                let (plain, state, none) = continued(&model, temperature, 0);
                let (guessed, again, guesses) = continued(&model, temperature, 5);
                assert_eq!(plain, guessed, "{mixers} at {temperature}");
                assert_eq!(none, Guesses::default());
                assert!(guesses.made > 0 && guesses.accepted <= guesses.made);
                if temperature == 0.0 {
                    assert!(guesses.accepted > 0, "{mixers}: {guesses:?}");
                } else {
                    assert!(guesses.accepted < guesses.made, "{mixers}: {guesses:?}");
                }
                assert_eq!(state.times, again.times);
                let next =
                    |state: &ModelState| tensor_values(model.step(&[5], state).expect("runs").0);
                for (a, b) in next(&state).iter().zip(next(&again)) {
                    assert!((a - b).abs() < 1e-4, "{mixers}: {a} {b}");
                }
            }
        }
    }
}
