//! Text that must be JSON of a certain shape: which tokens may come next, by the library llguidance.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// Spaces and line ends between the parts of a JSON text: some, not without end.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,20}";

/// Why text cannot be held to a shape.
#[derive(Debug, thiserror::Error)]
pub enum GrammarError {
    /// A tokenizer whose tokens have no bytes of their own.
    #[error("hold a text to a grammar: {0}")]
    Tokenizer(String),
    /// A schema that is not understood, or that nothing satisfies.
    #[error("read the JSON schema: {0}")]
    Schema(String),
    /// No token may come next, or one came that may not.
    #[error("hold the text to its grammar: {0}")]
    Stuck(String),
}

/// The shape of a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// Any JSON object.
    Object,
    /// JSON that a schema describes.
    Schema(Value),
}

/// The tokens of a model as bytes: what shapes are compiled for.
#[derive(Clone)]
pub struct Grammars {
    factory: Arc<ParserFactory>,
    vocab: usize,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars")
            .field("vocab", &self.vocab)
            .finish_non_exhaustive()
    }
}

impl Grammars {
    /// For a model that scores `vocab` tokens and whose texts end at one of `ends` (none: they end where the shape is
    /// complete).
    pub fn new(tokenizer: &Tokenizer, vocab: usize, ends: &[u32]) -> Result<Self, GrammarError> {
        let wrong = |error: &dyn std::fmt::Display| GrammarError::Tokenizer(error.to_string());
        let mut words = match tokenizer {
            // The byte 255 marks special tokens there, and stands in no JSON text.
            Tokenizer::Bytes => (0..=254u8).map(|byte| vec![byte]).collect(),
            Tokenizer::Bpe(_) => {
                let text = tokenizer.to_json().map_err(|error| wrong(&error))?;
                let value: Value = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
                token_bytes_from_tokenizer_json(&value).map_err(|error| wrong(&error))?
            }
        };
        // One more than the model has: the end of a model without end tokens.
        words.resize(vocab + 1, Vec::new());
        let too_long = |word: &Vec<u8>| word.len() > 200;
        for word in words.iter_mut().filter(|word| too_long(word)) {
            word.clear();
        }
        let mut ends: Vec<u32> = ends.to_vec();
        ends.retain(|end| (*end as usize) < vocab);
        // An end is no part of a text, whatever it looks like.
        for end in &ends {
            words[*end as usize].clear();
        }
        if ends.is_empty() {
            ends.push(vocab as u32);
        }
        let info = TokRxInfo::new(words.len() as u32, ends[0]);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
        let env = Arc::new(ApproximateTokEnv::new(trie)) as _;
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| wrong(&error))?;
        factory.quiet();
        Ok(Grammars {
            factory: Arc::new(factory),
            vocab,
        })
    }

    /// A text of that shape, at its beginning.
    pub fn begin(&self, shape: &Shape) -> Result<Constraint, GrammarError> {
        let mut schema = match shape {
            Shape::Object => json!({"type": "object"}),
            Shape::Schema(schema) => schema.clone(),
        };
        if let Some(map) = schema.as_object_mut() {
            let options = json!({"whitespace_pattern": WHITESPACE});
            map.insert("x-guidance".into(), options);
        }
        let parser = self
            .factory
            .create_parser(TopLevelGrammar::from_json_schema(schema))
            .map_err(|error| GrammarError::Schema(error.to_string()))?;
        let mut constraint = Constraint {
            matcher: Matcher::new(Ok(parser)),
            vocab: self.vocab,
        };
        // A schema that no text fits (one that is itself, say) shows where the first token is looked for.
        match constraint.mask(&mut vec![0.0; self.vocab]) {
            Ok(true) => Ok(constraint),
            Ok(false) => Err(GrammarError::Schema("no text fits it".into())),
            Err(GrammarError::Stuck(error)) => Err(GrammarError::Schema(format!(
                "no text fits it ({})",
                error.lines().next().unwrap_or_default()
            ))),
            Err(other) => Err(other),
        }
    }
}

/// A text that is held to a shape, so far.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    vocab: usize,
}

impl Constraint {
    /// Sets the scores of tokens that may not come next to minus infinity. `false`: the text is complete, and nothing may
    /// follow.
    pub fn mask(&mut self, scores: &mut [f32]) -> Result<bool, GrammarError> {
        if self.matcher.is_stopped() {
            return match self.matcher.get_error() {
                Some(error) => Err(GrammarError::Stuck(error)),
                None => Ok(false),
            };
        }
        let stuck = |error: &dyn std::fmt::Display| GrammarError::Stuck(error.to_string());
        let mask = self.matcher.compute_mask().map_err(|error| stuck(&error))?;
        let mut any = false;
        for (id, score) in scores.iter_mut().enumerate().take(self.vocab) {
            match mask.get(id) && !score.is_nan() {
                true => any = true,
                false => *score = f32::NEG_INFINITY,
            }
        }
        // Only the end that the model has no token for.
        Ok(any)
    }

    /// Goes on by a token that was chosen. `true`: the text is complete, and nothing may follow.
    pub fn accept(&mut self, id: u32) -> Result<bool, GrammarError> {
        self.matcher
            .consume_token(id)
            .map_err(|error| GrammarError::Stuck(error.to_string()))?;
        Ok(self.matcher.is_stopped())
    }

    /// One token: `choose` picks it by scores in which those that may not come next are minus infinity. With whether the text
    /// is then complete; `None`: it was complete before.
    pub fn choose(
        &mut self,
        scores: &[f32],
        choose: impl FnOnce(&[f32]) -> u32,
    ) -> Result<Option<(u32, bool)>, GrammarError> {
        let mut allowed = scores.to_vec();
        if !self.mask(&mut allowed)? {
            return Ok(None);
        }
        let id = choose(&allowed);
        Ok(Some((id, self.accept(id)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    const FINITE: &str = r#"{
        "type": "object", "additionalProperties": false, "required": ["name", "n", "tags", "kind"],
        "properties": {
            "name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": -20, "maximum": 300},
            "kind": {"enum": ["a", "b\"c", null]}, "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
        }
    }"#;

    fn tokenizers() -> Vec<(Tokenizer, Vec<u32>)> {
        let text =
            "{\"name\": \"value\", \"n\": 12, \"tags\": [true, false]} and more text".repeat(20);
        let bpe = Tokenizer::train_bpe(&[&text], 300).unwrap();
        vec![
            (Tokenizer::Bytes, vec![]),
            (Tokenizer::Bytes, vec![10]),
            (bpe, vec![0]),
        ]
    }

    /// Tokens drawn at random, among those that may come.
    fn drawn(
        grammars: &Grammars,
        shape: &Shape,
        ends: &[u32],
        seed: u64,
        most: usize,
    ) -> (Vec<u32>, bool) {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut constraint = grammars.begin(shape).unwrap();
        let mut ids = Vec::new();
        while ids.len() < most {
            let mut scores: Vec<f32> = (0..grammars.vocab).map(|_| random.random()).collect();
            if !constraint.mask(&mut scores).unwrap() {
                return (ids, true);
            }
            let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            let id = best.unwrap() as u32;
            let complete = constraint.accept(id).unwrap();
            if ends.contains(&id) {
                return (ids, true);
            }
            ids.push(id);
            if complete {
                return (ids, true);
            }
        }
        (ids, false)
    }

    #[test]
    fn random_tokens_held_to_a_schema_are_json_that_fits_it() {
        let shape = Shape::Schema(serde_json::from_str(FINITE).unwrap());
        for (tokenizer, ends) in tokenizers() {
            let vocab = tokenizer.vocab();
            let grammars = Grammars::new(&tokenizer, vocab, &ends).unwrap();
            for seed in 0..20 {
                let (ids, complete) = drawn(&grammars, &shape, &ends, seed, 4000);
                let text = String::from_utf8(tokenizer.decode(&ids)).unwrap();
                assert!(complete, "{text}");
                let value: Value = serde_json::from_str(&text).unwrap();
                assert!(value["name"].as_str().unwrap().chars().count() <= 8);
                // "-0" is an integer, too, and read as a float.
                let n = value["n"].as_f64().unwrap();
                assert!(n.fract() == 0.0 && (-20.0..=300.0).contains(&n), "{text}");
                assert!(
                    ["a", "b\"c"]
                        .map(|kind| json!(kind))
                        .contains(&value["kind"])
                        || value["kind"].is_null()
                );
                assert!(value["tags"].as_array().unwrap().len() <= 3);
            }
        }
    }

    #[test]
    fn an_object_begins_as_one_and_a_bad_schema_is_an_error() {
        let grammars = Grammars::new(&Tokenizer::Bytes, 256, &[]).unwrap();
        let (ids, _) = drawn(&grammars, &Shape::Object, &[], 1, 30);
        assert_eq!(ids[0], u32::from(b'{'));
        for schema in [
            json!({"type": "nonsense"}),
            json!({"type": "integer", "minimum": 3, "maximum": 2}),
            json!(7),
            json!({"$ref": "#"}),
        ] {
            let error = grammars.begin(&Shape::Schema(schema.clone())).err();
            let message = error.map(|error| error.to_string()).unwrap_or_default();
            assert!(message.starts_with("read the JSON schema"), "{schema}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
        let mut constraint = grammars.begin(&Shape::Object).unwrap();
        assert!(constraint.accept(u32::from(b'x')).is_err());
    }
}
