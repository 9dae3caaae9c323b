//! A language model on a text: its windows, and how well the model foresees the tokens in them.

use std::path::Path;
use std::time::Instant;

use anyformer_data::Tokenizer;
use anyformer_hub::{ModelFolder, shifted};
use anyformer_models::{Input, Model, Target};
use anyformer_ops::tensor_values;
use anyhow::Context;

use crate::exit::{Failure, Kind};

/// Tokens, window by window.
pub(crate) type Windows = Vec<Vec<u32>>;

/// The tokens of a file (UTF-8), with those that the tokenizer puts around a text.
pub(crate) fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>, Failure> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("read {}", path.display()))
        .input()?;
    tokenizer.encode_whole(&text).input()
}

/// The most tokens of a window that the model can read.
pub(crate) fn longest(opened: &ModelFolder) -> Result<usize, Failure> {
    let said = opened
        .sentence_vectors()
        .input()?
        .and_then(|said| said.tokens);
    let most = opened.config.longest();
    Ok(said.map_or(most, |said| said.min(most)))
}

/// Windows of `time` tokens; one that is left with a single token foresees nothing and is left out.
pub(crate) fn windows(ids: &[u32], time: usize) -> Windows {
    let windows = ids.chunks(time.max(2)).filter(|window| window.len() > 1);
    windows.map(<[u32]>::to_vec).collect()
}

/// Tokens that are foreseen: all of a window but the first.
pub(crate) fn tokens(rows: &Windows) -> usize {
    rows.iter().map(|row| row.len() - 1).sum()
}

/// How well.
pub(crate) struct Foreseen {
    /// Mean cross entropy of a token in nats.
    pub loss: f64,
    /// Tokens that had the highest score.
    pub correct: usize,
    /// Tokens in all.
    pub counted: usize,
    /// The time that it took.
    pub seconds: f64,
}

/// Runs the windows one by one, each from its own beginning.
pub(crate) fn foresee(model: &Model, rows: &Windows) -> Result<Foreseen, Failure> {
    let began = Instant::now();
    let (mut loss, mut correct, mut counted) = (0.0, 0, 0);
    for row in rows {
        let (ids, target) = shifted(row);
        let input = Input::Tokens { ids, batch: 1 };
        let scored = model.loss(input, None, Target::Tokens(&target)).input()?;
        loss += f64::from(tensor_values(scored.loss)[0]) * scored.counted as f64;
        correct += scored.correct;
        counted += scored.counted;
    }
    Ok(Foreseen {
        loss: loss / counted as f64,
        correct,
        counted,
        seconds: began.elapsed().as_secs_f64(),
    })
}
