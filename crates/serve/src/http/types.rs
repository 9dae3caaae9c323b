//! What is asked over HTTP. Keys that this server does not know are refused, unless they ask for nothing.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::error::ApiError;

/// `/v1/completions`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// A text, token ids, or several of them.
    pub prompt: Prompt,
    /// Log-probabilities, with so many of the likeliest tokens (at most 20).
    pub logprobs: Option<usize>,
    /// What both routes share.
    #[serde(flatten)]
    pub common: Common,
}

/// `/v1/chat/completions`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// The conversation so far.
    pub messages: Vec<ChatMessage>,
    /// Gives log-probabilities.
    #[serde(default)]
    pub logprobs: Option<bool>,
    /// With so many of the likeliest tokens (at most 20).
    pub top_logprobs: Option<usize>,
    /// As `max_tokens`.
    pub max_completion_tokens: Option<usize>,
    /// What both routes share.
    #[serde(flatten)]
    pub common: Common,
}

/// What both routes share.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct Common {
    /// The model's name, as `/v1/models` gives it.
    pub model: Option<String>,
    /// Tokens to make at most.
    pub max_tokens: Option<usize>,
    /// Scores are divided by it; 0 always takes the likeliest token.
    pub temperature: Option<f32>,
    /// Only the likeliest tokens that hold this share of the probability.
    pub top_p: Option<f32>,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: Option<usize>,
    /// Only tokens with at least this share of the likeliest one's probability; 0: all.
    pub min_p: Option<f32>,
    /// Scores of tokens that the prompt or the answer holds are divided (multiplied, below 0) by it; 1: not.
    pub repetition_penalty: Option<f32>,
    /// Taken from the scores of tokens that the answer holds, -2 to 2.
    pub presence_penalty: Option<f32>,
    /// The same, once for each time that the answer holds them.
    pub frequency_penalty: Option<f32>,
    /// Added to the scores of the tokens with these ids, -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Seed of the choice.
    pub seed: Option<i64>,
    /// Answers to each prompt.
    pub n: Option<usize>,
    /// Texts that end the answer.
    pub stop: Option<Stop>,
    /// Gives the answer piece by piece, as server-sent events.
    #[serde(default)]
    pub stream: Option<bool>,
    /// What a stream holds.
    pub stream_options: Option<StreamOptions>,
    /// What the answer must be.
    pub response_format: Option<ResponseFormat>,
    /// A named state to go on from: its tokens stand before the prompt.
    pub state: Option<String>,
    /// Keeps the state at the end of the answer under this name.
    pub save_state: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: Map<String, Value>,
}

/// What an answer must be.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema {
        /// The schema.
        json_schema: NamedSchema,
    },
}

/// A JSON schema with a name.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct NamedSchema {
    /// The schema.
    #[schema(value_type = Value)]
    pub schema: Value,
}

/// What a stream holds.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// A last piece with the count of tokens.
    #[serde(default)]
    pub include_usage: bool,
}

/// One message.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// A text, or parts of type `text`.
    pub content: Content,
    /// Everything else.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: Map<String, Value>,
}

impl ChatMessage {
    /// Refuses what belongs to tools: the model would not see it.
    pub fn check_others(&self) -> Result<(), ApiError> {
        let asks = |key: &&&str| {
            self.others
                .get(**key)
                .is_some_and(|value| !is_nothing(value))
        };
        match ["tool_calls", "function_call"].iter().find(asks) {
            Some(key) => {
                let message = format!("{key:?} of a message is not supported by this server");
                Err(ApiError::param("messages", message).code("unsupported_parameter"))
            }
            None => Ok(()),
        }
    }
}

/// The content of a message.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected content that is a text or parts of type \"text\""
)]
pub enum Content {
    /// A text.
    Text(String),
    /// Parts.
    Parts(Vec<ContentPart>),
}

/// One part of a message.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ContentPart {
    /// Only `text`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    #[serde(default)]
    pub text: String,
}

impl Content {
    /// The text of all parts.
    pub fn text(self) -> Result<String, ApiError> {
        match self {
            Content::Text(text) => Ok(text),
            Content::Parts(parts) => {
                let mut text = String::new();
                for part in parts {
                    if part.kind != "text" {
                        let message =
                            format!("expected parts of type \"text\", got {:?}", part.kind);
                        return Err(ApiError::param("messages", message));
                    }
                    text.push_str(&part.text);
                }
                Ok(text)
            }
        }
    }
}

/// One or several prompts.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a text, a list of texts, token ids, or a list of lists of token ids"
)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Token ids.
    Ids(Vec<u32>),
    /// Several lists of token ids.
    Lists(Vec<Vec<u32>>),
}

/// One or several texts.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected stop to be a text or texts")]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

impl Stop {
    /// All of them.
    pub fn all(self) -> Vec<String> {
        match self {
            Stop::One(text) => vec![text],
            Stop::Several(texts) => texts,
        }
    }
}

/// Keys that say something about the caller and change no answer.
const ABOUT_THE_CALLER: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
];

impl Common {
    /// Refuses keys that ask for what this server does not do.
    pub fn check_others(&self) -> Result<(), ApiError> {
        check_others(&self.others)
    }

    /// `logit_bias` for a model of `vocab` tokens.
    pub fn bias(&self, vocab: usize) -> Result<BTreeMap<u32, f32>, ApiError> {
        let refused = |message| ApiError::param("logit_bias", message);
        let one = |(id, bias): (&String, &f32)| {
            let id: u32 = match id.parse() {
                Ok(known) if (known as usize) < vocab => known,
                _ => {
                    return Err(refused(format!(
                        "expected token ids below the vocabulary of {vocab}, got {id:?}"
                    )));
                }
            };
            match (-100.0..=100.0).contains(bias) {
                true => Ok((id, *bias)),
                false => Err(refused(format!(
                    "expected -100 to 100 for token {id}, got {bias}"
                ))),
            }
        };
        self.logit_bias.iter().flatten().map(one).collect()
    }
}

/// What asks for nothing under any key.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

/// Refuses keys that ask for what this server does not do.
pub fn check_others(others: &Map<String, Value>) -> Result<(), ApiError> {
    for (key, value) in others {
        let neutral = match (key.as_str(), value) {
            ("best_of", Value::Number(number)) => number.as_f64() == Some(1.0),
            // No tools, no choice among them.
            ("tool_choice", Value::String(word)) => word != "required",
            _ => is_nothing(value),
        };
        if !neutral && !ABOUT_THE_CALLER.contains(&key.as_str()) {
            let message = format!("{key:?} is not supported by this server");
            return Err(ApiError::param(key, message).code("unsupported_parameter"));
        }
    }
    Ok(())
}

/// `/v1/states`: reads a prompt and keeps the state after it.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StateRequest {
    /// The name to keep it under.
    pub name: String,
    /// The text to read.
    pub prompt: String,
    /// A named state to go on from.
    pub state: Option<String>,
}

/// `/v1/states/{name}/fork`: copies a state.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// The name of the copy; the state's own name rolls it back.
    pub name: String,
    /// Only the first so many tokens.
    pub tokens: Option<usize>,
}

/// `/v1/embeddings`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct EmbeddingRequest {
    /// The model's name.
    pub model: Option<String>,
    /// A text, token ids, or several of them.
    pub input: Prompt,
    /// `float` or `base64` (little-endian f32).
    pub encoding_format: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: Map<String, Value>,
}
