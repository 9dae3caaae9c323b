//! A server on a free port, and a client of a few lines over plain sockets.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use anyformer_data::Tokenizer;
use anyformer_serve::{
    App, Engine, EngineConfig, Limits, Metrics, Served, Server, ServerConfig, Stopper,
};
use serde_json::{Value, json};

use crate::models::model;

pub struct Running {
    pub address: SocketAddr,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

pub struct Setup {
    pub engine: EngineConfig,
    pub limits: Limits,
    pub server: ServerConfig,
    pub keys: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            engine: crate::models::config(),
            limits: Limits::default(),
            server: ServerConfig {
                address: SocketAddr::from(([127, 0, 0, 1], 0)),
                drain: Duration::from_secs(5),
                ..ServerConfig::default()
            },
            keys: Vec::new(),
        }
    }
}

pub fn serve(setup: Setup) -> Running {
    let metrics = Metrics::new().unwrap();
    let model = model(&json!([{"name": "mamba"}]));
    let engine = Engine::start(model, setup.engine.clone(), metrics.clone()).unwrap();
    serve_it(Served::Tokens(engine), metrics, setup)
}

pub fn serve_it(served: Served, metrics: Metrics, setup: Setup) -> Running {
    let app = App::new(
        served,
        metrics,
        Tokenizer::Bytes,
        None,
        Vec::new(),
        "tiny".into(),
        &setup.keys,
        setup.limits,
    );
    let server = Server::bind(app, setup.server).unwrap();
    Running {
        address: server.address(),
        stopper: server.stopper(),
        thread: Some(std::thread::spawn(move || server.run())),
    }
}

impl Running {
    pub fn stop(&self) {
        self.stopper.stop();
    }

    /// Waits for the end.
    pub fn wait(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Sends raw bytes and reads one answer.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that has seen enough may close before it has read all.
        let _ = stream.write_all(bytes);
        Answer::read(&mut BufReader::new(stream)).unwrap()
    }

    pub fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        self.raw(&request(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, JSON, body.to_string().as_bytes())
    }

    /// A number of the metrics page.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub const JSON: &str = "content-type: application/json\r\n";

pub fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    /// One answer, interim ones left out; `None` where the connection was closed without one.
    pub fn read(stream: &mut impl BufRead) -> Option<Answer> {
        let (head, status) = loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if stream.read_line(&mut head).ok()? == 0 {
                    return None;
                }
            }
            let status: u16 = head.split(' ').nth(1)?.parse().ok()?;
            if status != 100 {
                break (head, status);
            }
        };
        let lower = head.to_lowercase();
        let mut body = Vec::new();
        if let Some(at) = lower.find("content-length: ") {
            let length = lower[at + 16..].lines().next()?.parse().ok()?;
            body.resize(length, 0);
            stream.read_exact(&mut body).ok()?;
        } else if lower.contains("transfer-encoding: chunked") {
            loop {
                let mut size = String::new();
                stream.read_line(&mut size).ok()?;
                let size = usize::from_str_radix(size.trim(), 16).ok()?;
                let mut piece = vec![0; size + 2];
                stream.read_exact(&mut piece).ok()?;
                if size == 0 {
                    break;
                }
                body.extend_from_slice(&piece[..size]);
            }
        }
        Some(Answer { status, head, body })
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        let parsed = serde_json::from_slice(&self.body);
        parsed.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The data of server-sent events.
    pub fn events(&self) -> Vec<String> {
        let text = self.text();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(str::to_string).collect()
    }

    /// The error, which must have the API's own form.
    pub fn error(&self) -> (u16, String, String) {
        let value = self.json();
        let text = |key: &str| value["error"][key].as_str().unwrap_or_default().to_string();
        assert!(value["error"]["message"].is_string(), "{value}");
        assert!(value["error"]["type"].is_string(), "{value}");
        (self.status, text("code"), text("message"))
    }
}
