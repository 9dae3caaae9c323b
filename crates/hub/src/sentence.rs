//! Folders of sentence-transformers: an encoder with `modules.json` beside it, which says how a text's vector is made of the
//! encoder's hidden vectors.

use std::collections::BTreeMap;

use anyformer_models::Pool;
use serde_json::Value;

use crate::error::{Damage, HubError};
use crate::model::ModelFolder;

const MODULES_FILE: &str = "modules.json";
const LIMITS_FILE: &str = "sentence_bert_config.json";
/// Versions and prompts, which change no vector here.
const FACTS_FILE: &str = "config_sentence_transformers.json";

/// How a text's vector is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentenceVectors {
    /// What is read off the hidden vectors.
    pub pool: Pool,
    /// Whether the vector is brought to length 1.
    pub unit: bool,
    /// The most tokens of a text, begin and end counted, where the folder says it: there the reference cuts a text off.
    pub tokens: Option<usize>,
}

/// The keys of a pooling's config, and ours; what is not here cannot be computed.
const POOLS: &[(&str, &str, Pool)] = &[
    ("pooling_mode_cls_token", "cls", Pool::First),
    ("pooling_mode_mean_tokens", "mean", Pool::Mean),
    ("pooling_mode_max_tokens", "max", Pool::Max),
    ("pooling_mode_lasttoken", "lasttoken", Pool::Last),
];

impl ModelFolder {
    /// What `modules.json` says; `None` where there is none. A module that is not computed here is refused by its name.
    pub fn sentence_vectors(&self) -> Result<Option<SentenceVectors>, HubError> {
        let Some(modules) = self.json(MODULES_FILE)? else {
            return Ok(None);
        };
        let wrong = |file: &str, message: String| {
            HubError::damaged(&self.path.join(file), Damage::Text(message))
        };
        let modules = modules
            .as_array()
            .ok_or_else(|| wrong(MODULES_FILE, "should be a list of modules".into()))?;
        let (mut pool, mut unit) = (None, false);
        for (index, module) in modules.iter().enumerate() {
            let path = module["path"].as_str().unwrap_or_default();
            let kind = module["type"].as_str().unwrap_or_default();
            match (index, kind.rsplit('.').next().unwrap_or_default()) {
                (0, "Transformer") if path.is_empty() => {}
                (1, "Pooling") if is_below(path) => {
                    let file = format!("{path}/config.json");
                    let config = self.json(&file)?;
                    let config = config.ok_or_else(|| {
                        wrong(MODULES_FILE, format!("names {file}, which is not there"))
                    })?;
                    pool = Some(pooling(&config).map_err(|message| wrong(&file, message))?);
                }
                (2, "Normalize") => unit = true,
                _ => {
                    let message = format!(
                        "module {index} is {kind:?} at {path:?}; a Transformer at the top, a Pooling and a Normalize can be read, in that order"
                    );
                    return Err(wrong(MODULES_FILE, message));
                }
            }
        }
        let pool = pool.ok_or_else(|| wrong(MODULES_FILE, "has no Pooling".into()))?;
        let limits = self.json(LIMITS_FILE)?.unwrap_or_default();
        if limits["do_lower_case"] == Value::Bool(true) {
            let message = "do_lower_case is true; only a tokenizer that does so itself can be read";
            return Err(wrong(LIMITS_FILE, message.into()));
        }
        let tokens = limits["max_seq_length"].as_u64();
        Ok(Some(SentenceVectors {
            pool,
            unit,
            tokens: tokens.and_then(|tokens| usize::try_from(tokens).ok()),
        }))
    }

    /// What a text's vector is read off: as `modules.json` says, else as the model's own head does, else the mean.
    pub fn pool(&self) -> Result<Pool, HubError> {
        let said = self.sentence_vectors()?;
        Ok(said.map_or_else(|| self.config.gives.pool(), |said| said.pool))
    }

    /// The files that make a folder one of sentence-transformers, with their texts; empty where it is none.
    pub(crate) fn sentence_files(&self) -> Result<BTreeMap<String, String>, HubError> {
        let mut texts = BTreeMap::new();
        if self.sentence_vectors()?.is_none() {
            return Ok(texts);
        }
        let modules = self.json(MODULES_FILE)?.unwrap_or_default();
        let below = modules.as_array().into_iter().flatten();
        let below = below.filter_map(|module| module["path"].as_str());
        let configs = below
            .filter(|path| is_below(path))
            .map(|path| format!("{path}/config.json"));
        let own = [MODULES_FILE, LIMITS_FILE, FACTS_FILE].map(String::from);
        for name in own.into_iter().chain(configs) {
            if let Some(text) = self.text(&name)? {
                texts.insert(name, text);
            }
        }
        Ok(texts)
    }

    fn json(&self, name: &str) -> Result<Option<Value>, HubError> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        let value = serde_json::from_str(&text).map_err(|error| {
            let message = format!("not JSON: {error}");
            HubError::damaged(&self.path.join(name), Damage::Text(message))
        })?;
        Ok(Some(value))
    }
}

/// Whether a path names a folder below the model's own.
fn is_below(path: &str) -> bool {
    !path.is_empty() && !path.contains(['/', '\\']) && path != ".." && path != "."
}

/// The one way of pooling that a config asks for.
fn pooling(config: &Value) -> Result<Pool, String> {
    let known: Vec<&str> = POOLS.iter().map(|(_, word, _)| *word).collect();
    let known = known.join(", ");
    if let Some(mode) = config.get("pooling_mode").filter(|mode| !mode.is_null()) {
        let found = POOLS.iter().find(|(_, word, _)| mode == word);
        return found
            .map(|(_, _, pool)| *pool)
            .ok_or_else(|| format!("pooling_mode is {mode}; {known} can be read"));
    }
    let on: Vec<&str> = config
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| key.starts_with("pooling_mode") && **value == Value::Bool(true))
        .map(|(key, _)| key.as_str())
        .collect();
    let found = match on[..] {
        [only] => POOLS.iter().find(|(key, _, _)| *key == only),
        _ => None,
    };
    found
        .map(|(_, _, pool)| *pool)
        .ok_or_else(|| format!("asks for {on:?}; one of {known} can be read"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn one_way_of_pooling_is_read_and_others_are_named() {
        let of = |config: Value| pooling(&config);
        let mean = json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false});
        assert_eq!(of(mean), Ok(Pool::Mean));
        assert_eq!(of(json!({"pooling_mode": "cls"})), Ok(Pool::First));
        assert_eq!(of(json!({"pooling_mode": "max"})), Ok(Pool::Max));
        for (config, part) in [
            (json!({"pooling_mode": "weightedmean"}), "weightedmean"),
            (json!({"pooling_mode_mean_sqrt_len_tokens": true}), "sqrt"),
            (
                json!({"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}),
                "max",
            ),
            (json!({}), "one of"),
            (json!(3), "one of"),
        ] {
            let error = of(config).expect_err("refused");
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(is_below("1_Pooling") && !is_below("..") && !is_below("../x") && !is_below(""));
    }
}
