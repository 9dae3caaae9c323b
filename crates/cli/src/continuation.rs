//! Making text token by token: the flags of sampling, and the loop that `generate` and `chat` share.

use std::path::PathBuf;
use std::time::Instant;

use anyformer_data::{Constraint, Detokenizer, Grammars, Shape, Tokenizer};
use anyformer_models::{
    Guesses, Model, ModelState, Reads, SampleOptions, Sampler, Steps, Stops, likeliest, log_prob,
};
use anyformer_ops::tensor_values;
use anyhow::Context;
use serde_json::{Value, json};

use crate::exit::{Failure, Kind, bad_input};
use crate::say::Say;

/// Flags of sampling.
#[derive(Debug, clap::Args)]
pub struct Sampling {
    /// Tokens to make at most; fewer where the model says that its text is at its end
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub max_tokens: usize,
    /// Scores are divided by it; 0 always takes the likeliest token (greedy)
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub temperature: f32,
    /// Choose among the N likeliest tokens; 0: among all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the fewest tokens that hold this share of the probability
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub top_p: f32,
    /// Choose among tokens at least P times as likely as the likeliest; 0: among all
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub min_p: f32,
    /// Make tokens that were read or made less likely: above 1 less, 1 not
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub repetition_penalty: f32,
    /// Taken from the scores of tokens that were made, -2 to 2
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub presence_penalty: f32,
    /// The same, once for each time that they were made
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub frequency_penalty: f32,
    /// Stop before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// With --json: the log probability of every token made, with the N likeliest tokens in its place
    #[arg(long, value_name = "N")]
    pub logprobs: Option<usize>,
    /// Seed of the choice; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Guess up to N tokens ahead: what followed the same words earlier in the text; the text stays the same
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub speculate: usize,
    /// The text is JSON that this JSON schema describes
    #[arg(long, value_name = "FILE")]
    pub json_schema: Option<PathBuf>,
}

impl Sampling {
    /// The chooser; options out of range are bad input.
    pub fn sampler(&self, say: &Say) -> Result<Sampler, Failure> {
        if self.logprobs.is_some() && !say.is_json() {
            return Err(bad_input(
                "show log probabilities: --logprobs needs --json, or they would not be seen",
            ));
        }
        Sampler::new(SampleOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
        })
        .input()
    }

    /// What holds the text to the schema, where there is one.
    pub fn grammar(
        &self,
        tokenizer: &Tokenizer,
        reads: Reads,
        ends: &[u32],
    ) -> Result<Option<Constraint>, Failure> {
        let (Some(path), Reads::Tokens { vocab }) = (&self.json_schema, reads) else {
            return Ok(None);
        };
        let shown = || format!("read {}", path.display());
        let text = std::fs::read_to_string(path).with_context(shown).input()?;
        let schema = serde_json::from_str(&text).with_context(shown).input()?;
        let grammars = Grammars::new(tokenizer, vocab, ends).input()?;
        let shape = Shape::Schema(schema);
        let begun = grammars.begin(&shape).with_context(shown).input()?;
        Ok(Some(begun))
    }
}

/// What one continuation made.
pub struct Made {
    /// The text, without a stop string or an end token.
    pub text: String,
    /// The tokens of the text.
    pub tokens: Vec<u32>,
    /// `end`, `stop` or `length`.
    pub finish: &'static str,
    /// The state after all tokens, or all but `pending`.
    pub state: ModelState,
    /// The last token, where the state has not read it.
    pub pending: Option<u32>,
    /// What became of the guesses.
    pub guesses: Guesses,
    /// Log probabilities, where asked for.
    pub logprobs: Vec<Value>,
    /// Seconds of reading the prompt.
    pub prefill_s: f64,
    /// Seconds of making the tokens.
    pub decode_s: f64,
}

/// A model with all that makes text of its scores.
pub struct Writer<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Tokens after which a text is at its end.
    pub ends: &'a [u32],
    /// The flags.
    pub sampling: &'a Sampling,
    /// What every text is held to.
    pub grammar: Option<Constraint>,
}

impl Writer<'_> {
    /// Reads `ids`, going on from `state`, and makes tokens. Every piece of text goes to `give`, which tells whether
    /// anybody still reads.
    pub fn go_on(
        &self,
        sampler: &mut Sampler,
        ids: &[u32],
        state: Option<&ModelState>,
        give: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Made, Failure> {
        if ids.is_empty() {
            return Err(bad_input(
                "read the prompt: it is empty; give at least one character",
            ));
        }
        sampler.see(ids);
        let began = Instant::now();
        // A prompt that does not fit the model (too long for its positions) is the user's to change.
        let (scores, state) = self.model.prefill(ids, 1, None, state).input()?;
        let prefill_s = began.elapsed().as_secs_f64();
        let began = Instant::now();
        let mut stream = Detokenizer::default();
        let mut stops = Stops::new(&self.sampling.stop);
        let (mut text, mut tokens, mut logprobs) = (String::new(), Vec::new(), Vec::new());
        let mut finish = "length";
        let mut pending = None;
        let mut steps = Steps::new(self.model, state, ids, self.sampling.speculate);
        let mut values = tensor_values(scores);
        let mut grammar = self.grammar.clone();
        while tokens.len() < self.sampling.max_tokens {
            let chosen = match &mut grammar {
                None => Some((sampler.choose(&values), false)),
                Some(grammar) => grammar
                    .choose(&values, |allowed| sampler.choose(allowed))
                    .broken()?,
            };
            let Some((id, complete)) = chosen else {
                finish = "end";
                break;
            };
            if self.ends.contains(&id) {
                finish = "end";
                break;
            }
            tokens.push(id);
            pending = Some(id);
            if let Some(count) = self.sampling.logprobs {
                logprobs.push(self.logprob(&values, id, count));
            }
            let (part, stopped) = stops.push(&stream.push(self.tokenizer, id));
            text.push_str(&part);
            let read = give(&part);
            if stopped {
                finish = "stop";
                break;
            }
            if complete {
                finish = "end";
                break;
            }
            if tokens.len() == self.sampling.max_tokens || !read {
                break;
            }
            values = steps.next(id).broken()?;
            pending = None;
        }
        let (state, guesses) = steps.finish().broken()?;
        if finish != "stop" {
            let (part, stopped) = stops.push(&stream.finish(self.tokenizer));
            let rest = if stopped {
                part
            } else {
                part + &stops.finish()
            };
            text.push_str(&rest);
            give(&rest);
        }
        Ok(Made {
            text,
            tokens,
            finish,
            state,
            pending,
            guesses,
            logprobs,
            prefill_s,
            decode_s: began.elapsed().as_secs_f64(),
        })
    }

    fn logprob(&self, scores: &[f32], id: u32, count: usize) -> Value {
        let one = |id: u32| {
            let token = self.tokenizer.decode(&[id]);
            json!({
                "id": id,
                "token": String::from_utf8_lossy(&token),
                "logprob": log_prob(scores, id),
            })
        };
        let mut chosen = one(id);
        let top: Vec<Value> = likeliest(scores, count).into_iter().map(one).collect();
        chosen["top"] = json!(top);
        chosen
    }
}
