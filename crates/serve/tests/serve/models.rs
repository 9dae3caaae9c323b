//! Small models with random weights, and the engine around them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use anyformer_models::{Model, ModelConfig, SampleOptions};
use anyformer_ops::Device;
use anyformer_serve::{
    ChannelSink, End, Engine, EngineConfig, Event, Job, JobError, Metrics, StatesConfig,
};
use serde_json::{Value, json};

/// The mixers around which the laws hold: a growing cache, a window, recurrences, and a hybrid.
pub fn kinds() -> Vec<(&'static str, Value)> {
    vec![
        ("attention", json!([{"name": "attention"}])),
        ("gla", json!([{"name": "gla"}])),
        ("mamba", json!([{"name": "mamba"}])),
        (
            "hybrid",
            json!([{"name": "gated_delta_net"}, {"name": "local", "window": 16}]),
        ),
    ]
}

pub fn model(mixers: &Value) -> Model {
    let config = json!({
        "dim": 32, "layers": 2, "mixers": mixers, "reads": {"tokens": {"vocab": 256}},
        "gives": {"next_token": {"tied": false}}, "max_time": 4096, "initializer_range": 0.3,
    });
    let config = ModelConfig::from_json(&config).unwrap();
    Model::new(&config, &Device::flex(), 7).unwrap()
}

pub fn config() -> EngineConfig {
    EngineConfig {
        chunk: 32,
        prefill: 64,
        states: StatesConfig {
            memory: 0,
            ..StatesConfig::default()
        },
        ..EngineConfig::default()
    }
}

pub fn start(mixers: &Value, config: EngineConfig) -> (Engine, Metrics) {
    let metrics = Metrics::new().unwrap();
    let engine = Engine::start(model(mixers), config, metrics.clone()).unwrap();
    (engine, metrics)
}

/// A text of `length` tokens that looks like no other.
pub fn prompt(seed: usize, length: usize) -> Vec<u32> {
    let mut x = seed as u64 + 1;
    let mut next = || {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (x >> 56) as u32
    };
    (0..length).map(|_| next()).collect()
}

pub fn greedy(ids: Vec<u32>, max_tokens: usize) -> (Job, Receiver<Event>) {
    let (give, take) = channel();
    let options = SampleOptions {
        temperature: 0.0,
        ..SampleOptions::default()
    };
    let job = Job {
        ids,
        options,
        bias: Default::default(),
        max_tokens,
        stop_ids: Arc::default(),
        logprobs: None,
        state: None,
        save: None,
        deadline: None,
        grammar: None,
        sink: Box::new(ChannelSink::new(give)),
    };
    (job, take)
}

/// All tokens and the end of an answer.
pub fn collect(events: Receiver<Event>) -> (Vec<u32>, Result<End, JobError>) {
    let mut ids = Vec::new();
    for event in events {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::End(end) => return (ids, end),
        }
    }
    panic!("no end came")
}

pub fn ask(engine: &Engine, ids: &[u32], max_tokens: usize) -> (Vec<u32>, End) {
    let (job, events) = greedy(ids.to_vec(), max_tokens);
    engine.submit(job).unwrap();
    let (made, end) = collect(events);
    (made, end.unwrap())
}
