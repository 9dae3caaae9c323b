//! From a checked request to jobs, and from their tokens to one answer or a stream of pieces.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyformer_data::Constraint;
use anyformer_models::SampleOptions;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::StatusCode};
use futures_core::Stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::App;
use super::error::ApiError;
use super::types::{Common, Usage};
use crate::engine::job::{End, Finish, Job, Token};
use crate::text::{Part, TextSink};

/// A stream that has nothing to say for so long sends a comment, which finds out clients that are gone.
const SILENCE: Duration = Duration::from_secs(1);

/// Which of the two forms the answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Chat,
    Text,
}

impl Form {
    fn object(self, piece: bool) -> &'static str {
        match (self, piece) {
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Text, _) => "text_completion",
        }
    }
}

/// A checked request.
pub(super) struct Ask {
    pub form: Form,
    pub prompts: Vec<Vec<u32>>,
    pub logprobs: Option<usize>,
    pub common: Common,
    pub max_tokens: usize,
    pub stops: Vec<String>,
    pub grammar: Option<Constraint>,
}

/// What every piece of one answer begins with.
#[derive(Clone)]
struct Header {
    id: String,
    created: u64,
    model: String,
    form: Form,
}

impl Header {
    fn envelope(&self, piece: bool, choices: Value) -> Value {
        json!({
            "id": self.id, "object": self.form.object(piece), "created": self.created,
            "model": self.model, "choices": choices,
        })
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

/// Puts the jobs into the engine and gives the response.
pub(super) async fn respond(app: &Arc<App>, ask: Ask) -> Result<Response, ApiError> {
    let receiver = start(app, &ask)?;
    let prefix = match ask.form {
        Form::Chat => "chatcmpl",
        Form::Text => "cmpl",
    };
    let header = Header {
        id: format!("{prefix}-{:016x}", rand::random::<u64>()),
        created: now(),
        model: app.model.clone(),
        form: ask.form,
    };
    let each = ask.common.n.unwrap_or(1);
    let count = ask.prompts.len() * each;
    if ask.common.stream == Some(true) {
        let usage = ask
            .common
            .stream_options
            .is_some_and(|options| options.include_usage);
        let pieces = Pieces {
            app: app.clone(),
            header,
            receiver,
            queue: VecDeque::new(),
            begun: vec![false; count],
            offsets: vec![0; count],
            left: count,
            each,
            usage: Usage::default(),
            include_usage: usage,
            done: false,
        };
        return Ok(Sse::new(pieces)
            .keep_alive(KeepAlive::new().interval(SILENCE))
            .into_response());
    }
    whole(app, header, receiver, count, each).await
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
                    seed: seed.wrapping_add(index as u64),
                },
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

fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

fn count(usage: &mut Usage, index: usize, each: usize, end: &End) {
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
    tokens: Vec<(Token, usize)>,
    end: Option<End>,
}

async fn whole(
    app: &App,
    header: Header,
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
                answer.tokens.push((token, answer.text.len()));
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
    let choices = answers.into_iter().enumerate().map(|(index, answer)| {
        let logprobs = logprobs(app, header.form, &answer.tokens);
        let finish = answer.end.map(|end| reason(end.finish));
        match header.form {
            Form::Chat => json!({
                "index": index, "message": {"role": "assistant", "content": answer.text},
                "logprobs": logprobs, "finish_reason": finish,
            }),
            Form::Text => json!({
                "index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": finish,
            }),
        }
    });
    let mut value = header.envelope(false, choices.collect());
    value["usage"] = json!(usage);
    Ok(Json(value).into_response())
}

/// The engine went away without an end: a bug, told as one.
fn lost() -> ApiError {
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    ApiError::new(status, "server_error", "the answer was lost; this is a bug")
}

/// Log-probabilities in the form of the route; null where they were not asked for.
fn logprobs(app: &App, form: Form, tokens: &[(Token, usize)]) -> Value {
    if tokens.iter().all(|(token, _)| token.logprob.is_none()) {
        return Value::Null;
    }
    let bytes = |id: u32| app.tokenizer.decode(&[id]);
    let text = |id: u32| String::from_utf8_lossy(&bytes(id)).into_owned();
    match form {
        Form::Chat => {
            let one = |id: u32, logprob: Option<f32>| json!({"token": text(id), "logprob": logprob, "bytes": bytes(id)});
            let content = tokens.iter().map(|(token, _)| {
                let mut value = one(token.id, token.logprob);
                let top = token
                    .top
                    .iter()
                    .map(|(id, logprob)| one(*id, Some(*logprob)));
                value["top_logprobs"] = top.collect();
                value
            });
            json!({"content": content.collect::<Value>()})
        }
        Form::Text => {
            let top = |token: &Token| -> Value {
                let top = token
                    .top
                    .iter()
                    .map(|(id, logprob)| (text(*id), json!(logprob)));
                Value::Object(top.collect())
            };
            json!({
                "tokens": tokens.iter().map(|(token, _)| text(token.id)).collect::<Vec<_>>(),
                "token_logprobs": tokens.iter().map(|(token, _)| token.logprob).collect::<Vec<_>>(),
                "top_logprobs": tokens.iter().map(|(token, _)| top(token)).collect::<Vec<_>>(),
                "text_offset": tokens.iter().map(|(_, at)| at).collect::<Vec<_>>(),
            })
        }
    }
}

/// The stream: a piece for every text, one with the reason of the end, the usage where asked for, and `[DONE]`.
struct Pieces {
    app: Arc<App>,
    header: Header,
    receiver: UnboundedReceiver<(usize, Part)>,
    queue: VecDeque<String>,
    begun: Vec<bool>,
    offsets: Vec<usize>,
    left: usize,
    each: usize,
    usage: Usage,
    include_usage: bool,
    done: bool,
}

impl Pieces {
    fn piece(&mut self, index: usize, text: &str, logprobs: Value, finish: Option<&str>) {
        let choice = match self.header.form {
            Form::Text => json!({
                "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish,
            }),
            Form::Chat => {
                let mut delta = json!({});
                if !self.begun[index] {
                    delta = json!({"role": "assistant", "content": ""});
                }
                if !text.is_empty() {
                    delta["content"] = json!(text);
                }
                json!({
                    "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish,
                })
            }
        };
        self.begun[index] = true;
        let mut value = self.header.envelope(true, json!([choice]));
        if self.include_usage {
            value["usage"] = Value::Null;
        }
        self.queue.push_back(value.to_string());
    }

    fn part(&mut self, index: usize, part: Part) {
        match part {
            Part::Text(text, token) => {
                let at = self.offsets[index];
                self.offsets[index] += text.len();
                let logprobs = logprobs(&self.app, self.header.form, &[(token, at)]);
                if !text.is_empty() || !logprobs.is_null() || !self.begun[index] {
                    self.piece(index, &text, logprobs, None);
                }
            }
            Part::End(text, Ok(end)) => {
                count(&mut self.usage, index, self.each, &end);
                if !text.is_empty() {
                    self.piece(index, &text, Value::Null, None);
                }
                self.piece(index, "", Value::Null, Some(reason(end.finish)));
                self.left -= 1;
                if self.left == 0 {
                    if self.include_usage {
                        let mut value = self.header.envelope(true, json!([]));
                        value["usage"] = json!(self.usage);
                        self.queue.push_back(value.to_string());
                    }
                    self.close();
                }
            }
            Part::End(_, Err(error)) => self.fail(&error.into()),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.queue.push_back(json!(error.body()).to_string());
        self.close();
    }

    fn close(&mut self) {
        self.queue.push_back("[DONE]".into());
        self.done = true;
        self.receiver.close();
    }
}

impl Stream for Pieces {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(text) = self.queue.pop_front() {
                return Poll::Ready(Some(Ok(Event::default().data(text))));
            }
            if self.done {
                return Poll::Ready(None);
            }
            match self.receiver.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some((index, part))) => self.part(index, part),
                Poll::Ready(None) => self.fail(&lost()),
            }
        }
    }
}
