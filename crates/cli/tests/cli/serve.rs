//! The server as a process: it answers, ends politely, and keeps its states when it is killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{anyformer, command, folder, trained};

struct Server {
    child: Child,
    address: String,
}

fn start(folder: &Path, words: &[&str]) -> Server {
    let run = trained().to_string_lossy().into_owned();
    let mut all = vec![
        "serve",
        &run,
        "--port=0",
        "--json",
        "--threads=1",
        "--name=tiny",
    ];
    all.extend(words);
    let mut child = command(folder, &all)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let mut said = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    while !said.ends_with("}\n") && out.read_line(&mut said).expect("a line") > 0 {}
    let said: Value = serde_json::from_str(&said).expect("JSON");
    let url = said["url"].as_str().expect("a url");
    let address = url.trim_start_matches("http://").to_string();
    Server { child, address }
}

impl Server {
    fn send(&self, path: &str, body: &Value) -> TcpStream {
        let mut socket = TcpStream::connect(&self.address).expect("it listens");
        let timeout = Some(Duration::from_secs(30));
        socket.set_read_timeout(timeout).expect("a timeout");
        let (body, close) = (body.to_string(), "connection: close");
        let kind = "content-type: application/json";
        let length = body.len();
        let text = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\n{kind}\r\n{close}\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        socket.write_all(text.as_bytes()).expect("sent");
        socket
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let mut answer = String::new();
        self.send(path, body)
            .read_to_string(&mut answer)
            .expect("an answer");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error} in {answer}"))
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .status();
        assert!(sent.expect("kill runs").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn killed_in_the_middle_it_comes_back_with_its_states() {
    let place = folder();
    let words = ["--states=kept"];
    let base = "To be, or not to be, that is the question.";
    let on = json!({"prompt": " Whether", "state": "base", "temperature": 0, "max_tokens": 20});
    let before = {
        let server = start(place.path(), &words);
        let made = server.post("/v1/states", &json!({"name": "base", "prompt": base}));
        assert_eq!(made["on_disk"], true, "{made}");
        let before = server.post("/v1/completions", &on);
        // Killed while it answers and writes another state.
        let busy = json!({"prompt": base.repeat(20), "max_tokens": 4000, "stream": true});
        let mut socket = server.send("/v1/completions", &busy);
        socket.read_exact(&mut [0; 15]).expect("it has begun");
        let more = json!({"name": "more", "prompt": base.repeat(40)});
        let _socket = server.send("/v1/states", &more);
        server.signal("-KILL");
        before
    };
    let server = start(place.path(), &words);
    let after = server.post("/v1/completions", &on);
    assert_eq!(after["choices"], before["choices"]);
    let cached = &after["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64() >= Some(base.len() as u64 - 1), "{after}");
    // Two servers do not share a folder of states.
    let run = trained().to_string_lossy().into_owned();
    let second = ["serve", &run, "--port=0", "--states=kept"];
    anyformer(place.path(), &second).bad(&["another process uses it"]);
}

#[test]
fn a_polite_kill_lets_the_answer_finish() {
    let place = folder();
    let mut server = start(place.path(), &[]);
    let ask = json!({"prompt": "x", "max_tokens": 200, "stream": true});
    let mut socket = server.send("/v1/completions", &ask);
    socket.read_exact(&mut [0; 15]).expect("it has begun");
    server.signal("-TERM");
    let mut rest = String::new();
    socket.read_to_string(&mut rest).expect("the whole answer");
    assert!(
        rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"),
        "{rest}"
    );
    assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn what_cannot_be_served_is_refused() {
    let place = folder();
    let run = trained().to_string_lossy().into_owned();
    let serve = |words: &[&str]| {
        let mut all = vec!["serve", &run, "--port=0"];
        all.extend(words);
        anyformer(place.path(), &all)
    };
    serve(&["--batch=0"]).bad(&["batch", "at least 1"]);
    serve(&["--api-keys=none"]).bad(&["none"]);
    std::fs::write(place.path().join("empty"), "\n").expect("written");
    serve(&["--api-keys=empty"]).bad(&["no key"]);
    serve(&["--tls-cert=empty"]).bad(&["--tls-key"]);
    serve(&["--tls-cert=empty", "--tls-key=empty"]).bad(&["empty"]);
    serve(&["--host=192.0.2.1"]).bad(&["listen on 192.0.2.1"]);
    anyformer(place.path(), &["serve", "."]).bad(&["config.json"]);
}

#[test]
fn a_load_is_measured_on_a_server_of_its_own_and_on_one_that_runs() {
    let place = folder();
    let run = trained().to_string_lossy().into_owned();
    let load = |words: &[&str]| {
        let mut all = vec![
            "bench",
            "serve",
            "--threads=1",
            "--requests=20",
            "--rate=200",
        ];
        all.extend(["--prompt=40", "--answer=10", "--seed=4"]);
        all.extend(words);
        anyformer(place.path(), &all)
    };
    let own = load(&[&run, "--json"]).ok().json();
    assert_eq!(own["answered"], 20, "{own}");
    let server = start(place.path(), &[]);
    let address = format!("--address={}", server.address);
    let other = load(&[&address, "--json"]).ok().json();
    for key in ["prompt_tokens", "completion_tokens"] {
        assert_eq!(own[key], other[key], "{key}");
    }
    assert!(own["first_token_s"]["p50"].as_f64() > Some(0.0));
    let text = load(&[&address]).ok().out;
    assert!(text.contains("20 of 20 answered"), "{text}");
    load(&[&run, "--rate=0"]).bad(&["rate"]);
    load(&[]).bad(&["FOLDER"]);
    drop(server);
    let gone = load(&[&address, "--json"]).ok().json();
    assert_eq!(gone["failed"], 20);
}
