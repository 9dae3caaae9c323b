//! `/v1/embeddings`: a vector for each text, with the begin and end tokens that the tokenizer's file asks for around it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::sync::oneshot;

use crate::encoder::Reply;
use crate::engine::job::{JobError, SubmitError};

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::replies::{BodyErrors, Embedding, EmbeddingUsage, Embeddings, Errors, Vector};
use super::routes::{check_model, encode_whole, parse};
use super::types::{EmbeddingRequest, Prompt, check_others};

/// The most texts of one request.
const TEXTS: usize = 2048;

/// Vectors of texts.
#[utoipa::path(post, path = "/v1/embeddings", request_body = EmbeddingRequest, responses(
    (status = 200, description = "A vector for each text", body = Embeddings), Errors, BodyErrors))]
pub(super) async fn embeddings(
    State(app): State<Arc<App>>,
    Body(bytes): Body,
) -> Result<Json<Embeddings>, ApiError> {
    let request: EmbeddingRequest = parse(&bytes)?;
    check_others(&request.others)?;
    check_model(&app, request.model.as_ref())?;
    let encoder = app.encoder()?;
    let brief = match request.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let message = format!("expected float or base64, got {other:?}");
            return Err(ApiError::param("encoding_format", message));
        }
    };
    let texts = match request.input {
        Prompt::Text(text) => encode_whole(&app, vec![text]).await?,
        Prompt::Texts(texts) => encode_whole(&app, texts).await?,
        Prompt::Ids(ids) => vec![ids],
        Prompt::Lists(lists) => lists,
    };
    if texts.is_empty() || texts.len() > TEXTS {
        let message = format!("expected 1 to {TEXTS} texts, got {}", texts.len());
        return Err(ApiError::param("input", message));
    }
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let (jobs, vectors): (Vec<_>, Vec<_>) = texts
        .into_iter()
        .map(|ids| {
            let (give, take) = oneshot::channel::<Result<Vec<f32>, JobError>>();
            ((ids, Box::new(give) as Box<dyn Reply>), take)
        })
        .unzip();
    encoder.submit(jobs).map_err(|error| match error {
        SubmitError::Empty | SubmitError::Vocabulary { .. } => {
            let mut error = ApiError::from(error);
            error.detail.param = Some("input".into());
            error
        }
        error => error.into(),
    })?;
    let mut data = Vec::new();
    for (index, vector) in vectors.into_iter().enumerate() {
        let vector: Vec<f32> = vector.await.map_err(|_| ApiError::stopping())??;
        let bytes = || {
            vector
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        let embedding = match brief {
            true => Vector::Brief(STANDARD.encode(bytes())),
            false => Vector::Numbers(vector),
        };
        data.push(Embedding {
            object: "embedding",
            index,
            embedding,
        });
    }
    Ok(Json(Embeddings {
        object: "list",
        model: app.model.clone(),
        data,
        usage: EmbeddingUsage {
            prompt_tokens: tokens,
            total_tokens: tokens,
        },
    }))
}
