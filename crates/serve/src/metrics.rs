//! What the server counts and times, in the text form of Prometheus. Times are in seconds.

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

/// Every series of the server.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// From taking a request to its first token.
    pub first_token: Histogram,
    /// From one token of an answer to the next.
    pub inter_token: Histogram,
    /// From taking a request to its first step.
    pub queue: Histogram,
    /// From taking a request to its end.
    pub total: Histogram,
    /// Sequences of each decoding step.
    pub batch_size: Histogram,
    /// Answers over HTTP by route and status.
    pub requests: IntCounterVec,
    /// Ends of jobs: stop, length, cancelled, error.
    pub finished: IntCounterVec,
    /// Tokens read from prompts, kept ones not counted.
    pub prompt_tokens: IntCounter,
    /// Tokens of prompts that a kept state stood for.
    pub cached_tokens: IntCounter,
    /// Tokens made.
    pub completion_tokens: IntCounter,
    /// Tokens guessed ahead.
    pub guessed_tokens: IntCounter,
    /// Guessed tokens that were then chosen.
    pub accepted_tokens: IntCounter,
    /// Prompts whose beginning a kept state stood for.
    pub cache_hits: IntCounter,
    /// Prompts that were read from their first token.
    pub cache_misses: IntCounter,
    /// Requests refused because the queue was full.
    pub refused: IntCounter,
    /// Sequences that are being read or continued.
    pub running: IntGauge,
    /// Requests that wait.
    pub waiting: IntGauge,
    /// States kept in memory.
    pub states: IntGauge,
    /// Their bytes.
    pub state_bytes: IntGauge,
}

/// Bounds of times in seconds: 1 ms to about two minutes, doubling.
fn seconds() -> Vec<f64> {
    (0..18).map(|power| 0.001 * f64::from(1 << power)).collect()
}

impl Metrics {
    /// All series at zero.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, bounds: Vec<f64>| {
            let made = Histogram::with_opts(HistogramOpts::new(name, help).buckets(bounds))?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let made = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let counter = |name: &str, help: &str| {
            let made = IntCounter::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let gauge = |name: &str, help: &str| {
            let made = IntGauge::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let sizes = (0..11).map(|power| f64::from(1 << power)).collect();
        Ok(Metrics {
            first_token: histogram(
                "anyformer_time_to_first_token_seconds",
                "From taking a request to its first token",
                seconds(),
            )?,
            inter_token: histogram(
                "anyformer_inter_token_seconds",
                "From one token of an answer to the next",
                seconds(),
            )?,
            queue: histogram(
                "anyformer_queue_seconds",
                "From taking a request to its first step",
                seconds(),
            )?,
            total: histogram(
                "anyformer_request_seconds",
                "From taking a request to its end",
                seconds(),
            )?,
            batch_size: histogram(
                "anyformer_batch_size",
                "Sequences of each decoding step",
                sizes,
            )?,
            requests: counters(
                "anyformer_http_requests_total",
                "Answers over HTTP",
                &["route", "status"],
            )?,
            finished: counters("anyformer_finished_total", "Ends of sequences", &["reason"])?,
            prompt_tokens: counter(
                "anyformer_prompt_tokens_total",
                "Prompt tokens read by the model",
            )?,
            cached_tokens: counter(
                "anyformer_cached_tokens_total",
                "Prompt tokens that a kept state stood for",
            )?,
            completion_tokens: counter("anyformer_completion_tokens_total", "Tokens made")?,
            guessed_tokens: counter("anyformer_guessed_tokens_total", "Tokens guessed ahead")?,
            accepted_tokens: counter(
                "anyformer_accepted_tokens_total",
                "Guessed tokens that were then chosen",
            )?,
            cache_hits: counter(
                "anyformer_cache_hits_total",
                "Prompts whose beginning a kept state stood for",
            )?,
            cache_misses: counter(
                "anyformer_cache_misses_total",
                "Prompts read from their first token",
            )?,
            refused: counter(
                "anyformer_refused_total",
                "Requests refused because the queue was full",
            )?,
            running: gauge("anyformer_running", "Sequences being read or continued")?,
            waiting: gauge("anyformer_waiting", "Requests that wait")?,
            states: gauge("anyformer_states", "States kept in memory")?,
            state_bytes: gauge("anyformer_state_bytes", "Bytes of the states in memory")?,
            registry,
        })
    }

    /// The text of all series.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_buckets_in_seconds() {
        let metrics = Metrics::new().unwrap();
        metrics.first_token.observe(0.003);
        metrics.finished.with_label_values(&["stop"]).inc();
        let text = metrics.text().unwrap();
        for line in [
            "anyformer_time_to_first_token_seconds_bucket{le=\"0.002\"} 0",
            "anyformer_time_to_first_token_seconds_bucket{le=\"0.004\"} 1",
            "anyformer_time_to_first_token_seconds_count 1",
            "anyformer_finished_total{reason=\"stop\"} 1",
            "anyformer_cache_hits_total 0",
        ] {
            assert!(text.lines().any(|got| got == line), "{line} in\n{text}");
        }
    }
}
