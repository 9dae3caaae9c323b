//! The body of a request: JSON, within the limit of bytes and of time. And who may ask.

use std::sync::Arc;

use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::App;
use super::error::ApiError;
use crate::probe::{Progress, Stage};

/// The bytes of a JSON body.
pub(super) struct Body(pub Bytes);

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let headers = request.headers();
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        // A page of another site can send forms and plain text without asking; it cannot send this.
        let kind = text(header::CONTENT_TYPE).unwrap_or_default();
        if kind.split(';').next().map(str::trim) != Some("application/json") {
            let message = format!("expected content-type application/json, got {kind:?}");
            let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return Err(ApiError::new(status, "invalid_request_error", message));
        }
        let limit = app.limits.body;
        let too_large = || {
            let message = format!("the body is larger than the {limit} bytes that are taken");
            let status = StatusCode::PAYLOAD_TOO_LARGE;
            ApiError::new(status, "invalid_request_error", message).code("body_too_large")
        };
        let claimed = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
        if claimed.is_some_and(|length| length > limit as u64) {
            return Err(too_large());
        }
        let progress = request.extensions().get::<Progress>().cloned();
        let read_whole = match request.version() {
            Version::HTTP_10 => Stage::Quiet,
            _ => Stage::Working,
        };
        let read = to_bytes(request.into_body(), limit);
        match tokio::time::timeout(app.limits.read, read).await {
            Ok(Ok(bytes)) => {
                if let Some(progress) = progress {
                    progress.set(read_whole);
                }
                Ok(Body(bytes))
            }
            Ok(Err(error)) if is_limit(&error) => Err(too_large()),
            Ok(Err(error)) => Err(ApiError::bad(format!("failed to read the body: {error}"))),
            Err(_) => {
                let status = StatusCode::REQUEST_TIMEOUT;
                let message = "the body did not come in time";
                Err(ApiError::new(status, "invalid_request_error", message))
            }
        }
    }
}

/// A name in the path of a request.
pub(super) struct Name(pub String);

impl FromRequestParts<Arc<App>> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, app).await;
        path.map(|Path(name)| Name(name))
            .map_err(|error| ApiError::bad(format!("failed to read the path: {error}")))
    }
}

fn is_limit(error: &axum::Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(|source| source.is::<http_body_util::LengthLimitError>())
}

/// The digest under which a key is held.
pub(super) fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Lets a request through that carries one of the keys; all of them are compared, in constant time.
pub(super) async fn authorise(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    if app.keys.is_empty() {
        return next.run(request).await;
    }
    let given = request.headers().get(header::AUTHORIZATION);
    let given = given.and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.split_once(' '));
    let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let given = digest(given.map_or("", |(_, key)| key.trim()));
    let known = app
        .keys
        .iter()
        .fold(Choice::from(0), |found, key| found | key.ct_eq(&given));
    if bool::from(known) {
        return next.run(request).await;
    }
    let message = "the API key is missing or wrong; send it as: Authorization: Bearer KEY";
    let status = StatusCode::UNAUTHORIZED;
    let error = ApiError::new(status, "authentication_error", message).code("invalid_api_key");
    error.into_response()
}
