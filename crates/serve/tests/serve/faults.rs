//! Clients that are too many, too slow, too large, or gone; and the stop.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyformer_serve::ServerConfig;
use serde_json::{Value, json};

use crate::client::{Answer, JSON, Running, Setup, request, serve};

fn ask(prompt: &str, max_tokens: usize, stream: bool) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": stream})
}

pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn still_answers(server: &Running) {
    let answer = server.post("/v1/completions", &ask("still there?", 3, false));
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn beyond_capacity_some_are_refused_and_no_answer_is_lost_or_mixed() {
    let mut setup = Setup::default();
    setup.engine.batch = 4;
    setup.engine.queue = 4;
    let server = serve(setup);
    let prompts: Vec<String> = (0..8)
        .map(|index| format!("{index} little words"))
        .collect();
    let alone: Vec<String> = prompts
        .iter()
        .map(|prompt| {
            server
                .post("/v1/completions", &ask(prompt, 30, false))
                .json()
        })
        .map(|value| value["choices"][0]["text"].as_str().unwrap().to_string())
        .collect();
    let outcomes: Vec<(usize, u16)> = std::thread::scope(|scope| {
        let client = |number: usize| {
            let (server, prompts, alone) = (&server, &prompts, &alone);
            move || {
                let mine = number % prompts.len();
                let mut seen = Vec::new();
                for turn in 0..6 {
                    let stream = (number + turn).is_multiple_of(2);
                    let answer = server.post("/v1/completions", &ask(&prompts[mine], 30, stream));
                    match (answer.status, stream) {
                        (200, false) => {
                            assert_eq!(answer.json()["choices"][0]["text"], alone[mine])
                        }
                        (200, true) => {
                            let events = answer.events();
                            assert_eq!(events.last().unwrap(), "[DONE]");
                            let text: String = events[..events.len() - 1]
                                .iter()
                                .map(|event| serde_json::from_str::<Value>(event).unwrap())
                                .map(|piece| {
                                    piece["choices"][0]["text"].as_str().unwrap().to_string()
                                })
                                .collect();
                            assert_eq!(text, alone[mine]);
                        }
                        _ => {
                            let (status, code, _) = answer.error();
                            assert_eq!((status, &*code), (429, "rate_limit_exceeded"));
                            assert!(answer.head.to_lowercase().contains("retry-after: 1"));
                        }
                    }
                    seen.push((mine, answer.status));
                }
                seen
            }
        };
        let threads: Vec<_> = (0..40).map(|number| scope.spawn(client(number))).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let of = |wanted: u16| {
        outcomes
            .iter()
            .filter(|(_, status)| *status == wanted)
            .count()
    };
    assert_eq!(of(200) + of(429), 240);
    assert!(
        of(200) >= 8 && of(429) >= 1,
        "{} answers, {} refusals",
        of(200),
        of(429)
    );
    assert_eq!(server.metric("anyformer_refused_total"), of(429) as f64);
    wait_until("nothing runs", || server.metric("anyformer_running") == 0.0);
}

/// A server whose answers may be as long as a test needs them.
fn long_answers() -> Setup {
    let mut setup = Setup::default();
    setup.engine.context = 2_000_000;
    setup.limits.max_tokens = 1_000_000;
    setup
}

#[test]
fn who_goes_away_is_not_worked_for() {
    let server = serve(long_answers());
    for (stream, gone) in [(true, 1.0), (false, 2.0)] {
        let body = ask("a long story", 1_000_000, stream).to_string();
        let mut socket = server.connect();
        socket
            .write_all(&request("POST", "/v1/completions", JSON, body.as_bytes()))
            .unwrap();
        wait_until("it runs", || server.metric("anyformer_running") == 1.0);
        if stream {
            let mut reader = BufReader::new(socket.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert!(line.contains("200"), "{line}");
        }
        drop(socket);
        let name = "anyformer_finished_total{reason=\"cancelled\"}";
        wait_until("it is cancelled", || server.metric(name) == gone);
        wait_until("nothing runs", || server.metric("anyformer_running") == 0.0);
    }
}

#[test]
fn who_breaks_later_is_not_worked_for() {
    let server = serve(long_answers());
    let body = ask("a long story", 1_000_000, false).to_string();
    let new = request("POST", "/v1/completions", JSON, body.as_bytes());
    let text = String::from_utf8(new.clone()).unwrap();
    let old = text.replace("HTTP/1.1", "HTTP/1.0").into_bytes();
    let ways = [(&new, true), (&old, true), (&new, false)];
    for (gone, (bytes, ends)) in (1..).zip(ways) {
        let mut socket = server.connect();
        socket.write_all(bytes).unwrap();
        match ends {
            true => socket.shutdown(Shutdown::Write).unwrap(),
            false => socket.write_all(b"GET /health HTTP/1.1\r\n").unwrap(),
        }
        wait_until("it runs", || server.metric("anyformer_running") == 1.0);
        // Two interim responses have been sent; the next comes after five seconds, and would find it then.
        std::thread::sleep(Duration::from_millis(800));
        assert_eq!(server.metric("anyformer_running"), 1.0);
        let broken = Instant::now();
        let now = Some(Duration::ZERO);
        socket2::SockRef::from(&socket).set_linger(now).unwrap();
        drop(socket);
        let name = "anyformer_finished_total{reason=\"cancelled\"}";
        wait_until("it is cancelled", || server.metric(name) == f64::from(gone));
        assert!(broken.elapsed() < Duration::from_secs(3), "way {gone}");
    }
}

#[test]
fn who_goes_away_while_waiting_leaves_the_queue() {
    let mut setup = long_answers();
    setup.engine.batch = 1;
    let server = serve(setup);
    let send = |stream: bool| {
        let body = ask("a long story", 1_000_000, stream).to_string();
        let mut socket = server.connect();
        socket
            .write_all(&request("POST", "/v1/completions", JSON, body.as_bytes()))
            .unwrap();
        socket
    };
    let first = send(true);
    wait_until("it runs", || server.metric("anyformer_running") == 1.0);
    for stream in [true, false] {
        let second = send(stream);
        wait_until("it waits", || server.metric("anyformer_waiting") == 1.0);
        drop(second);
        wait_until("it has left", || server.metric("anyformer_waiting") == 0.0);
    }
    assert_eq!(server.metric("anyformer_running"), 1.0);
    drop(first);
}

#[test]
fn who_only_stops_sending_is_answered() {
    let server = serve(Setup::default());
    let chat = |stream: bool| {
        json!({"messages": [{"role": "user", "content": "a story"}], "max_tokens": 600, "temperature": 0,
            "stream": stream})
        .to_string()
    };
    let path = "/v1/chat/completions";
    let text = |answer: &Answer, stream: bool| match stream {
        false => answer.json()["choices"][0]["message"]["content"].to_string(),
        true => {
            let events = answer.events();
            assert_eq!(events.last().unwrap(), "[DONE]");
            let pieces = events[..events.len() - 1].iter();
            let pieces = pieces.map(|event| serde_json::from_str::<Value>(event).unwrap());
            let content = |piece: Value| {
                let delta = &piece["choices"][0]["delta"]["content"];
                delta.as_str().unwrap_or_default().to_string()
            };
            json!(pieces.map(content).collect::<String>()).to_string()
        }
    };
    for stream in [false, true] {
        let bytes = request("POST", path, JSON, chat(stream).as_bytes());
        let whole = text(&server.raw(&bytes), stream);
        let mut socket = server.connect();
        socket.write_all(&bytes).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let mut reader = BufReader::new(socket);
        let answer = Answer::read(&mut reader).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(text(&answer, stream), whole);
        assert!(
            Answer::read(&mut reader).is_none(),
            "the connection is closed"
        );
    }
    // A client of HTTP/1.0 knows no interim responses.
    let old = String::from_utf8(request("POST", path, JSON, chat(false).as_bytes())).unwrap();
    let mut socket = server.connect();
    socket
        .write_all(old.replace("HTTP/1.1", "HTTP/1.0").as_bytes())
        .unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let answer = std::io::read_to_string(socket).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    let cancelled = server.metric("anyformer_finished_total{reason=\"cancelled\"}");
    assert_eq!(cancelled, 0.0);
}

#[test]
fn more_answers_than_may_wait_are_taken_where_none_waits() {
    let mut setup = Setup::default();
    setup.engine.batch = 2;
    setup.engine.queue = 3;
    let server = serve(setup);
    let mut body = ask("many", 4, false);
    body["n"] = json!(20);
    let value = server.post("/v1/completions", &body).json();
    assert_eq!(
        value["choices"].as_array().map(Vec::len),
        Some(20),
        "{value}"
    );
    assert_eq!(value["choices"][19]["text"], value["choices"][0]["text"]);
    assert_eq!(value["usage"]["completion_tokens"], 80);
}

#[test]
fn bodies_that_cannot_be_read_are_refused_with_a_reason() {
    let server = serve(Setup::default());
    let path = "/v1/completions";
    let big = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{JSON}content-length: 104857600\r\n\r\n");
    let claimed = server.raw(big.as_bytes());
    assert_eq!(
        (claimed.status, &*claimed.error().1),
        (413, "body_too_large")
    );
    // The same without a word about its length.
    let mut socket = server.connect();
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: x\r\n{JSON}transfer-encoding: chunked\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    let piece = [
        b"100000\r\n".to_vec(),
        vec![b' '; 1 << 20],
        b"\r\n".to_vec(),
    ]
    .concat();
    for _ in 0..100 {
        socket.write_all(&piece).unwrap();
    }
    let answer = Answer::read(&mut BufReader::new(socket)).unwrap();
    assert_eq!(answer.error().1, "body_too_large");
    // And sent whole, by a client that reads when it has written; with a wrong type, too.
    let whole = vec![b' '; 100 << 20];
    for (kind, status) in [(JSON, 413), ("content-type: text/plain\r\n", 415)] {
        let mut socket = server.connect();
        let bytes = request("POST", path, kind, &whole);
        socket.write_all(&bytes).unwrap();
        let answer = Answer::read(&mut BufReader::new(socket)).unwrap();
        assert_eq!(answer.error().0, status);
    }
    let deep = format!(
        "{{\"prompt\": {}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let long = json!({"prompt": "x".repeat(1_000_000)}).to_string();
    let ids = json!({"prompt": vec![7; 1_000_000]}).to_string();
    for (body, part) in [
        (&b"{\"prompt\": \"\xff\xfe\"}"[..], "read the JSON"),
        (b"{\"prompt\": \"\\ud800\"}", "read the JSON"),
        (deep.as_bytes(), "read the JSON"),
        (long.as_bytes(), "1000000 prompt tokens"),
        (ids.as_bytes(), "1000000 prompt tokens"),
        (b"", "read the JSON"),
        (b"null", "read the JSON"),
        (b"{\"prompt\": \"x\", \"prompt\": \"y\"}", "read the JSON"),
    ] {
        let answer = server.request("POST", path, JSON, body);
        let (status, _, message) = answer.error();
        assert_eq!(status, 400);
        assert!(message.contains(part), "{part}: {message}");
    }
    still_answers(&server);
}

#[test]
fn broken_json_is_answered_whatever_it_says() {
    let server = serve(Setup::default());
    let seeds = [
        json!({"prompt": "abc", "max_tokens": 2, "stop": ["x"], "temperature": 0.5, "n": 1, "seed": 3}),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 2, "logprobs": true, "stream": true}),
        json!({"name": "a", "prompt": "b", "state": "c"}),
        json!({"prompt": "a", "max_tokens": 2, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema":
            {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a+$"}}, "required": ["a"]}}}}),
    ];
    let paths = [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/states",
        "/v1/completions",
    ];
    let mut x = 1u64;
    let mut random = move |below: usize| {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (x >> 33) as usize % below
    };
    let bits = [
        "{",
        "}",
        "[",
        "]",
        "null",
        "-1",
        "1e999",
        "\"",
        ",",
        ":",
        "\\u0000",
        "9999999999999999999",
        "\u{fffd}",
        "true",
    ];
    let mut good = 0;
    for round in 0..800 {
        let mut body = seeds[round % 4].to_string().into_bytes();
        for _ in 0..random(4) {
            let at = random(body.len());
            match random(3) {
                0 => body[at] = random(256) as u8,
                1 => drop(body.remove(at)),
                _ => drop(body.splice(at..at, bits[random(bits.len())].bytes())),
            }
        }
        let answer = server.request("POST", paths[round % 4], JSON, &body);
        let shown = String::from_utf8_lossy(&body);
        match answer.status {
            200 => good += 1,
            400 | 404 | 507 => drop(answer.error()),
            status => panic!("{status} to {shown}"),
        }
    }
    assert!(good > 50, "{good} were good");
    still_answers(&server);
}

#[test]
fn sockets_that_do_not_speak_are_closed() {
    let server = serve(Setup {
        server: ServerConfig {
            head: Duration::from_millis(300),
            connections: 4,
            ..Setup::default().server
        },
        ..Setup::default()
    });
    let whole = request(
        "POST",
        "/v1/completions",
        JSON,
        ask("x", 2, false).to_string().as_bytes(),
    );
    // Half a request and silence, half a request and the end, nothing at all: more than there are places.
    let mut held = Vec::new();
    for number in 0..12 {
        let mut socket = server.connect();
        match number % 3 {
            0 => socket.write_all(&whole[..30]).unwrap(),
            1 => {
                socket.write_all(&whole[..whole.len() - 5]).unwrap();
                socket.shutdown(Shutdown::Write).unwrap();
            }
            _ => {}
        }
        held.push(socket);
    }
    still_answers(&server);
    assert_eq!(
        server.raw(b"\x16\x03\x01 no http at all\r\n\r\n").status,
        400
    );
    let long = format!("GET /health HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(200_000));
    assert_eq!(server.raw(long.as_bytes()).status, 431);
    still_answers(&server);
}

#[test]
fn a_reader_that_takes_nothing_loses_its_place() {
    let server = serve(Setup {
        server: ServerConfig {
            write: Duration::from_millis(300),
            connections: 1,
            ..Setup::default().server
        },
        ..Setup::default()
    });
    let mut body = ask("much to read", 4000, true);
    // More than the system's buffers hold, soon.
    body["logprobs"] = json!(20);
    body["n"] = json!(16);
    let mut socket = server.connect();
    let bytes = request("POST", "/v1/completions", JSON, body.to_string().as_bytes());
    socket.write_all(&bytes).unwrap();
    // There is one place, and it must come free although the socket stays open.
    still_answers(&server);
    drop(socket);
}

#[test]
fn a_stop_lets_answers_finish_and_then_ends_them() {
    for (drain, tokens) in [(20_000, 300), (100, 1_000_000)] {
        let server = serve(Setup {
            server: ServerConfig {
                drain: Duration::from_millis(drain),
                ..Setup::default().server
            },
            ..long_answers()
        });
        let mut socket = server.connect();
        let body = ask("to the end", tokens, true).to_string();
        socket
            .write_all(&request("POST", "/v1/completions", JSON, body.as_bytes()))
            .unwrap();
        wait_until("it runs", || server.metric("anyformer_running") == 1.0);
        server.stop();
        let events = Answer::read(&mut BufReader::new(socket)).unwrap().events();
        assert_eq!(events.last().unwrap(), "[DONE]");
        let last: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
        match tokens {
            300 => assert_eq!(last["choices"][0]["finish_reason"], "length"),
            _ => assert_eq!(last["error"]["code"], "stopping"),
        }
        let address = server.address;
        server.wait();
        assert!(std::net::TcpStream::connect(address).is_err());
    }
}

#[test]
fn a_late_answer_ends_with_an_error() {
    let mut setup = Setup::default();
    setup.limits.time = Some(Duration::from_millis(50));
    let server = serve(setup);
    let answer = server.post("/v1/completions", &ask("too long", 4000, false));
    assert_eq!((answer.status, &*answer.error().1), (504, "timeout"));
    let events = server
        .post("/v1/completions", &ask("too long", 4000, true))
        .events();
    assert!(events[events.len() - 2].contains("\"timeout\""));
}
