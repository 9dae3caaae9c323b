//! Tokens that are guessed before they are chosen, and what a grammar leaves to choose from.

use anyformer_data::GrammarError;
use anyformer_models::speculate::{Pass, lookup};

use super::{Sequence, Worker};

impl Worker {
    /// Guesses ahead for the sequences that repeat themselves, in one pass with a token of each of the others, and keeps what is
    /// then chosen. `false`: there is nothing to guess.
    pub(super) fn decode_ahead(&mut self) -> bool {
        let Some(joined) = &self.joined else {
            return false;
        };
        let count = self.running.len();
        let mut left = MOST_ROWS.saturating_sub(count);
        let piece = |sequence: &Sequence| {
            let room = sequence.max_tokens.saturating_sub(sequence.made + 1);
            let guess = lookup(&sequence.ids, self.config.speculate.min(room).min(left));
            left -= guess.len();
            [&sequence.ids[sequence.ids.len() - 1..], guess].concat()
        };
        let pieces: Vec<Vec<u32>> = self.running.iter().map(piece).collect();
        let guessed = pieces.iter().map(Vec::len).sum::<usize>() - count;
        if guessed == 0 {
            return false;
        }
        self.metrics.batch_size.observe(count as f64);
        self.metrics.guessed_tokens.inc_by(guessed as u64);
        let pass = match Pass::run(&self.model, pieces, joined) {
            Ok(pass) => pass,
            Err(error) => {
                self.fail_running(&error);
                return true;
            }
        };
        let mut running = std::mem::take(&mut self.running);
        let mut used = vec![0; count];
        let mut finishes = Vec::with_capacity(count);
        for (index, sequence) in running.iter_mut().enumerate() {
            finishes.push(loop {
                let finish = self.choose(sequence, pass.scores(index, used[index]));
                used[index] += 1;
                if finish.is_some() || pass.ids(index).get(used[index]) != sequence.ids.last() {
                    break finish;
                }
                self.metrics.accepted_tokens.inc();
            });
        }
        self.running = running;
        match pass.state(&self.model, &used) {
            Ok(state) => {
                self.joined = Some(state);
                self.leave(finishes);
            }
            Err(error) => self.fail_running(&error),
        }
        true
    }
}

/// Rows of a pass with guesses: beyond, packed weights are no longer read as they are, and a guess costs as much as a token.
const MOST_ROWS: usize = 32;

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
