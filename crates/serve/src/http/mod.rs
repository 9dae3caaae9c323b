//! The HTTP side: routes that existing clients know, named states, probes, the page, and the description of it all.

mod answer;
mod body;
mod embeddings;
pub mod error;
mod logprobs;
mod pages;
mod pieces;
pub mod replies;
mod routes;
pub mod types;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyformer_data::{Grammars, Tokenizer};
use anyformer_hub::ChatTemplate;
use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};

use crate::encoder::Encoder;
use crate::engine::Engine;
use crate::metrics::Metrics;
use error::ApiError;

/// What one request may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a body.
    pub body: usize,
    /// Tokens of an answer.
    pub max_tokens: usize,
    /// From taking a request to its end.
    pub time: Option<Duration>,
    /// For a body to come.
    pub read: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body: 4 << 20,
            max_tokens: 4096,
            time: Some(Duration::from_secs(600)),
            read: Duration::from_secs(30),
        }
    }
}

/// What the model gives, and what runs it.
pub enum Served {
    /// A language model.
    Tokens(Engine),
    /// An encoder.
    Vectors(Encoder),
}

/// What every route sees.
pub struct App {
    served: Served,
    metrics: Metrics,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    stop_ids: Arc<Vec<u32>>,
    model: String,
    keys: Vec<[u8; 32]>,
    limits: Limits,
    created: u64,
    grammars: OnceLock<Result<Grammars, String>>,
}

impl App {
    /// `model` is the name that clients ask for; without a `template` conversations are written as `role: content`, a line
    /// each; `stop_ids` end an answer; without `keys` everyone may ask.
    pub fn new(
        served: Served,
        metrics: Metrics,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        stop_ids: Vec<u32>,
        model: String,
        keys: &[String],
        limits: Limits,
    ) -> Self {
        App {
            served,
            metrics,
            tokenizer: Arc::new(tokenizer),
            template,
            stop_ids: Arc::new(stop_ids),
            model,
            keys: keys.iter().map(|key| body::digest(key)).collect(),
            limits,
            created: answer::now(),
            grammars: OnceLock::new(),
        }
    }

    /// The engine, or the error of a server whose model gives vectors.
    fn engine(&self) -> Result<&Engine, ApiError> {
        match &self.served {
            Served::Tokens(engine) => Ok(engine),
            Served::Vectors(_) => Err(self.other("vectors, not tokens; ask /v1/embeddings")),
        }
    }

    /// What answers can be held to; made when it is first asked for.
    fn grammars(&self) -> Result<&Grammars, ApiError> {
        let vocab = self.engine()?.vocab();
        let make = || Grammars::new(&self.tokenizer, vocab, &self.stop_ids);
        let made = self
            .grammars
            .get_or_init(|| make().map_err(|error| error.to_string()));
        let refused =
            |error: &String| ApiError::param("response_format", format!("failed to {error}"));
        made.as_ref().map_err(refused)
    }

    fn encoder(&self) -> Result<&Encoder, ApiError> {
        match &self.served {
            Served::Tokens(_) => Err(self.other("tokens, not embeddings")),
            Served::Vectors(encoder) => Ok(encoder),
        }
    }

    fn other(&self, gives: &str) -> ApiError {
        let message = format!("the model {:?} gives {gives}", self.model);
        ApiError::param("model", message).code("model_not_supported")
    }

    fn is_closed(&self) -> bool {
        match &self.served {
            Served::Tokens(engine) => engine.is_closed(),
            Served::Vectors(encoder) => encoder.is_closed(),
        }
    }

    pub(crate) fn close(&self, abort: bool) {
        match &self.served {
            Served::Tokens(engine) => engine.close(abort),
            Served::Vectors(encoder) => encoder.close(abort),
        }
    }

    pub(crate) fn join(&self) {
        match &self.served {
            Served::Tokens(engine) => engine.join(),
            Served::Vectors(encoder) => encoder.join(),
        }
    }
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/models", get(routes::models))
        .route("/v1/models/{*model}", get(routes::model))
        .route("/v1/completions", post(routes::completions))
        .route("/v1/chat/completions", post(routes::chat))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/states", get(routes::states).post(routes::save_state))
        .route(
            "/v1/states/{name}",
            get(routes::state).delete(routes::delete_state),
        )
        .route("/v1/states/{name}/fork", post(routes::fork_state))
        .route_layer(from_fn_with_state(app.clone(), body::authorise));
    Router::new()
        .merge(guarded)
        .merge(pages::router())
        .fallback(async || {
            let status = axum::http::StatusCode::NOT_FOUND;
            let message = "there is no such route; /openapi.json lists them";
            ApiError::new(status, "invalid_request_error", message).code("unknown_url")
        })
        .method_not_allowed_fallback(async || {
            let status = axum::http::StatusCode::METHOD_NOT_ALLOWED;
            let message = "this route has other methods; /openapi.json lists them";
            ApiError::new(status, "invalid_request_error", message)
        })
        .layer(from_fn_with_state(app.clone(), counted))
        .with_state(app)
}

/// Counts answers by route and status.
async fn counted(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let route = route.as_ref().map_or("other", |path| path.as_str());
    let status = response.status();
    let requests = &app.metrics.requests;
    requests.with_label_values(&[route, status.as_str()]).inc();
    response
}
