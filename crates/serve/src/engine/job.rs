//! What the engine is asked and what it answers: a job goes in with its sink, tokens come out one by one, then one end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use anyformer_data::Constraint;
use anyformer_models::SampleOptions;

/// One sequence to read and continue.
pub struct Job {
    /// The prompt; goes on after the tokens of `state` where one is named.
    pub ids: Vec<u32>,
    /// How tokens are chosen.
    pub options: SampleOptions,
    /// What is added to the scores of some tokens.
    pub bias: Arc<BTreeMap<u32, f32>>,
    /// Tokens to make at most; 0 only reads the prompt.
    pub max_tokens: usize,
    /// Tokens that end the answer and are not part of it.
    pub stop_ids: Arc<Vec<u32>>,
    /// Gives log-probabilities, with so many of the likeliest tokens.
    pub logprobs: Option<usize>,
    /// A named state to go on from.
    pub state: Option<String>,
    /// The name under which the state at the end is kept.
    pub save: Option<String>,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// What the text is held to.
    pub grammar: Option<Constraint>,
    /// Who gets the answer.
    pub sink: Box<dyn Sink>,
}

/// One token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability under the model (before temperature and cuts), where asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What a sink says to a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// More.
    On,
    /// The answer is complete (a stop string was found).
    Stop,
}

/// Where the tokens of one job go. Called on the engine's thread: it must not wait.
pub trait Sink: Send {
    /// The next token.
    fn token(&mut self, token: Token) -> Go;
    /// True when nobody listens any more; the job is then dropped.
    fn is_gone(&self) -> bool;
    /// The last call.
    fn end(self: Box<Self>, end: Result<End, JobError>);
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A stop token or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
}

/// The end of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub finish: Finish,
    /// Tokens of the prompt, those of a named state included.
    pub prompt_tokens: usize,
    /// Of these, the tokens that a kept state stood for.
    pub cached_tokens: usize,
    /// Tokens made.
    pub completion_tokens: usize,
}

/// A job that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full.
    #[error("take the request: {queued} requests are waiting, which is the limit; try again later")]
    Full {
        /// Requests that wait.
        queued: usize,
    },
    /// The engine is stopping.
    #[error("take the request: the server is stopping")]
    Closed,
    /// Nothing to read.
    #[error("take the request: the prompt has no tokens; give at least one")]
    Empty,
    /// More than the engine may hold for one sequence.
    #[error(
        "take the request: {prompt} prompt tokens and {asked} tokens to make are more than the {limit} that one sequence may have"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to make.
        asked: usize,
        /// The limit on both together.
        limit: usize,
    },
    /// An id outside the vocabulary.
    #[error("take the request: token id {id} is not below the vocabulary of {vocab}")]
    Vocabulary {
        /// The id.
        id: u32,
        /// The model's vocabulary.
        vocab: usize,
    },
    /// A sampling option out of range.
    #[error("{0}")]
    Sample(String),
    /// A name that cannot be the name of a state.
    #[error(
        "name a state {0:?}: expected 1 to 64 letters, digits, '.', '_' or '-', not beginning with '.'"
    )]
    Name(String),
}

/// A job that did not end well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// No state of that name.
    #[error("find the state {0:?}: there is none of that name")]
    NoState(String),
    /// The named state and the prompt together are too long.
    #[error("{0}")]
    TooLong(SubmitError),
    /// The time limit passed.
    #[error("answer in time: the time limit passed")]
    Timeout,
    /// The state could not be kept.
    #[error("keep the state: {0}")]
    Save(String),
    /// The server is stopping and the grace period passed.
    #[error("answer: the server is stopping")]
    Stopping,
    /// The model refused or broke.
    #[error("run the model: {0}")]
    Model(String),
}

/// A sink into a channel, for callers that want the tokens themselves.
pub struct ChannelSink {
    channel: Sender<Event>,
    gone: bool,
}

impl ChannelSink {
    /// The job ends when the receiver is dropped.
    pub fn new(channel: Sender<Event>) -> Self {
        let gone = false;
        ChannelSink { channel, gone }
    }
}

/// What a [`ChannelSink`] sends.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The next token.
    Token(Token),
    /// The end.
    End(Result<End, JobError>),
}

impl Sink for ChannelSink {
    fn token(&mut self, token: Token) -> Go {
        self.gone = self.channel.send(Event::Token(token)).is_err();
        Go::On
    }

    fn is_gone(&self) -> bool {
        self.gone
    }

    fn end(self: Box<Self>, end: Result<End, JobError>) {
        // A receiver that went away wants no end.
        let _ = self.channel.send(Event::End(end));
    }
}
