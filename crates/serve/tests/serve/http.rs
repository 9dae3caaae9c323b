//! The routes: forms of answers, streams, errors, keys, states, probes.

use serde_json::{Value, json};

use crate::client::{JSON, Setup, serve};
use crate::models::config;

fn ids(text: &Value) -> usize {
    text.as_str().unwrap().len()
}

#[test]
fn a_completion_has_the_form_that_clients_know() {
    let server = serve(Setup::default());
    let ask = json!({"model": "tiny", "prompt": "Once upon", "max_tokens": 12, "temperature": 0, "logprobs": 2});
    let answer = server.post("/v1/completions", &ask);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let value = answer.json();
    assert_eq!(value["object"], "text_completion");
    let choice = &value["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(
        choice["logprobs"]["token_logprobs"][0],
        choice["logprobs"]["top_logprobs"][0]
            .as_object()
            .unwrap()
            .values()
            .next()
            .unwrap()
            .clone()
    );
    assert_eq!(value["usage"]["prompt_tokens"], 9);
    assert_eq!(value["usage"]["completion_tokens"], 12);
    assert_eq!(value["usage"]["total_tokens"], 21);
    // The same greedy text as a stream, from ids, and twice in one request.
    let text = choice["text"].as_str().unwrap();
    let mut stream = ask.clone();
    stream["stream"] = json!(true);
    stream["logprobs"] = Value::Null;
    stream["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/completions", &stream).events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let pieces: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    let joined: String = pieces
        .iter()
        .filter_map(|piece| piece["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(joined, text);
    let usage = pieces.last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 12);
    let twice = json!({"prompt": [b"Once upon".to_vec(), b"Once upon".to_vec()], "max_tokens": 12, "temperature": 0});
    let value = server.post("/v1/completions", &twice).json();
    assert_eq!(value["choices"][0]["text"], text);
    assert_eq!(value["choices"][1]["text"], text);
    assert_eq!(value["usage"]["prompt_tokens"], 18);
}

#[test]
fn a_chat_answers_streams_and_stops() {
    let server = serve(Setup::default());
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]);
    let ask = json!({"model": "tiny", "messages": messages, "max_completion_tokens": 20, "seed": 5, "top_k": 40,
        "logprobs": true, "top_logprobs": 3, "user": "me", "tools": [], "tool_choice": "none"});
    let value = server.post("/v1/chat/completions", &ask).json();
    let message = &value["choices"][0]["message"];
    assert_eq!(message["role"], "assistant", "{value}");
    let content = &value["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 20);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(
        value["usage"]["prompt_tokens"],
        "user: Hi\nassistant:".len()
    );
    // The same seed gives the same text; a stop string ends it and is not part of it.
    let again = server.post("/v1/chat/completions", &ask).json();
    assert_eq!(again["choices"][0]["message"], *message);
    let text = message["content"].as_str().unwrap();
    let middle: String = text.chars().skip(4).take(2).collect();
    let mut stopped = ask.clone();
    stopped["stop"] = json!(middle);
    stopped["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &stopped).events();
    let pieces: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert_eq!(pieces[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(pieces[0]["object"], "chat.completion.chunk");
    let joined: String = pieces
        .iter()
        .filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(joined, text[..text.find(&middle).unwrap()]);
    assert_eq!(
        pieces.last().unwrap()["choices"][0]["finish_reason"],
        "stop"
    );
    // Several answers with seeds of their own.
    let several = json!({"messages": messages, "n": 3, "seed": 5, "max_tokens": 20});
    let value = server.post("/v1/chat/completions", &several).json();
    let texts: std::collections::HashSet<String> = (0..3)
        .map(|index| value["choices"][index]["message"]["content"].to_string())
        .collect();
    assert_eq!(texts.len(), 3);
}

#[test]
fn answers_are_held_to_the_json_that_is_asked_for() {
    let mut setup = Setup::default();
    setup.engine.speculate = 4;
    let server = serve(setup);
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["word", "kind"], "properties": {
        "word": {"type": "string", "maxLength": 6}, "kind": {"enum": ["a", "b"]}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "word", "strict": true, "schema": schema}});
    let ask = json!({"messages": [{"role": "user", "content": "JSON"}], "max_tokens": 600, "n": 3, "seed": 1,
        "response_format": format});
    let value = server.post("/v1/chat/completions", &ask).json();
    for choice in value["choices"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "stop", "{value}");
        let text = choice["message"]["content"].as_str().unwrap();
        let made: Value = serde_json::from_str(text).unwrap();
        assert!(
            made["word"].as_str().unwrap().chars().count() <= 6,
            "{text}"
        );
        assert!(
            ["a", "b"].map(|kind| json!(kind)).contains(&made["kind"]),
            "{text}"
        );
    }
    let object =
        json!({"prompt": "JSON", "max_tokens": 20, "response_format": {"type": "json_object"}});
    let value = server.post("/v1/completions", &object).json();
    assert!(
        value["choices"][0]["text"]
            .as_str()
            .unwrap()
            .starts_with('{'),
        "{value}"
    );
    for (format, part) in [
        (json!({"type": "xml"}), "xml"),
        (
            json!({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}),
            "nonsense",
        ),
        (
            json!({"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}),
            "no text fits it",
        ),
        (json!({"type": "json_schema"}), "json_schema"),
    ] {
        let mut ask = object.clone();
        ask["response_format"] = format;
        let (status, _, message) = server.post("/v1/completions", &ask).error();
        assert!(
            status == 400 && message.contains(part),
            "{status} {message}"
        );
    }
}

#[test]
fn errors_have_the_form_of_the_api() {
    let server = serve(Setup::default());
    let error = |path: &str, body: Value| server.post(path, &body).error();
    let text = "/v1/completions";
    for (body, status, part) in [
        (
            json!({"prompt": "x", "model": "gpt"}),
            404,
            "there is no model \"gpt\"",
        ),
        (
            json!({"prompt": "x", "best_of": 3}),
            400,
            "\"best_of\" is not supported",
        ),
        (
            json!({"prompt": "x", "tools": [1]}),
            400,
            "\"tools\" is not supported",
        ),
        (
            json!({"prompt": "x", "temperature": -1}),
            400,
            "temperature of at least 0",
        ),
        (json!({"prompt": "x", "top_p": 0}), 400, "top_p above 0"),
        (json!({"prompt": "x", "n": 0}), 400, "1 to 64 answers"),
        (
            json!({"prompt": "x", "n": usize::MAX}),
            400,
            "1 to 64 answers",
        ),
        (json!({"prompt": "x", "logprobs": 21}), 400, "at most 20"),
        (
            json!({"prompt": "x", "max_tokens": 5000}),
            400,
            "at most 4096",
        ),
        (
            json!({"prompt": "x", "stop": vec!["a"; 17]}),
            400,
            "at most 16",
        ),
        (json!({"prompt": ""}), 400, "no tokens"),
        (
            json!({"prompt": [999]}),
            400,
            "not below the vocabulary of 256",
        ),
        (json!({"prompt": 5}), 400, "read the JSON"),
        (json!({"max_tokens": 5}), 400, "prompt"),
        (
            json!({"prompt": "x", "state": "none"}),
            404,
            "none of that name",
        ),
        (json!({"prompt": "x", "save_state": "a b"}), 400, "letters"),
    ] {
        let (got, _, message) = error(text, body.clone());
        assert_eq!(got, status, "{body}: {message}");
        assert!(message.contains(part), "{body}: {message}");
    }
    let chat = "/v1/chat/completions";
    assert_eq!(error(chat, json!({"messages": []})).0, 400);
    let picture = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
    assert!(
        error(chat, json!({"messages": picture}))
            .2
            .contains("image_url")
    );
    let embedding = error("/v1/embeddings", json!({"input": "x", "model": "tiny"}));
    assert_eq!((embedding.0, &*embedding.1), (400, "model_not_supported"));
    assert_eq!(server.get("/v2").error().1, "unknown_url");
    assert_eq!(server.get("/v1/states/%ff%fe").error().0, 400);
    assert_eq!(server.get("/v1/models/%ff").error().0, 400);
    for path in ["/v1/models/who/what", "/v1/models/who%2Fwhat"] {
        let message = server.get(path).error().2;
        assert!(message.contains("no model \"who/what\""), "{message}");
    }
    for (body, part) in [
        (json!({"prompt": 5}), "expected a text, a list of texts"),
        (json!({"prompt": "x", "stop": 5}), "expected stop"),
    ] {
        let message = error(text, body).2;
        assert!(message.contains(part), "{message}");
    }
    let called = json!([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]);
    assert!(
        error(chat, json!({"messages": called}))
            .2
            .contains("\"tool_calls\" of a message")
    );
    let required =
        json!({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"});
    assert!(
        error(chat, required)
            .2
            .contains("\"tool_choice\" is not supported")
    );
    let nothing = json!({"messages": [{"role": "user", "content": null}]});
    assert!(error(chat, nothing).2.contains("expected content"));
    assert_eq!(server.get(text).error().0, 405);
    let form = server.request("POST", text, "content-type: text/plain\r\n", b"{}");
    assert_eq!(form.error().0, 415);
    assert!(
        server.metric("anyformer_http_requests_total{route=\"/v1/completions\",status=\"400\"}")
            >= 12.0
    );
}

#[test]
fn keys_guard_the_api_and_nothing_else() {
    let server = serve(Setup {
        keys: vec!["secret-1".into(), "secret-2".into()],
        ..Setup::default()
    });
    let with = |key: &str| {
        let header = format!("authorization: {key}\r\n");
        server.request("GET", "/v1/models", &header, b"")
    };
    assert_eq!(server.get("/v1/models").error().1, "invalid_api_key");
    for wrong in ["Bearer secret-3", "Bearer ", "secret-1", "Bearer secret-11"] {
        assert_eq!(with(wrong).status, 401, "{wrong}");
    }
    assert_eq!(with("Bearer secret-1").json()["data"][0]["id"], "tiny");
    assert_eq!(with("Bearer secret-2").status, 200);
    // The name of the scheme may be written in any case (RFC 9110, section 11.1).
    assert_eq!(with("bearer secret-2").status, 200);
    for open in ["/health", "/ready", "/metrics", "/ui", "/openapi.json"] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
    assert_eq!(
        server
            .post("/v1/completions", &json!({"prompt": "x"}))
            .status,
        401
    );
}

#[test]
fn named_states_are_made_listed_forked_and_used() {
    let mut engine = config();
    engine.states.memory = 1 << 20;
    let server = serve(Setup {
        engine,
        ..Setup::default()
    });
    let start = "A long beginning that many requests share, read once. ";
    let made = server.post("/v1/states", &json!({"name": "base", "prompt": start}));
    assert_eq!(made.json()["tokens"], start.len(), "{}", made.text());
    let go = |body: Value| server.post("/v1/completions", &body).json();
    let whole = go(json!({"prompt": format!("{start}Then"), "temperature": 0}));
    let on = go(json!({"prompt": "Then", "state": "base", "temperature": 0, "save_state": "next"}));
    assert_eq!(on["choices"][0]["text"], whole["choices"][0]["text"]);
    let details = &on["usage"]["prompt_tokens_details"];
    assert!(
        details["cached_tokens"].as_u64().unwrap() >= start.len() as u64,
        "{on}"
    );
    let fork = server.post(
        "/v1/states/next/fork",
        &json!({"name": "back", "tokens": start.len()}),
    );
    assert_eq!(fork.json()["tokens"], start.len(), "{}", fork.text());
    assert_eq!(fork.json()["kept_tokens"], start.len());
    let names: Vec<Value> = server.get("/v1/states").json()["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|state| state["name"].clone())
        .collect();
    assert_eq!(names, ["back", "base", "next"]);
    let back = go(json!({"prompt": "Then", "state": "back", "temperature": 0}));
    assert_eq!(back["choices"][0]["text"], whole["choices"][0]["text"]);
    let path = "/v1/states/base";
    assert_eq!(
        server.request("DELETE", path, "", b"").json()["deleted"],
        true
    );
    assert_eq!(
        server.request("DELETE", path, "", b"").error().1,
        "state_not_found"
    );
    assert_eq!(server.get(path).status, 404);
    assert_eq!(
        server
            .post("/v1/states/none/fork", &json!({"name": "x"}))
            .status,
        404
    );
    let wrong = server.post(
        "/v1/states/next/fork",
        &json!({"name": "x", "tokens": 100_000}),
    );
    assert_eq!(wrong.status, 400);
    assert!(ids(&whole["choices"][0]["text"]) > 0);
    // Without room in memory and without a folder there is no place for it.
    let full = serve(Setup::default());
    let refused = full.post("/v1/states", &json!({"name": "base", "prompt": start}));
    assert_eq!(
        (refused.status, &*refused.error().1),
        (507, "state_not_kept")
    );
}

#[test]
fn probes_pages_and_the_description_are_there() {
    let server = serve(Setup::default());
    assert_eq!(server.get("/health").text(), "ok\n");
    assert_eq!(server.get("/ready").text(), "ready\n");
    let page = server.get("/ui");
    assert!(page.head.contains("default-src 'none'"));
    assert!(page.text().contains("/ui/app.js"));
    for part in ["/ui/app.js", "/ui/style.css"] {
        let text = server.get(part).text();
        assert!(
            !text.contains("http://") && !text.contains("https://"),
            "{part} asks nobody else"
        );
    }
    assert_eq!(server.get("/").status, 303);
    server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 3}));
    for name in ["time_to_first_token", "inter_token", "queue", "request"] {
        let count = server.metric(&format!("anyformer_{name}_seconds_count"));
        assert!(count >= 1.0, "{name}");
    }
    let described = server.get("/openapi.json").json();
    let paths = described["paths"].as_object().unwrap();
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{name}", "none").replace("{model}", "tiny");
            let answer = server.request(&method.to_uppercase(), &path, JSON, b"{}");
            assert_ne!(answer.status, 405, "{method} {path}");
            let unknown = answer.text().contains("unknown_url");
            assert!(!unknown, "{method} {path} is described and not there");
        }
    }
    assert!(paths.len() >= 11, "{paths:?}");
    let components = &described["components"];
    assert!(components["schemas"]["ChatRequest"].is_object());
    assert_eq!(components["securitySchemes"]["key"]["scheme"], "bearer");
    assert_eq!(described["security"], json!([{}, {"key": []}]));
}
