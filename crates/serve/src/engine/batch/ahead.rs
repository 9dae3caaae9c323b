//! Tokens that are guessed before they are chosen, and what a grammar leaves to choose from.

use anyformer_data::GrammarError;
use anyformer_models::ModelError;
use anyformer_models::speculate::{Pass, lookup};

use super::{Sequence, Worker, end};
use crate::engine::job::JobError;

impl Worker {
    /// Guesses ahead for a sequence that runs alone, and keeps what it then chooses. `false`: there is nothing to guess.
    pub(super) fn decode_ahead(&mut self) -> bool {
        let ([sequence], Some(state)) = (&self.running[..], &self.joined) else {
            return false;
        };
        let room = sequence.max_tokens.saturating_sub(sequence.made + 1);
        let guess = lookup(&sequence.ids, self.config.speculate.min(room));
        if guess.is_empty() {
            return false;
        }
        self.metrics.batch_size.observe(1.0);
        self.metrics.guessed_tokens.inc_by(guess.len() as u64);
        let last = sequence.ids.len() - 1;
        let ids = [&sequence.ids[last..], guess].concat();
        let pass = Pass::run(&self.model, ids, state);
        self.joined = None;
        let Some(mut sequence) = self.running.pop() else {
            return true;
        };
        let broken = |error: ModelError| Err(JobError::Model(error.to_string()));
        let pass = match pass {
            Ok(pass) => pass,
            Err(error) => {
                end(&self.metrics, sequence, broken(error));
                return true;
            }
        };
        let mut used = 0;
        let finish = loop {
            let finish = self.choose(&mut sequence, pass.scores(used));
            used += 1;
            if finish.is_some() || pass.ids().get(used) != sequence.ids.last() {
                break finish;
            }
            self.metrics.accepted_tokens.inc();
        };
        match (pass.state(&self.model, used), finish) {
            (Err(error), _) => end(&self.metrics, sequence, broken(error)),
            (Ok(state), Some(finish)) => self.finish(sequence, state, finish),
            (Ok(state), None) => {
                self.joined = Some(state);
                self.running.push(sequence);
            }
        }
        true
    }
}

/// The next token, if there may be one, and whether the text is then complete.
pub(super) fn chosen(
    sequence: &mut Sequence,
    scores: &[f32],
) -> Result<Option<(u32, bool)>, GrammarError> {
    let sampler = &mut sequence.sampler;
    match &mut sequence.grammar {
        None => Ok(Some((sampler.choose(scores), false))),
        Some(grammar) => grammar.choose(scores, |allowed| sampler.choose(allowed)),
    }
}
