//! What is answered over HTTP: answers are written from these types, and the description is derived from them.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::{IntoResponses, ToSchema};

use super::error::ErrorBody;
use crate::engine::job::Finish;
use crate::engine::states::StateInfo;

/// What an answer and every piece of one begin with.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Head {
    /// The same for all pieces of an answer.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: String,
}

/// `/v1/chat/completions`, whole.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// What it begins with.
    #[serde(flatten)]
    pub head: Head,
    /// What it is.
    #[schema(pattern = "^chat\\.completion$")]
    pub object: &'static str,
    /// The answers.
    pub choices: Vec<ChatChoice>,
    /// Tokens of all of them.
    pub usage: Usage,
}

/// A piece of `/v1/chat/completions`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatCompletionChunk {
    /// What it begins with.
    #[serde(flatten)]
    pub head: Head,
    /// What it is.
    #[schema(pattern = "^chat\\.completion\\.chunk$")]
    pub object: &'static str,
    /// More of one of the answers; none in the piece that tells `usage`.
    pub choices: Vec<ChatPiece>,
    /// With `stream_options.include_usage`: null, and the count in the last piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

/// `/v1/completions`, whole or a piece of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TextCompletion {
    /// What it begins with.
    #[serde(flatten)]
    pub head: Head,
    /// What it is.
    #[schema(pattern = "^text_completion$")]
    pub object: &'static str,
    /// The answers, or more of one of them; none in the piece of a stream that tells `usage`.
    pub choices: Vec<TextChoice>,
    /// Tokens of all answers. In a stream only with `stream_options.include_usage`: null, and the count in the last piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

/// The data of a server-sent event of `/v1/chat/completions`; after the last one comes `[DONE]`.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "for the description")]
pub(super) enum ChatEvent {
    /// More of the answers.
    Piece(ChatCompletionChunk),
    /// What ended them.
    Error(ErrorBody),
}

/// The data of a server-sent event of `/v1/completions`; after the last one comes `[DONE]`.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "for the description")]
pub(super) enum TextEvent {
    /// More of the answers.
    Piece(TextCompletion),
    /// What ended them.
    Error(ErrorBody),
}

/// An answer in a conversation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Which answer.
    pub index: usize,
    /// What it says.
    pub message: Answered,
    /// Where they were asked for.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: Finish,
}

/// What the model says.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Answered {
    /// Who says it.
    #[schema(pattern = "^assistant$")]
    pub role: &'static str,
    /// The text.
    pub content: String,
}

/// A piece of an answer in a conversation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatPiece {
    /// Which answer.
    pub index: usize,
    /// What comes to it.
    pub delta: Delta,
    /// Of the piece's tokens, where they were asked for.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended, in its last piece.
    #[schema(required)]
    pub finish_reason: Option<Finish>,
}

/// What comes to an answer.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    /// Who says it; in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^assistant$", nullable = false)]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub content: Option<String>,
}

/// A text that goes on, or a piece of one.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TextChoice {
    /// Which answer: those to the first prompt come first.
    pub index: usize,
    /// The text, or what comes to it.
    pub text: String,
    /// Where they were asked for.
    #[schema(required)]
    pub logprobs: Option<TextLogprobs>,
    /// Why it ended; null in a piece that is not the last.
    #[schema(required)]
    pub finish_reason: Option<Finish>,
}

/// Log-probabilities of `/v1/chat/completions`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One for each token.
    pub content: Vec<ChatToken>,
}

/// A token of an answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatToken {
    /// The token.
    #[serde(flatten)]
    pub own: TokenLogprob,
    /// The likeliest in its place, likeliest first.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token with its log-probability.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// Its text; bytes that are no whole character are shown as U+FFFD.
    pub token: String,
    /// Under the model, before temperature and cuts; null stands for minus infinity.
    #[schema(required)]
    pub logprob: Option<f64>,
    /// Its bytes.
    #[schema(value_type = Vec<u8>)]
    pub bytes: Vec<u8>,
}

/// Log-probabilities of `/v1/completions`; a place of each list for a token.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct TextLogprobs {
    /// Texts.
    pub tokens: Vec<String>,
    /// Under the model, before temperature and cuts; null stands for minus infinity.
    pub token_logprobs: Vec<Option<f64>>,
    /// The likeliest in the token's place, likeliest first.
    #[schema(value_type = Vec<std::collections::BTreeMap<String, Option<f64>>>)]
    pub top_logprobs: Vec<Map<String, Value>>,
    /// Where in the answer's text each begins, in characters.
    pub text_offset: Vec<usize>,
}

/// Tokens of an answer.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct Usage {
    /// Of the prompts.
    pub prompt_tokens: usize,
    /// Made.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Of the prompt's tokens.
    pub prompt_tokens_details: PromptDetails,
}

/// Of the prompt's tokens.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct PromptDetails {
    /// Those that a kept state stood for.
    pub cached_tokens: usize,
}

/// `/v1/embeddings`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Embeddings {
    /// What it is.
    #[schema(pattern = "^list$")]
    pub object: &'static str,
    /// The model's name.
    pub model: String,
    /// A vector for each text.
    pub data: Vec<Embedding>,
    /// Tokens of all texts.
    pub usage: EmbeddingUsage,
}

/// The vector of a text.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// What it is.
    #[schema(pattern = "^embedding$")]
    pub object: &'static str,
    /// Which text.
    pub index: usize,
    /// The vector.
    pub embedding: Vector,
}

/// A vector in the form that was asked for.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Vector {
    /// Numbers.
    Numbers(Vec<f32>),
    /// Base64 of little-endian f32.
    Brief(String),
}

/// Tokens of texts.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    /// Read.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
}

/// `/v1/models`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// What it is.
    #[schema(pattern = "^list$")]
    pub object: &'static str,
    /// The one model.
    pub data: Vec<ModelInfo>,
}

/// A model.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelInfo {
    /// Its name.
    pub id: String,
    /// What it is.
    #[schema(pattern = "^model$")]
    pub object: &'static str,
    /// When the server started, in seconds since 1970.
    pub created: u64,
    /// Who serves it.
    pub owned_by: &'static str,
}

/// The named states.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StateList {
    /// What it is.
    #[schema(pattern = "^list$")]
    pub object: &'static str,
    /// In order of their names.
    pub data: Vec<StateInfo>,
}

/// A state that was removed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Deleted {
    /// Its name.
    pub name: String,
    /// Always true.
    pub deleted: bool,
}

/// Errors of every route under `/v1`.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "a table for the description")]
pub(super) enum Errors {
    /// The request is not understood, or asks for what is not done.
    #[response(status = 400)]
    Bad(ErrorBody),
    /// The key is missing or wrong.
    #[response(status = 401)]
    Key(ErrorBody),
    /// There is no such model or state.
    #[response(status = 404)]
    Missing(ErrorBody),
    /// A bug.
    #[response(status = 500)]
    Bug(ErrorBody),
    /// The server is stopping.
    #[response(status = 503)]
    Stopping(ErrorBody),
}

/// Errors of the routes that take a body, beside [`Errors`].
#[derive(IntoResponses)]
#[expect(dead_code, reason = "a table for the description")]
pub(super) enum BodyErrors {
    /// The body did not come in time.
    #[response(status = 408)]
    Slow(ErrorBody),
    /// The body is too large.
    #[response(status = 413)]
    Large(ErrorBody),
    /// The body is not `application/json`.
    #[response(status = 415)]
    Kind(ErrorBody),
    /// Too many requests wait already.
    #[response(status = 429, headers(("retry-after" = u64, description = "Seconds")))]
    Full(ErrorBody),
    /// The time limit passed.
    #[response(status = 504)]
    Late(ErrorBody),
    /// The state could not be kept.
    #[response(status = 507)]
    NotKept(ErrorBody),
}
