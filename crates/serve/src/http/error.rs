//! Errors in the form that clients of this API know: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::job::{JobError, SubmitError};

/// The body of an answer that is an error.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// In words.
    pub message: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The key at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
}

/// An error with its status.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// The status.
    pub status: StatusCode,
    /// The body.
    pub detail: ErrorDetail,
}

impl ApiError {
    /// An error of the request.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// An error of one key of the request.
    pub fn param(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::bad(message);
        error.detail.param = Some(param.to_string());
        error
    }

    /// Any error.
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        ApiError {
            status,
            detail: ErrorDetail {
                message: message.into(),
                kind,
                param: None,
                code: None,
            },
        }
    }

    /// With a word for programs.
    pub fn code(mut self, code: &'static str) -> Self {
        self.detail.code = Some(code);
        self
    }

    /// The server is stopping.
    pub fn stopping() -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "server_error", "the server is stopping").code("stopping")
    }

    /// The body.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: self.detail.clone(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

/// Library errors finish "failed to …".
fn sentence(error: &impl std::fmt::Display) -> String {
    format!("failed to {error}")
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = sentence(&error);
        match error {
            SubmitError::Full { .. } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                Self::new(status, "rate_limit_error", message).code("rate_limit_exceeded")
            }
            SubmitError::Closed => Self::stopping(),
            SubmitError::TooLong { .. } => Self::bad(message).code("context_length_exceeded"),
            SubmitError::Name(_) => Self::bad(message).code("invalid_name"),
            SubmitError::Empty | SubmitError::Vocabulary { .. } => Self::param("prompt", message),
            SubmitError::Sample(_) => Self::bad(message),
        }
    }
}

impl From<JobError> for ApiError {
    fn from(error: JobError) -> Self {
        let message = sentence(&error);
        let server = |status| Self::new(status, "server_error", message.clone());
        match error {
            JobError::NoState(_) => Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                message.clone(),
            )
            .code("state_not_found"),
            JobError::TooLong(error) => error.into(),
            JobError::Timeout => server(StatusCode::GATEWAY_TIMEOUT).code("timeout"),
            JobError::Save(_) => server(StatusCode::INSUFFICIENT_STORAGE).code("state_not_kept"),
            JobError::Stopping => Self::stopping(),
            JobError::Model(_) => server(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }
}
