//! What is answered is what the description says.

use std::collections::BTreeSet;
use std::time::Duration;

use anyformer_serve::{Encoder, EncoderConfig, Metrics, Served};
use serde_json::{Map, Value, json};

use crate::client::{Answer, JSON, Running, Setup, serve, serve_it};
use crate::faults::wait_until;
use crate::models::config;

/// The description, with every object closed: a key that it does not name is an error here, though clients may expect more.
struct Description {
    paths: Value,
    components: Value,
}

impl Description {
    fn of(server: &Running) -> Self {
        let mut document = server.get("/openapi.json").json();
        let mut open = BTreeSet::new();
        parts(&document, &mut open);
        for (name, schema) in document["components"]["schemas"].as_object_mut().unwrap() {
            let kept = open.contains(&format!("#/components/schemas/{name}"));
            let object = schema.get("properties").is_some() || schema.get("allOf").is_some();
            if object && !kept {
                schema["unevaluatedProperties"] = json!(false);
            }
        }
        Description {
            paths: document["paths"].take(),
            components: document["components"].take(),
        }
    }

    /// Panics unless `value` is what the description's `schema` allows.
    fn check(&self, what: &str, schema: &Value, value: &Value) {
        assert!(
            schema.as_object().is_some_and(|keys| !keys.is_empty()),
            "{what}: nothing is said about it"
        );
        let mut whole = schema.clone();
        whole["components"] = self.components.clone();
        let validator = jsonschema::options()
            .with_draft(jsonschema::Draft::Draft202012)
            .build(&whole)
            .unwrap();
        let wrong: Vec<String> = validator
            .iter_errors(value)
            .map(|error| format!("{error} at {}", error.instance_path()))
            .collect();
        assert!(wrong.is_empty(), "{what}: {wrong:#?} in {value:#}");
    }

    fn answer(&self, method: &str, path: &str, answer: &Answer) {
        let what = format!("{method} {path}: {}", answer.status);
        let said = &self.paths[path][method]["responses"][answer.status.to_string()];
        let head = answer.head.to_lowercase();
        let kind = head.split("content-type: ").nth(1).expect("a type");
        let kind = kind.split(['\r', ';']).next().unwrap();
        let schema = &said["content"][kind]["schema"];
        match kind {
            "application/json" => self.check(&what, schema, &answer.json()),
            "text/event-stream" => {
                let events = answer.events();
                let (last, pieces) = events.split_last().unwrap();
                assert_eq!(last, "[DONE]");
                for piece in pieces {
                    self.check(&what, schema, &serde_json::from_str(piece).unwrap());
                }
            }
            _ => self.check(&what, schema, &json!(answer.text())),
        }
        for header in said["headers"].as_object().unwrap_or(&Map::new()).keys() {
            assert!(
                head.contains(&format!("\r\n{header}: ")),
                "{what}: {header}"
            );
        }
    }
}

/// What other schemas are made of: these allow more than they say.
fn parts(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| parts(item, found)),
        Value::Object(keys) => {
            let all = keys
                .get("allOf")
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            found.extend(all.filter_map(|part| part["$ref"].as_str().map(str::to_string)));
            keys.values().for_each(|value| parts(value, found));
        }
        _ => {}
    }
}

fn post(
    server: &Running,
    described: &Description,
    path: &str,
    body: &Value,
    status: u16,
) -> Answer {
    let schema =
        &described.paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"];
    if status == 200 {
        described.check(&format!("the body of {path}"), schema, body);
    }
    let answer = server.post(path, body);
    assert_eq!(answer.status, status, "{path} {body}: {}", answer.text());
    described.answer("post", path, &answer);
    answer
}

#[test]
fn answers_pieces_and_errors_are_those_of_the_description() {
    let mut setup = Setup::default();
    setup.engine.states.memory = 1 << 20;
    let server = serve(setup);
    let described = Description::of(&server);
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]);
    let chat = json!({"messages": messages, "max_tokens": 5, "model": "tiny"});
    let text = json!({"prompt": ["One", "two"], "max_tokens": 5, "stop": ["zz"]});
    let told = json!({"stream": true, "stream_options": {"include_usage": true}});
    for (path, ask, logprobs) in [
        (
            "/v1/chat/completions",
            chat,
            json!({"logprobs": true, "top_logprobs": 2, "n": 2}),
        ),
        ("/v1/completions", text, json!({"logprobs": 2})),
    ] {
        for (stream, more) in [
            (false, &json!({})),
            (false, &logprobs),
            (true, &json!({})),
            (true, &logprobs),
        ] {
            let mut ask = ask.clone();
            let keys = ask.as_object_mut().unwrap();
            keys.extend(more.as_object().unwrap().clone());
            if stream {
                keys.extend(told.as_object().unwrap().clone());
            }
            post(&server, &described, path, &ask, 200);
        }
    }
    for (path, shown) in [
        ("/v1/models", "/v1/models"),
        ("/v1/models/{model}", "/v1/models/tiny"),
        ("/v1/models/{model}", "/v1/models/none"),
        ("/health", "/health"),
        ("/ready", "/ready"),
        ("/metrics", "/metrics"),
    ] {
        described.answer("get", path, &server.get(shown));
    }
    post(
        &server,
        &described,
        "/v1/states",
        &json!({"name": "base", "prompt": "A beginning"}),
        200,
    );
    post(
        &server,
        &described,
        "/v1/completions",
        &json!({"prompt": [3, 4], "state": "base", "max_tokens": 2}),
        200,
    );
    for shown in ["/v1/states/base", "/v1/states/none"] {
        described.answer("get", "/v1/states/{name}", &server.get(shown));
    }
    described.answer("get", "/v1/states", &server.get("/v1/states"));
    let fork = server.post(
        "/v1/states/base/fork",
        &json!({"name": "half", "tokens": 3}),
    );
    assert_eq!(fork.json()["tokens"], 3, "{}", fork.text());
    described.answer("post", "/v1/states/{name}/fork", &fork);
    for status in [200, 404] {
        let gone = server.request("DELETE", "/v1/states/base", "", b"");
        assert_eq!(gone.status, status);
        described.answer("delete", "/v1/states/{name}", &gone);
    }
    for (path, body, status) in [
        ("/v1/completions", json!({"prompt": 5}), 400),
        (
            "/v1/completions",
            json!({"prompt": "x", "model": "other"}),
            404,
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "state": "none", "stream": true}),
            404,
        ),
        ("/v1/chat/completions", json!({"messages": []}), 400),
        ("/v1/states", json!({"name": "a b", "prompt": "x"}), 400),
        ("/v1/states/none/fork", json!({"name": "x"}), 404),
        ("/v1/embeddings", json!({"input": "x"}), 400),
    ] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, status, "{path} {body}");
        described.answer("post", &path.replace("none", "{name}"), &answer);
    }
    let text = server.request(
        "POST",
        "/v1/completions",
        "content-type: text/plain\r\n",
        b"x",
    );
    let large = server.request("POST", "/v1/completions", JSON, &vec![b' '; 5 << 20]);
    assert_eq!((text.status, large.status), (415, 413));
    for answer in [text, large] {
        described.answer("post", "/v1/completions", &answer);
    }
    // The description of a body refuses what the server does not read.
    for (path, body) in [
        ("/v1/completions", json!({"prompt": 5})),
        ("/v1/completions", json!({"prompt": "x", "n": -1})),
        ("/v1/completions", json!({"prompt": "x", "stop": 5})),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": 5}]}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}}),
        ),
        ("/v1/states", json!({"name": "x"})),
    ] {
        let schema =
            &described.paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"];
        let checked = std::panic::catch_unwind(|| described.check(path, schema, &body));
        assert!(checked.is_err(), "{path}: {body} fits");
        assert_eq!(server.post(path, &body).status, 400, "{path}: {body}");
    }
}

#[test]
fn vectors_are_those_of_the_description() {
    let metrics = Metrics::new().unwrap();
    let model = crate::encoder::model();
    let encoder = Encoder::start(model, EncoderConfig::default(), metrics.clone()).unwrap();
    let server = serve_it(Served::Vectors(encoder), metrics, Setup::default());
    let described = Description::of(&server);
    for body in [
        json!({"input": "One text"}),
        json!({"input": ["One text", "another"], "encoding_format": "base64"}),
        json!({"input": [[1, 2], [3]], "model": "tiny"}),
    ] {
        post(&server, &described, "/v1/embeddings", &body, 200);
    }
    post(
        &server,
        &described,
        "/v1/embeddings",
        &json!({"input": ""}),
        400,
    );
}

#[test]
fn errors_of_a_guarded_full_late_or_slow_server_are_those_of_the_description() {
    let path = "/v1/completions";
    let guarded = serve(Setup {
        keys: vec!["key".into()],
        ..Setup::default()
    });
    post(
        &guarded,
        &Description::of(&guarded),
        path,
        &json!({"prompt": "x"}),
        401,
    );
    let mut setup = Setup {
        engine: config(),
        ..Setup::default()
    };
    setup.engine.context = 2_000_000;
    setup.engine.batch = 1;
    setup.engine.queue = 1;
    setup.limits.max_tokens = 1_000_000;
    setup.limits.time = Some(Duration::from_secs(4));
    setup.limits.read = Duration::from_millis(100);
    let server = serve(setup);
    let described = Description::of(&server);
    let long = json!({"prompt": "x", "max_tokens": 1_000_000});
    std::thread::scope(|scope| {
        let late = || post(&server, &described, path, &long, 504);
        scope.spawn(late);
        wait_until("one runs", || server.metric("anyformer_running") == 1.0);
        scope.spawn(late);
        wait_until("one waits", || server.metric("anyformer_waiting") == 1.0);
        post(&server, &described, path, &long, 429);
    });
    post(
        &server,
        &described,
        "/v1/states",
        &json!({"name": "base", "prompt": "no room"}),
        507,
    );
    let half = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{JSON}content-length: 50\r\n\r\n{{");
    let slow = server.raw(half.as_bytes());
    assert_eq!(slow.status, 408);
    described.answer("post", path, &slow);
}
