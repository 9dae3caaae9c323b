//! What a model folder holds beside the config and the weights.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::chat::{ChatTemplate, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE};
use crate::error::HubError;
use crate::model::{GENERATION_FILE, ModelFolder};
use crate::quantised::Quantisation;

/// What goes into a model folder beside the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extra {
    /// The text of `tokenizer.json`.
    pub tokenizer: Option<String>,
    /// Facts for readers, under "info" in `config.json`: task, step, score.
    pub info: Map<String, Value>,
    /// How weights were quantised; those that are packed are then written so, else as f32.
    pub quantisation: Option<Quantisation>,
    /// More keys of `config.json`.
    pub keys: Map<String, Value>,
    /// More files and their texts, by their paths in the folder.
    pub texts: BTreeMap<String, String>,
}

impl Extra {
    /// What a folder made of another carries along: tokenizer, facts, special tokens, the defaults of generation, the chat
    /// template, and how sentence vectors are made.
    pub fn of(source: &ModelFolder) -> Result<Self, HubError> {
        let mut extra = Extra {
            tokenizer: source.tokenizer()?,
            info: source.info.clone(),
            ..Extra::default()
        };
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(id) = source.raw.get(key) {
                extra.keys.insert(key.into(), id.clone());
            }
        }
        for name in [GENERATION_FILE, TOKENIZER_CONFIG_FILE] {
            if let Some(text) = source.text(name)? {
                extra.texts.insert(name.into(), text);
            }
        }
        extra.texts.extend(source.sentence_files()?);
        if let Some(template) = ChatTemplate::of(source)? {
            let text = template.source().to_string();
            extra.texts.insert(TEMPLATE_FILE.into(), text);
            let tokens = template.tokens();
            let config = json!({"bos_token": tokens[0], "eos_token": tokens[1]});
            let config = format!("{config:#}\n");
            let texts = extra.texts.entry(TOKENIZER_CONFIG_FILE.into());
            texts.or_insert(config);
        }
        Ok(extra)
    }
}
