//! Vectors: the same packed and alone, and the route that gives them.

use std::time::{Duration, Instant};

use anyformer_models::{Model, ModelConfig, Pool};
use anyformer_ops::{Device, tensor_values};
use anyformer_serve::{Encoder, EncoderConfig, JobError, Metrics, Reply, Served, SubmitError};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::client::{Setup, serve_it};
use crate::models::prompt;

pub fn model() -> Model {
    let config = json!({
        "dim": 32, "layers": 2, "mixers": [{"name": "attention", "causal": false}], "reads": {"tokens": {"vocab": 256}},
        "gives": {"class": {"classes": 3, "pool": "mean"}}, "max_time": 512,
    });
    let config = ModelConfig::from_json(&config).unwrap();
    Model::new(&config, &Device::flex(), 7).unwrap()
}

fn start(config: EncoderConfig) -> (Encoder, Metrics) {
    let metrics = Metrics::new().unwrap();
    let encoder = Encoder::start(model(), config, metrics.clone()).unwrap();
    (encoder, metrics)
}

fn ask(encoder: &Encoder, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, SubmitError> {
    let (jobs, vectors): (Vec<_>, Vec<_>) = texts
        .iter()
        .map(|ids| {
            let (give, take) = oneshot::channel();
            ((ids.clone(), Box::new(give) as Box<dyn Reply>), take)
        })
        .unzip();
    encoder.submit(jobs)?;
    let vector = |take: oneshot::Receiver<_>| take.blocking_recv().unwrap();
    let made = vectors.into_iter().map(vector);
    Ok(made
        .map(|vector: Result<_, JobError>| vector.unwrap())
        .collect())
}

fn close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs());
    assert!(apart.fold(0.0, f32::max) < 1e-6);
}

#[test]
fn a_vector_is_the_same_alone_and_packed_with_others() {
    let (encoder, metrics) = start(EncoderConfig {
        wait: Duration::from_millis(50),
        ..EncoderConfig::default()
    });
    let texts: Vec<Vec<u32>> = [1, 40, 7, 130, 3].iter().map(|n| prompt(*n, *n)).collect();
    let packed = ask(&encoder, &texts).unwrap();
    assert_eq!(metrics.batch_size.get_sample_count(), 1);
    assert_eq!(metrics.batch_size.get_sample_sum(), 5.0);
    for (text, vector) in texts.iter().zip(&packed) {
        close(
            &ask(&encoder, std::slice::from_ref(text)).unwrap()[0],
            vector,
        );
        let hidden = tensor_values(model().vectors(&[text], Pool::Mean).unwrap());
        let length = hidden.iter().map(|x| x * x).sum::<f32>().sqrt();
        close(
            &hidden.iter().map(|x| x / length).collect::<Vec<_>>(),
            vector,
        );
    }
    assert!(packed[0] != packed[1]);
}

#[test]
fn a_text_waits_no_longer_than_it_may_and_a_full_pass_not_at_all() {
    let wait = Duration::from_millis(300);
    let (encoder, metrics) = start(EncoderConfig {
        wait,
        tokens: 100,
        queue: 6,
        ..EncoderConfig::default()
    });
    let began = Instant::now();
    ask(&encoder, &[prompt(1, 10)]).unwrap();
    assert!((wait..20 * wait).contains(&began.elapsed()));
    let began = Instant::now();
    ask(&encoder, &[prompt(1, 60), prompt(2, 60)]).unwrap();
    // Two passes: the second text was alone in its own and waited from its coming.
    assert!(began.elapsed() < 20 * wait);
    assert_eq!(metrics.batch_size.get_sample_count(), 3);
    // More than may wait, and nothing waits: they are taken, and the next is not.
    let held = metrics.running.clone();
    let many: Vec<Vec<u32>> = vec![prompt(3, 90); 400];
    // The last pass gives its vectors before it is over.
    while held.get() > 0 {
        std::thread::yield_now();
    }
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| ask(&encoder, &many).unwrap().len());
        while held.get() == 0 {
            std::thread::yield_now();
        }
        let full = ask(&encoder, &[vec![1]]);
        assert!(
            matches!(full, Err(SubmitError::Full { queued: 6.. })),
            "{full:?}"
        );
        assert_eq!(asked.join().unwrap(), 400);
    });
    assert_eq!(ask(&encoder, &[vec![]]), Err(SubmitError::Empty));
    assert!(matches!(
        ask(&encoder, &[vec![1; 9000]]),
        Err(SubmitError::TooLong { .. })
    ));
    encoder.close(false);
    assert_eq!(ask(&encoder, &[vec![1]]), Err(SubmitError::Closed));
}

#[test]
fn texts_that_nobody_waits_for_are_dropped() {
    let (encoder, metrics) = start(EncoderConfig {
        wait: Duration::from_millis(200),
        ..EncoderConfig::default()
    });
    let (give, take) = oneshot::channel();
    encoder.submit(vec![(vec![1], Box::new(give))]).unwrap();
    drop(take);
    ask(&encoder, &[vec![2]]).unwrap();
    let finished = |reason: &str| metrics.finished.with_label_values(&[reason]).get();
    assert_eq!((finished("cancelled"), finished("stop")), (1, 1));
}

#[test]
fn the_route_gives_floats_and_base64() {
    let (encoder, metrics) = start(EncoderConfig::default());
    let server = serve_it(Served::Vectors(encoder), metrics, Setup::default());
    let ask = json!({"model": "tiny", "input": ["One text", "another, longer text"]});
    let floats = server.post("/v1/embeddings", &ask).json();
    assert_eq!(floats["usage"]["prompt_tokens"], 28, "{floats}");
    assert_eq!(floats["data"][1]["index"], 1);
    let vector = floats["data"][0]["embedding"].as_array().unwrap();
    let square: f64 = vector.iter().map(|x| x.as_f64().unwrap().powi(2)).sum();
    assert!((square - 1.0).abs() < 1e-5 && vector.len() == 32);
    let mut brief = ask.clone();
    brief["encoding_format"] = json!("base64");
    let brief = server.post("/v1/embeddings", &brief).json();
    // 32 numbers of 4 bytes.
    assert_eq!(
        brief["data"][0]["embedding"].as_str().map(str::len),
        Some(172)
    );
    for (body, status, part) in [
        (json!({"input": "x", "dimensions": 3}), 400, "dimensions"),
        (json!({"input": "x", "encoding_format": "hex"}), 400, "hex"),
        (json!({"input": []}), 400, "1 to 2048"),
        (json!({"input": ""}), 400, "no tokens"),
        (json!({"input": "x".repeat(600_000)}), 400, "600000"),
    ] {
        let (got, _, message) = server.post("/v1/embeddings", &body).error();
        assert_eq!(got, status, "{message}");
        assert!(message.contains(part), "{part}: {message}");
    }
    let chat = json!({"messages": [{"role": "user", "content": "x"}]});
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/chat/completions", chat),
        ("/v1/states", json!({"name": "a", "prompt": "x"})),
    ] {
        assert_eq!(
            server.post(path, &body).error().1,
            "model_not_supported",
            "{path}"
        );
    }
    assert_eq!(server.get("/v1/states").error().1, "model_not_supported");
    let models: Value = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(server.get("/ready").status, 200);
}
