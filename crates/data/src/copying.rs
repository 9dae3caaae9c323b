//! Selective copying and induction heads: the two synthetic tasks of the Mamba paper.
//!
//! Gu and Dao (2023), arXiv 2312.00752, section 4.1. Selective copying: data tokens stand at random places among noise; after
//! the last place they are to be repeated in order. Induction heads: a special token comes twice; the second time, the
//! answer is the token that followed it the first time.

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::DataError;
use crate::task::{
    MAX_TIME, Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, below, read,
};

const COPY: &str = "selective_copy";
const INDUCTION: &str = "induction_heads";
/// Held-out rows of each split.
const HELD_OUT: usize = 2000;

/// Options of selective copying.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct CopyOptions {
    /// Number of token ids: 0 is noise, the last asks for an answer.
    pub vocab: u32,
    /// Places among which the data tokens are spread.
    pub time: usize,
    /// Data tokens.
    pub tokens: usize,
}

impl Default for CopyOptions {
    fn default() -> Self {
        CopyOptions {
            vocab: 16,
            time: 4096,
            tokens: 16,
        }
    }
}

/// Options of induction heads.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct InductionOptions {
    /// Number of token ids: the last is the special one.
    pub vocab: u32,
    /// Tokens of a row.
    pub time: usize,
}

impl Default for InductionOptions {
    fn default() -> Self {
        InductionOptions {
            vocab: 16,
            time: 256,
        }
    }
}

fn spec(
    name: &str,
    description: String,
    time: usize,
    vocab: u32,
    answers: u32,
    options: serde_json::Map<String, Value>,
) -> TaskSpec {
    TaskSpec {
        name: name.into(),
        description,
        source: "Gu, Dao: Mamba (2023), arXiv 2312.00752; generated".into(),
        kind: TaskKind::NextToken,
        time,
        vocab: vocab as usize,
        classes: 0,
        floor: Some(1.0 / f64::from(answers)),
        options,
    }
}

pub(crate) fn copy_task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (CopyOptions, _) = read(COPY, options)?;
    if o.vocab < 3 || o.tokens == 0 || o.time < o.tokens || o.time > MAX_TIME {
        return Err(DataError::Option {
            task: COPY,
            message: format!(
                "expected vocab of at least 3 and a time from tokens ({}) to {MAX_TIME}, got vocab {} and time {}",
                o.tokens, o.vocab, o.time
            ),
        });
    }
    let description = format!(
        "Selective copying: {} data tokens among {} places of noise, then repeat them in order.",
        o.tokens, o.time
    );
    Ok(Box::new(Numbered {
        spec: spec(
            COPY,
            description,
            o.time + o.tokens,
            o.vocab,
            o.vocab - 2,
            resolved,
        ),
        samples: Copying(o),
        tokenizer: None,
    }))
}

pub(crate) fn induction_task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (InductionOptions, _) = read(INDUCTION, options)?;
    if o.vocab < 3 || o.time < 4 || o.time > MAX_TIME {
        return Err(DataError::Option {
            task: INDUCTION,
            message: format!(
                "expected vocab of at least 3 and time from 4 to {MAX_TIME}, got {} and {}",
                o.vocab, o.time
            ),
        });
    }
    let description = format!(
        "Induction heads: a special token comes twice in {} tokens; answer with what followed it first.",
        o.time
    );
    Ok(Box::new(Numbered {
        spec: spec(
            INDUCTION,
            description,
            o.time,
            o.vocab,
            o.vocab - 1,
            resolved,
        ),
        samples: Induction(o),
        tokenizer: None,
    }))
}

fn held_out(split: Split) -> Option<usize> {
    match split {
        Split::Train => None,
        Split::Validation | Split::Test => Some(HELD_OUT),
    }
}

struct Copying(CopyOptions);

impl Samples for Copying {
    fn count(&self, split: Split) -> Option<usize> {
        held_out(split)
    }

    fn sample(
        &self,
        _: Split,
        _: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let o = &self.0;
        let mut tokens = vec![0; o.time + o.tokens];
        let mut targets = vec![-100; tokens.len()];
        let mut places = rand::seq::index::sample(rng, o.time, o.tokens).into_vec();
        places.sort_unstable();
        for (order, place) in places.into_iter().enumerate() {
            let token = 1 + below(rng, o.vocab - 2);
            tokens[place] = token;
            tokens[o.time + order] = o.vocab - 1;
            targets[o.time + order] = i64::from(token);
        }
        Ok(Sample {
            tokens,
            target: SampleTarget::Tokens(targets),
            pixels: Vec::new(),
        })
    }
}

struct Induction(InductionOptions);

impl Samples for Induction {
    fn count(&self, split: Split) -> Option<usize> {
        held_out(split)
    }

    fn sample(
        &self,
        _: Split,
        _: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let o = &self.0;
        let special = o.vocab - 1;
        let mut tokens: Vec<u32> = (0..o.time).map(|_| below(rng, special)).collect();
        let place = below(rng, o.time as u32 - 2) as usize;
        tokens[place] = special;
        tokens[o.time - 1] = special;
        let mut targets = vec![-100; o.time];
        targets[o.time - 1] = i64::from(tokens[place + 1]);
        Ok(Sample {
            tokens,
            target: SampleTarget::Tokens(targets),
            pixels: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Targets;
    use serde_json::json;

    #[test]
    fn copies_are_the_data_tokens_in_order() {
        let task = copy_task(&json!({"time": 20, "tokens": 4})).expect("options fit");
        let batch = task
            .loader(Split::Test, 8, 0)
            .and_then(|mut loader| loader.next_batch());
        let batch = batch.expect("a batch");
        let Targets::Tokens(targets) = &batch.targets else {
            panic!("tokens")
        };
        for (row, wanted) in batch.tokens.chunks(24).zip(targets.chunks(24)) {
            let data: Vec<i64> = row[..20]
                .iter()
                .filter(|t| **t > 0)
                .map(|t| i64::from(*t))
                .collect();
            assert_eq!(data, wanted[20..]);
            assert!(row[20..].iter().all(|token| *token == 15));
        }
    }

    #[test]
    fn the_answer_followed_the_special_token() {
        assert!(induction_task(&json!({"time": 1u64 << 40})).is_err());
        assert!(copy_task(&json!({"time": 1u64 << 40})).is_err());
        let task = induction_task(&json!({"time": 16})).expect("options fit");
        let batch = task
            .loader(Split::Train, 32, 5)
            .and_then(|mut loader| loader.next_batch());
        let batch = batch.expect("a batch");
        let Targets::Tokens(targets) = &batch.targets else {
            panic!("tokens")
        };
        for (row, wanted) in batch.tokens.chunks(16).zip(targets.chunks(16)) {
            let first = row.iter().position(|token| *token == 15).expect("special");
            assert_eq!(i64::from(row[first + 1]), wanted[15]);
            assert_eq!(row[15], 15);
        }
    }
}
