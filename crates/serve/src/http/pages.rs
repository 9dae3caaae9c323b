//! Probes, metrics, the description of the API, and the chat page.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::App;
use super::error::{ApiError, ErrorBody};
use super::{embeddings, routes, types};

/// The description of the API.
#[derive(OpenApi)]
#[openapi(
    info(title = "Anyformer", description = "Serves one language model or encoder."),
    modifiers(&Keys),
    // Without keys everyone may ask.
    security((), ("key" = [])),
    paths(
        routes::models,
        routes::model,
        routes::completions,
        routes::chat,
        embeddings::embeddings,
        routes::states,
        routes::state,
        routes::save_state,
        routes::delete_state,
        routes::fork_state,
        health,
        ready,
        metrics,
    ),
    components(schemas(
        types::CompletionRequest,
        types::ChatRequest,
        ErrorBody
    ))
)]
struct Description;

/// How a key is sent.
struct Keys;

impl Modify for Keys {
    fn modify(&self, described: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = described.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
    }
}

pub(super) fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(description))
        .route("/", get(async || Redirect::to("/ui")))
        .route(
            "/ui",
            get(async || page("text/html", include_str!("../../ui/index.html"))),
        )
        .route(
            "/ui/app.js",
            get(async || page("text/javascript", include_str!("../../ui/app.js"))),
        )
        .route(
            "/ui/style.css",
            get(async || page("text/css", include_str!("../../ui/style.css"))),
        )
}

/// The process answers.
#[utoipa::path(get, path = "/health", responses(
    (status = 200, description = "It runs", body = String, content_type = "text/plain")))]
async fn health() -> &'static str {
    "ok\n"
}

/// Requests are taken.
#[utoipa::path(get, path = "/ready", responses(
    (status = 200, description = "Requests are taken", body = String, content_type = "text/plain"),
    (status = 503, description = "The server is stopping", body = ErrorBody)))]
async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    match app.is_closed() {
        false => Ok("ready\n"),
        true => Err(ApiError::stopping()),
    }
}

/// Counters and times in the text form of Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, description = "The text", body = String, content_type = "text/plain"),
    (status = 500, description = "A bug", body = ErrorBody)))]
async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app.metrics.text().map_err(|error| {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(status, "server_error", error.to_string())
    })?;
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn description() -> Response {
    axum::Json(Description::openapi()).into_response()
}

/// A file of the page, which may load nothing from elsewhere.
fn page(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, format!("{kind}; charset=utf-8")),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
                .to_string(),
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_string()),
        (header::REFERRER_POLICY, "no-referrer".to_string()),
        (header::CACHE_CONTROL, "no-cache".to_string()),
    ];
    (headers, text).into_response()
}
