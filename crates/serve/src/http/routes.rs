//! The routes under `/v1`.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::oneshot;

use anyformer_data::tokenizer::TokenizerError;
use anyformer_data::{Constraint, Shape, Tokenizer};
use anyformer_hub::Message;
use anyformer_models::SampleOptions;

use super::App;
use super::answer::{Ask, Form, respond};
use super::body::{Body, Name};
use super::error::ApiError;
use super::replies::{
    BodyErrors, ChatCompletion, ChatEvent, Deleted, Errors, ModelInfo, ModelList, StateList,
    TextCompletion, TextEvent,
};
use super::types::{
    ChatRequest, Common, CompletionRequest, ForkRequest, Prompt, ResponseFormat, StateRequest,
};
use crate::engine::job::Job;
use crate::engine::states::StateInfo;
use crate::text::{Part, TextSink};

pub(super) type Shared = State<Arc<App>>;

/// The most prompts and answers of one request.
const CHOICES: usize = 64;
/// The most log-probabilities of one token.
const LOGPROBS: usize = 20;
/// The most stop strings.
const STOPS: usize = 16;

pub(super) fn parse<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::bad(format!("failed to read the JSON of the request: {error}")))
}

/// Tokens of texts, away from the threads that serve connections.
pub(super) async fn encode(app: &Arc<App>, texts: Vec<String>) -> Result<Vec<Vec<u32>>, ApiError> {
    encode_by(app, texts, Tokenizer::encode).await
}

/// The same with the begin and end tokens that the tokenizer's file asks for.
pub(super) async fn encode_whole(
    app: &Arc<App>,
    texts: Vec<String>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    encode_by(app, texts, Tokenizer::encode_whole).await
}

async fn encode_by(
    app: &Arc<App>,
    texts: Vec<String>,
    by: fn(&Tokenizer, &str) -> Result<Vec<u32>, TokenizerError>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let tokenizer = app.tokenizer.clone();
    let encode = move || texts.iter().map(|text| by(&tokenizer, text)).collect();
    let encoded: Result<Vec<Vec<u32>>, _> = match tokio::task::spawn_blocking(encode).await {
        Ok(encoded) => encoded,
        Err(_) => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return Err(ApiError::new(
                status,
                "server_error",
                "the tokenizer panicked",
            ));
        }
    };
    encoded.map_err(|error| ApiError::bad(format!("failed to {error}")))
}

/// What an answer is held to, compiled away from the threads that serve connections.
async fn grammar(
    app: &Arc<App>,
    format: Option<ResponseFormat>,
) -> Result<Option<Constraint>, ApiError> {
    let shape = match format {
        None | Some(ResponseFormat::Text) => return Ok(None),
        Some(ResponseFormat::JsonObject) => Shape::Object,
        Some(ResponseFormat::JsonSchema { json_schema }) => Shape::Schema(json_schema.schema),
    };
    let app = app.clone();
    let begin = move || {
        let begun = app.grammars()?.begin(&shape);
        begun.map_err(|error| ApiError::param("response_format", format!("failed to {error}")))
    };
    let begun = tokio::task::spawn_blocking(begin).await;
    begun.map_err(|_| ApiError::stopping())?.map(Some)
}

pub(super) fn check_model(app: &App, asked: Option<&String>) -> Result<(), ApiError> {
    match asked {
        Some(asked) if *asked != app.model => {
            let message = format!(
                "there is no model {asked:?}; this server has {:?}",
                app.model
            );
            let status = StatusCode::NOT_FOUND;
            let mut error = ApiError::new(status, "invalid_request_error", message);
            error.detail.param = Some("model".into());
            Err(error.code("model_not_found"))
        }
        _ => Ok(()),
    }
}

/// What both routes check. `asked` is the limit on tokens that the request names, `default` the one when it names none.
async fn check(
    app: &App,
    form: Form,
    common: Common,
    prompts: Vec<Vec<u32>>,
    logprobs: Option<usize>,
    asked: Option<usize>,
) -> Result<Ask, ApiError> {
    let each = common.n.unwrap_or(1);
    if each == 0 || prompts.is_empty() || prompts.len().saturating_mul(each) > CHOICES {
        let message = format!(
            "expected 1 to {CHOICES} answers, got {} prompts with n = {each}",
            prompts.len()
        );
        return Err(ApiError::param("n", message));
    }
    if common.save_state.is_some() && prompts.len() * each > 1 {
        return Err(ApiError::param(
            "save_state",
            "expected one prompt and n = 1",
        ));
    }
    if logprobs.is_some_and(|count| count > LOGPROBS) {
        let message = format!("expected at most {LOGPROBS} log-probabilities");
        return Err(ApiError::param("logprobs", message));
    }
    let limit = app.limits.max_tokens;
    if let Some(asked) = asked.filter(|asked| *asked > limit) {
        let message = format!("expected at most {limit} tokens, got {asked}");
        return Err(ApiError::param("max_tokens", message));
    }
    let held = match &common.state {
        // Known before anything is begun, so that a stream is refused as anything else is.
        Some(name) => named(app, name).await?.tokens,
        None => 0,
    };
    let longest = held + prompts.iter().map(Vec::len).max().unwrap_or(0);
    let room = app.engine()?.context().saturating_sub(longest);
    let default = match form {
        Form::Chat => limit.min(room).max(1),
        Form::Text => 16,
    };
    let bias = common.bias(app.engine()?.vocab())?;
    let max_tokens = asked.unwrap_or(default);
    app.engine()?.fits(longest, max_tokens)?;
    let mut stops = common.stop.clone().map_or_else(Vec::new, |stop| stop.all());
    if stops.len() > STOPS {
        return Err(ApiError::param(
            "stop",
            format!("expected at most {STOPS} texts"),
        ));
    }
    if form == Form::Chat && app.template.is_none() {
        // The plain form has no token that ends an answer.
        stops.extend(["\nuser:", "\nsystem:"].map(str::to_string));
    }
    Ok(Ask {
        form,
        prompts,
        logprobs,
        bias: Arc::new(bias),
        max_tokens,
        stops,
        grammar: None,
        common,
    })
}

/// Continues texts.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest, responses(
    (status = 200, description = "The answer, or a stream of pieces", content(
        (TextCompletion = "application/json"), (TextEvent = "text/event-stream"))), Errors, BodyErrors))]
pub(super) async fn completions(
    State(app): Shared,
    Body(bytes): Body,
) -> Result<Response, ApiError> {
    let mut request: CompletionRequest = parse(&bytes)?;
    request.common.check_others()?;
    check_model(&app, request.common.model.as_ref())?;
    let texts = match request.prompt {
        Prompt::Text(text) => Ok(vec![text]),
        Prompt::Texts(texts) => Ok(texts),
        Prompt::Ids(ids) => Err(vec![ids]),
        Prompt::Lists(lists) => Err(lists),
    };
    let prompts = match (texts, &request.common.state) {
        (Err(ids), _) => ids,
        (Ok(texts), None) => encode_whole(&app, texts).await?,
        // What goes on from a state is no beginning.
        (Ok(texts), Some(_)) => encode(&app, texts).await?,
    };
    let asked = request.common.max_tokens;
    let format = request.common.response_format.take();
    let mut ask = check(
        &app,
        Form::Text,
        request.common,
        prompts,
        request.logprobs,
        asked,
    )
    .await?;
    ask.grammar = grammar(&app, format).await?;
    respond(&app, ask).await
}

/// Answers in a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, responses(
    (status = 200, description = "The answer, or a stream of pieces", content(
        (ChatCompletion = "application/json"), (ChatEvent = "text/event-stream"))), Errors, BodyErrors))]
pub(super) async fn chat(State(app): Shared, Body(bytes): Body) -> Result<Response, ApiError> {
    let mut request: ChatRequest = parse(&bytes)?;
    request.common.check_others()?;
    check_model(&app, request.common.model.as_ref())?;
    if request.messages.is_empty() {
        return Err(ApiError::param("messages", "expected at least one message"));
    }
    let logprobs = match (request.logprobs, request.top_logprobs) {
        (Some(true), count) => Some(count.unwrap_or(0)),
        (_, None | Some(0)) => None,
        _ => {
            return Err(ApiError::param(
                "top_logprobs",
                "expected logprobs = true with it",
            ));
        }
    };
    let messages: Vec<Message> = request
        .messages
        .into_iter()
        .map(|message| {
            message.check_others()?;
            Ok(Message {
                role: message.role,
                content: message.content.text()?,
            })
        })
        .collect::<Result<_, ApiError>>()?;
    let text = match &app.template {
        Some(template) => template
            .render(&messages, true)
            .map_err(|error| ApiError::param("messages", format!("failed to {error}")))?,
        None => plain(&messages),
    };
    let prompts = encode(&app, vec![text]).await?;
    let asked = request.max_completion_tokens.or(request.common.max_tokens);
    let format = request.common.response_format.take();
    let mut ask = check(&app, Form::Chat, request.common, prompts, logprobs, asked).await?;
    ask.grammar = grammar(&app, format).await?;
    respond(&app, ask).await
}

/// A conversation for a model that has no template, up to where the answer begins.
fn plain(messages: &[Message]) -> String {
    let lines = messages.iter();
    let said = lines.map(|message| format!("{}: {}\n", message.role, message.content));
    said.collect::<String>() + "assistant:"
}

fn model_info(app: &App) -> ModelInfo {
    ModelInfo {
        id: app.model.clone(),
        object: "model",
        created: app.created,
        owned_by: "anyformer",
    }
}

/// The one model of this server.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, description = "A list of one", body = ModelList), Errors))]
pub(super) async fn models(State(app): Shared) -> Json<ModelList> {
    Json(ModelList {
        object: "list",
        data: vec![model_info(&app)],
    })
}

/// A model by its name.
#[utoipa::path(get, path = "/v1/models/{model}", params(("model" = String, Path)), responses(
    (status = 200, description = "The model", body = ModelInfo), Errors))]
pub(super) async fn model(
    State(app): Shared,
    Name(asked): Name,
) -> Result<Json<ModelInfo>, ApiError> {
    check_model(&app, Some(&asked))?;
    Ok(Json(model_info(&app)))
}

/// Waits for what the engine says about states.
async fn answered<T>(receiver: oneshot::Receiver<T>) -> Result<T, ApiError> {
    receiver.await.map_err(|_| ApiError::stopping())
}

fn no_state(name: &str) -> ApiError {
    crate::engine::job::JobError::NoState(name.to_string()).into()
}

fn not_kept(message: String) -> ApiError {
    crate::engine::job::JobError::Save(message).into()
}

async fn list(app: &App) -> Result<Vec<StateInfo>, ApiError> {
    let (give, take) = oneshot::channel();
    app.engine()?.list_states(move |all| {
        // Who asked may have gone.
        let _ = give.send(all);
    });
    answered(take).await
}

async fn named(app: &App, name: &str) -> Result<StateInfo, ApiError> {
    let found = list(app)
        .await?
        .into_iter()
        .find(|state| state.name == name);
    found.ok_or_else(|| no_state(name))
}

/// The named states.
#[utoipa::path(get, path = "/v1/states", responses(
    (status = 200, description = "All of them", body = StateList), Errors))]
pub(super) async fn states(State(app): Shared) -> Result<Json<StateList>, ApiError> {
    Ok(Json(StateList {
        object: "list",
        data: list(&app).await?,
    }))
}

/// A named state.
#[utoipa::path(get, path = "/v1/states/{name}", params(("name" = String, Path)), responses(
    (status = 200, description = "The state", body = StateInfo), Errors))]
pub(super) async fn state(
    State(app): Shared,
    Name(name): Name,
) -> Result<Json<StateInfo>, ApiError> {
    named(&app, &name).await.map(Json)
}

/// Reads a prompt and keeps the state after it under a name.
#[utoipa::path(post, path = "/v1/states", request_body = StateRequest, responses(
    (status = 200, description = "The state that was made", body = StateInfo), Errors, BodyErrors))]
pub(super) async fn save_state(
    State(app): Shared,
    Body(bytes): Body,
) -> Result<Json<StateInfo>, ApiError> {
    let request: StateRequest = parse(&bytes)?;
    let texts = vec![request.prompt];
    let ids = match request.state {
        None => encode_whole(&app, texts).await?.concat(),
        Some(_) => encode(&app, texts).await?.concat(),
    };
    let (channel, mut receiver) = unbounded_channel();
    app.engine()?.submit(Job {
        ids,
        options: SampleOptions::default(),
        bias: Arc::default(),
        max_tokens: 0,
        stop_ids: app.stop_ids.clone(),
        logprobs: None,
        state: request.state,
        save: Some(request.name.clone()),
        deadline: None,
        grammar: None,
        sink: Box::new(TextSink::new(0, app.tokenizer.clone(), Vec::new(), channel)),
    })?;
    loop {
        match receiver.recv().await {
            Some((_, Part::End(_, end))) => {
                end?;
                break;
            }
            Some(_) => {}
            None => return Err(ApiError::stopping()),
        }
    }
    named(&app, &request.name).await.map(Json)
}

/// Removes a named state.
#[utoipa::path(delete, path = "/v1/states/{name}", params(("name" = String, Path)), responses(
    (status = 200, description = "It is gone", body = Deleted), Errors))]
pub(super) async fn delete_state(
    State(app): Shared,
    Name(name): Name,
) -> Result<Json<Deleted>, ApiError> {
    let (give, take) = oneshot::channel();
    app.engine()?.delete_state(name.clone(), move |deleted| {
        let _ = give.send(deleted);
    });
    match answered(take).await?.map_err(not_kept)? {
        true => Ok(Json(Deleted {
            name,
            deleted: true,
        })),
        false => Err(no_state(&name)),
    }
}

/// Copies a named state, or its first tokens; under its own name, rolls it back.
#[utoipa::path(post, path = "/v1/states/{name}/fork", params(("name" = String, Path)), request_body = ForkRequest,
    responses((status = 200, description = "The copy", body = StateInfo), Errors, BodyErrors))]
pub(super) async fn fork_state(
    State(app): Shared,
    Name(name): Name,
    Body(bytes): Body,
) -> Result<Json<StateInfo>, ApiError> {
    let request: ForkRequest = parse(&bytes)?;
    let (give, take) = oneshot::channel();
    let (from, to) = (name.clone(), request.name);
    app.engine()?
        .fork_state(from, to, request.tokens, move |made| {
            let _ = give.send(made);
        })?;
    let made = answered(take).await?;
    let made = made.map_err(|message| ApiError::bad(format!("failed to fork: {message}")))?;
    made.map(Json).ok_or_else(|| no_state(&name))
}
