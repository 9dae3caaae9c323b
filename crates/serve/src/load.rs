//! An open-loop load: requests come when they come (Poisson), whether or not the server keeps up, with prompts and
//! answers of unequal length; what is reported are the times that a client sees.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use http_body_util::BodyExt;
use hyper::client::conn::http1::handshake;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// What is asked of the server.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// The server, over plain HTTP.
    pub address: SocketAddr,
    /// Requests per second, on average.
    pub rate: f64,
    /// How many requests.
    pub requests: usize,
    /// The longest prompt in tokens; lengths are uniform from a fifth of it, so that the mean is 0.6 of it.
    pub prompt: usize,
    /// The longest answer in tokens, likewise.
    pub answer: usize,
    /// Tokens are drawn below this.
    pub vocab: u32,
    /// An API key.
    pub key: Option<String>,
    /// Seed of arrivals, lengths and tokens.
    pub seed: u64,
    /// For one answer.
    pub patience: Duration,
}

/// A load that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A number out of range.
    #[error("make a load: {0}")]
    Range(&'static str),
    /// No threads.
    #[error("start the load's threads: {0}")]
    Threads(std::io::Error),
}

/// Quantiles of a time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Half are below.
    pub p50: f64,
    /// Nine of ten are below.
    pub p90: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Quantiles {
    /// Of values in any order; zeros where there is none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Quantiles {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// What came of a load.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Requests sent.
    pub requests: usize,
    /// Answers that were complete.
    pub answered: usize,
    /// Refused with 429.
    pub refused: usize,
    /// Everything else.
    pub failed: usize,
    /// What one of them said.
    pub failure: Option<String>,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Requests per second that were asked for.
    pub rate: f64,
    /// Prompt tokens of complete answers.
    pub prompt_tokens: u64,
    /// Tokens made in complete answers.
    pub completion_tokens: u64,
    /// Tokens made per second.
    pub tokens_per_s: f64,
    /// From sending a request to its first token.
    pub first_token_s: Quantiles,
    /// From one token to the next.
    pub inter_token_s: Quantiles,
    /// From sending a request to its end.
    pub total_s: Quantiles,
}

/// One request of the plan.
struct Planned {
    at: Duration,
    body: Value,
}

fn plan(config: &LoadConfig) -> Vec<Planned> {
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let mut at = 0.0;
    let ragged = |rng: &mut ChaCha8Rng, most: usize| rng.random_range(most.div_ceil(5)..=most);
    (0..config.requests)
        .map(|_| {
            // Gaps of a Poisson process are exponential.
            at += -(1.0 - rng.random::<f64>()).ln() / config.rate;
            let length = ragged(&mut rng, config.prompt);
            let prompt: Vec<u32> = (0..length)
                .map(|_| rng.random_range(0..config.vocab))
                .collect();
            let body = json!({
                "prompt": prompt, "max_tokens": ragged(&mut rng, config.answer), "temperature": 0,
                "stream": true, "stream_options": {"include_usage": true},
            });
            Planned {
                at: Duration::from_secs_f64(at),
                body,
            }
        })
        .collect()
}

#[derive(Default)]
struct Seen {
    first: Option<f64>,
    gaps: Vec<f64>,
    total: f64,
    prompt: u64,
    made: u64,
}

enum Outcome {
    Answered(Seen),
    Refused,
    Failed(String),
}

/// Sends the load and waits for every answer.
pub fn run_load(config: LoadConfig) -> Result<LoadReport, LoadError> {
    if !(config.rate > 0.0 && config.rate.is_finite()) {
        return Err(LoadError::Range(
            "the rate must be above 0 requests per second",
        ));
    }
    if config.requests == 0 || config.prompt == 0 || config.answer == 0 || config.vocab == 0 {
        return Err(LoadError::Range("requests and lengths must be at least 1"));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(LoadError::Threads)?;
    let planned = plan(&config);
    let config = Arc::new(config);
    let began = Instant::now();
    let outcomes = runtime.block_on(async {
        let tasks: Vec<_> = planned
            .into_iter()
            .map(|planned| {
                let config = config.clone();
                tokio::spawn(async move {
                    tokio::time::sleep_until((began + planned.at).into()).await;
                    let asked = ask(&config, &planned.body);
                    match tokio::time::timeout(config.patience, asked).await {
                        Ok(Ok(outcome)) => outcome,
                        Ok(Err(message)) => Outcome::Failed(message),
                        Err(_) => Outcome::Failed("no whole answer in time".into()),
                    }
                })
            })
            .collect();
        let mut outcomes = Vec::new();
        for task in tasks {
            outcomes.push(
                task.await
                    .unwrap_or_else(|error| Outcome::Failed(error.to_string())),
            );
        }
        outcomes
    });
    Ok(report(&config, outcomes, began.elapsed().as_secs_f64()))
}

fn report(config: &LoadConfig, outcomes: Vec<Outcome>, seconds: f64) -> LoadReport {
    let (mut refused, mut failed, mut failure) = (0, 0, None);
    let mut answers = Vec::new();
    for outcome in outcomes {
        match outcome {
            Outcome::Answered(seen) => answers.push(seen),
            Outcome::Refused => refused += 1,
            Outcome::Failed(message) => {
                failed += 1;
                failure.get_or_insert(message);
            }
        }
    }
    let made = answers.iter().map(|seen| seen.made).sum::<u64>();
    let gaps = answers.iter().flat_map(|seen| seen.gaps.iter().copied());
    LoadReport {
        requests: config.requests,
        answered: answers.len(),
        refused,
        failed,
        failure,
        seconds,
        rate: config.rate,
        prompt_tokens: answers.iter().map(|seen| seen.prompt).sum(),
        completion_tokens: made,
        tokens_per_s: made as f64 / seconds.max(1e-9),
        first_token_s: Quantiles::of(answers.iter().filter_map(|seen| seen.first).collect()),
        inter_token_s: Quantiles::of(gaps.collect()),
        total_s: Quantiles::of(answers.iter().map(|seen| seen.total).collect()),
    }
}

/// One request on a connection of its own.
async fn ask(config: &LoadConfig, body: &Value) -> Result<Outcome, String> {
    let began = Instant::now();
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let stream = TcpStream::connect(config.address)
        .await
        .map_err(|error| text(&error))?;
    let (mut sender, connection) = handshake(TokioIo::new(stream))
        .await
        .map_err(|error| text(&error))?;
    // It ends with the answer; an error shows there.
    tokio::spawn(connection);
    let mut request = Request::post("/v1/completions")
        .header(header::HOST, config.address.to_string())
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = &config.key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    let request = request
        .body(Body::from(body.to_string()))
        .map_err(|error| text(&error))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| text(&error))?;
    let status = response.status();
    let mut body = response.into_body();
    if status == StatusCode::TOO_MANY_REQUESTS {
        return Ok(Outcome::Refused);
    }
    let mut seen = Seen::default();
    let mut last = began;
    let mut held = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| text(&error))?;
        held.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        if status != StatusCode::OK {
            continue;
        }
        while let Some(end) = held.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = held.drain(..end + 2).collect();
            let Some(data) = event.strip_prefix(b"data: ") else {
                continue;
            };
            if data.starts_with(b"[DONE]") {
                seen.total = began.elapsed().as_secs_f64();
                return Ok(Outcome::Answered(seen));
            }
            let piece: Value = serde_json::from_slice(data).map_err(|error| text(&error))?;
            if let Some(message) = piece["error"]["message"].as_str() {
                return Ok(Outcome::Failed(message.to_string()));
            }
            // A piece with a token, though its text may wait for the rest of a character.
            let choice = &piece["choices"][0];
            if choice["text"].is_string() && choice["finish_reason"].is_null() {
                let now = Instant::now();
                let gap = (now - last).as_secs_f64();
                match seen.first {
                    None => seen.first = Some(gap),
                    Some(_) => seen.gaps.push(gap),
                }
                last = now;
            }
            let tokens = |key: &str| piece["usage"][key].as_u64().unwrap_or(0);
            seen.prompt += tokens("prompt_tokens");
            seen.made += tokens("completion_tokens");
        }
    }
    let said = String::from_utf8_lossy(&held).into_owned();
    Ok(Outcome::Failed(format!("status {status}: {said}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_ranks() {
        let values = (1..=200).rev().map(f64::from).collect();
        let quantiles = Quantiles::of(values);
        assert_eq!((quantiles.p50, quantiles.p90), (100.0, 180.0));
        assert_eq!((quantiles.p99, quantiles.max), (198.0, 200.0));
        assert_eq!(Quantiles::of(Vec::new()), Quantiles::default());
    }

    #[test]
    fn arrivals_have_the_rate_and_lengths_the_mean() {
        let config = LoadConfig {
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            rate: 50.0,
            requests: 4000,
            prompt: 100,
            answer: 50,
            vocab: 9,
            key: None,
            seed: 3,
            patience: Duration::from_secs(1),
        };
        let planned = plan(&config);
        let last = planned[3999].at.as_secs_f64();
        assert!(
            (76.0..84.0).contains(&last),
            "{last} s for 4000 requests at 50/s"
        );
        let lengths: Vec<usize> = planned
            .iter()
            .map(|one| one.body["prompt"].as_array().unwrap().len())
            .collect();
        let mean = lengths.iter().sum::<usize>() as f64 / 4000.0;
        assert!((58.0..62.0).contains(&mean), "{mean}");
        assert!(lengths.iter().all(|length| (20..=100).contains(length)));
    }
}
