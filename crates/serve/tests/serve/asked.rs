//! What a request may ask for: streams that cannot begin, and scores that are changed.

use std::io::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{JSON, Setup, request, serve};
use crate::faults::wait_until;
use crate::models::config;

#[test]
fn a_stream_that_cannot_begin_is_refused_as_anything_else_is() {
    let mut engine = config();
    engine.states.memory = 1 << 20;
    engine.batch = 1;
    engine.context = 2_000_000;
    let mut setup = Setup {
        engine,
        ..Setup::default()
    };
    setup.limits.max_tokens = 1_999_990;
    let server = serve(setup);
    let hello = "Hello there, long";
    let base = server.post("/v1/states", &json!({"name": "base", "prompt": hello}));
    assert_eq!(base.status, 200, "{}", base.text());
    // Another answer runs for as long as it may, and there is one place: what follows would wait.
    let mut held = server.connect();
    let long = json!({"prompt": "x", "max_tokens": 1_000_000, "stream": true}).to_string();
    let bytes = request("POST", "/v1/completions", JSON, long.as_bytes());
    held.write_all(&bytes).unwrap();
    wait_until("it runs", || server.metric("anyformer_running") == 1.0);
    for (more, status, code) in [
        (json!({"state": "none"}), 404, "state_not_found"),
        (
            json!({"state": "base", "max_tokens": 1_999_985}),
            400,
            "context_length_exceeded",
        ),
    ] {
        for (path, mut ask) in [
            ("/v1/completions", json!({"prompt": "on", "stream": true})),
            (
                "/v1/chat/completions",
                json!({"messages": [{"role": "user", "content": "on"}], "stream": true}),
            ),
        ] {
            ask.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            let answer = server.post(path, &ask);
            assert!(
                answer.head.contains("content-type: application/json"),
                "{}",
                answer.head
            );
            let (got, word, message) = answer.error();
            assert_eq!((got, &*word), (status, code), "{path}: {message}");
        }
    }
    drop(held);
    // Without a limit of its own, an answer may fill what the state leaves.
    let mut setup = Setup::default();
    setup.engine.states.memory = 1 << 20;
    setup.engine.context = 40;
    let small = serve(setup);
    small.post("/v1/states", &json!({"name": "base", "prompt": hello}));
    let ask = json!({"messages": [{"role": "user", "content": "x"}], "state": "base"});
    let value = small.post("/v1/chat/completions", &ask).json();
    let read = hello.len() + "user: x\nassistant:".len();
    assert_eq!(value["usage"]["prompt_tokens"], read, "{value}");
    assert_eq!(value["usage"]["total_tokens"], 40);
    // What is known before the first token, with a status of its own.
    let mut setup = Setup::default();
    setup.limits.time = Some(Duration::ZERO);
    let late = serve(setup).post("/v1/completions", &json!({"prompt": "x", "stream": true}));
    assert_eq!((late.status, &*late.error().1), (504, "timeout"));
}

#[test]
fn scores_are_changed_as_asked() {
    let server = serve(Setup::default());
    let greedy = |more: Value| {
        let mut ask = json!({"prompt": "Once", "max_tokens": 30, "temperature": 0, "logprobs": 0});
        ask.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let value = server.post("/v1/completions", &ask).json();
        let tokens = &value["choices"][0]["logprobs"]["tokens"];
        let tokens = tokens
            .as_array()
            .unwrap_or_else(|| panic!("{value}"))
            .clone();
        tokens
            .iter()
            .map(|token| token.as_str().unwrap().to_string())
            .collect::<Vec<_>>()
    };
    let distinct = |tokens: &[String]| {
        tokens
            .iter()
            .collect::<std::collections::HashSet<_>>()
            .len()
    };
    assert_eq!(greedy(json!({"logit_bias": {"65": 100}})), ["A"; 30]);
    let plain = greedy(json!({}));
    assert_eq!(
        greedy(json!({"logit_bias": {}, "presence_penalty": 0})),
        plain
    );
    for penalty in ["presence_penalty", "frequency_penalty"] {
        let varied = greedy(json!({penalty: 2}));
        assert!(
            distinct(&varied) > distinct(&plain),
            "{penalty}: {varied:?} and {plain:?}"
        );
    }
    for (more, part) in [
        (
            json!({"logit_bias": {"256": 1}}),
            "below the vocabulary of 256, got \"256\"",
        ),
        (json!({"logit_bias": {"A": 1}}), "got \"A\""),
        (
            json!({"logit_bias": {"65": 101}}),
            "-100 to 100 for token 65, got 101",
        ),
        (
            json!({"presence_penalty": 2.5}),
            "presence_penalty of at least -2",
        ),
        (
            json!({"frequency_penalty": -2.5}),
            "frequency_penalty of at least -2",
        ),
    ] {
        let mut ask = json!({"prompt": "Once"});
        ask.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let (status, _, message) = server.post("/v1/completions", &ask).error();
        assert!(status == 400 && message.contains(part), "{more}: {message}");
    }
}
