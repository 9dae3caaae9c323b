//! From a checked request to jobs, and from their tokens to one answer or a stream of pieces.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyformer_data::Constraint;
use anyformer_models::SampleOptions;
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::StatusCode};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use super::App;
use super::error::ApiError;
use super::logprobs::{Placed, of_chat, of_text};
use super::pieces::Pieces;
use super::replies::{
    Answered, ChatChoice, ChatCompletion, Head, TextChoice, TextCompletion, Usage,
};
use super::types::Common;
use crate::engine::job::{End, Job};
use crate::text::{Part, TextSink};

/// A stream that has nothing to say for so long sends a comment, which finds out clients that are gone.
const SILENCE: Duration = Duration::from_secs(1);

/// Which of the two forms the answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Chat,
    Text,
}

/// What `/v1/completions` gives, whole or in pieces.
pub(super) const TEXT: &str = "text_completion";
/// Who answers.
pub(super) const ASSISTANT: &str = "assistant";

/// A checked request.
pub(super) struct Ask {
    pub form: Form,
    pub prompts: Vec<Vec<u32>>,
    pub logprobs: Option<usize>,
    pub bias: Arc<BTreeMap<u32, f32>>,
    pub common: Common,
    pub max_tokens: usize,
    pub stops: Vec<String>,
    pub grammar: Option<Constraint>,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

/// Puts the jobs into the engine and gives the response.
pub(super) async fn respond(app: &Arc<App>, ask: Ask) -> Result<Response, ApiError> {
    let mut receiver = start(app, &ask)?;
    let prefix = match ask.form {
        Form::Chat => "chatcmpl",
        Form::Text => "cmpl",
    };
    let head = Head {
        id: format!("{prefix}-{:016x}", rand::random::<u64>()),
        created: now(),
        model: app.model.clone(),
    };
    let each = ask.common.n.unwrap_or(1);
    let count = ask.prompts.len() * each;
    if ask.common.stream != Some(true) {
        return whole(app, head, ask.form, receiver, count, each).await;
    }
    // A stream that has begun has told its status. What comes at once may still be an error with a status of its own; a client
    // whose answer takes longer has to be told that it is on its way.
    let first = match timeout(SILENCE, receiver.recv()).await {
        Ok(None) => return Err(lost()),
        Ok(Some((_, Part::End(_, Err(error))))) => return Err(error.into()),
        Ok(first) => first,
        Err(_) => None,
    };
    let options = ask.common.stream_options;
    let usage = options.is_some_and(|options| options.include_usage);
    let mut pieces = Pieces::new(app.clone(), head, ask.form, receiver, count, each, usage);
    if let Some((index, part)) = first {
        pieces.part(index, part);
    }
    let silence = KeepAlive::new().interval(SILENCE);
    Ok(Sse::new(pieces).keep_alive(silence).into_response())
}

fn start(app: &Arc<App>, ask: &Ask) -> Result<UnboundedReceiver<(usize, Part)>, ApiError> {
    let (channel, receiver) = unbounded_channel();
    let common = &ask.common;
    let seed = common.seed.map_or_else(rand::random, |seed| seed as u64);
    let defaults = SampleOptions::default();
    let each = common.n.unwrap_or(1);
    let deadline = app
        .limits
        .time
        .and_then(|time| Instant::now().checked_add(time));
    let mut jobs = Vec::new();
    for (index, prompt) in ask.prompts.iter().enumerate() {
        for choice in 0..each {
            let index = index * each + choice;
            let stops = ask.stops.clone();
            let sink = TextSink::new(index, app.tokenizer.clone(), stops, channel.clone());
            jobs.push(Job {
                ids: prompt.clone(),
                options: SampleOptions {
                    temperature: common.temperature.unwrap_or(defaults.temperature),
                    top_p: common.top_p.unwrap_or(defaults.top_p),
                    top_k: common.top_k.unwrap_or(defaults.top_k),
                    min_p: common.min_p.unwrap_or(defaults.min_p),
                    repetition_penalty: common
                        .repetition_penalty
                        .unwrap_or(defaults.repetition_penalty),
                    presence_penalty: common.presence_penalty.unwrap_or(defaults.presence_penalty),
                    frequency_penalty: common
                        .frequency_penalty
                        .unwrap_or(defaults.frequency_penalty),
                    seed: seed.wrapping_add(index as u64),
                },
                bias: ask.bias.clone(),
                max_tokens: ask.max_tokens,
                stop_ids: app.stop_ids.clone(),
                logprobs: ask.logprobs,
                state: common.state.clone(),
                save: common.save_state.clone(),
                grammar: ask.grammar.clone(),
                deadline,
                sink: Box::new(sink),
            });
        }
    }
    app.engine()?.submit_all(jobs)?;
    Ok(receiver)
}

pub(super) fn count(usage: &mut Usage, index: usize, each: usize, end: &End) {
    // A prompt with several answers is counted once.
    if index.is_multiple_of(each) {
        usage.prompt_tokens += end.prompt_tokens;
        usage.prompt_tokens_details.cached_tokens += end.cached_tokens;
    }
    usage.completion_tokens += end.completion_tokens;
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens;
}

/// One answer while it grows.
#[derive(Default)]
struct Growing {
    text: String,
    characters: usize,
    tokens: Vec<Placed>,
    end: Option<End>,
}

async fn whole(
    app: &App,
    head: Head,
    form: Form,
    mut receiver: UnboundedReceiver<(usize, Part)>,
    choices: usize,
    each: usize,
) -> Result<Response, ApiError> {
    let mut answers: Vec<Growing> = (0..choices).map(|_| Growing::default()).collect();
    let mut usage = Usage::default();
    let mut left = choices;
    while left > 0 {
        let Some((index, part)) = receiver.recv().await else {
            return Err(lost());
        };
        let answer = &mut answers[index];
        match part {
            Part::Text(text, token) => {
                answer.tokens.push((token, answer.characters));
                answer.characters += text.chars().count();
                answer.text.push_str(&text);
            }
            Part::End(text, end) => {
                let end = end?;
                answer.text.push_str(&text);
                count(&mut usage, index, each, &end);
                answer.end = Some(end);
                left -= 1;
            }
        }
    }
    // All have ended: the loop waited for it.
    let ended = answers
        .into_iter()
        .enumerate()
        .filter_map(|(index, answer)| {
            let finish = answer.end?.finish;
            Some((index, answer.text, answer.tokens, finish))
        });
    Ok(match form {
        Form::Chat => {
            let choices = ended.map(|(index, content, tokens, finish_reason)| ChatChoice {
                index,
                message: Answered {
                    role: ASSISTANT,
                    content,
                },
                logprobs: of_chat(app, &tokens),
                finish_reason,
            });
            Json(ChatCompletion {
                head,
                object: "chat.completion",
                choices: choices.collect(),
                usage,
            })
            .into_response()
        }
        Form::Text => {
            let choices = ended.map(|(index, text, tokens, finish)| TextChoice {
                index,
                text,
                logprobs: of_text(app, &tokens),
                finish_reason: Some(finish),
            });
            Json(TextCompletion {
                head,
                object: TEXT,
                choices: choices.collect(),
                usage: Some(Some(usage)),
            })
            .into_response()
        }
    })
}

/// The engine went away without an end: a bug, told as one.
pub(super) fn lost() -> ApiError {
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    ApiError::new(status, "server_error", "the answer was lost; this is a bug")
}
