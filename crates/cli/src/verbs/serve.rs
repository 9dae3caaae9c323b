//! `anyformer serve FOLDER`: a language model, or an encoder, over HTTP.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyformer_hub::ChatTemplate;
use anyformer_models::Reads;
use anyformer_serve::{
    App, Encoder, EncoderConfig, Engine, EngineConfig, EngineError, Limits, Metrics, Served,
    Server, ServerConfig, StatesConfig,
};
use anyhow::Context;
use serde_json::json;

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::products::Products;
use crate::say::Say;
use crate::session::{gives_tokens, open_model};
use crate::setup::{device, device_name, start_threads_beside, stop_on_signal};
use crate::verbs::generate::{can_generate, tokenizer};

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken) or a model folder
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Address to listen on; anything but loopback lets other machines ask
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0: a free one
    #[arg(long, value_name = "N", default_value_t = 8080)]
    pub port: u16,
    /// The model's name for clients [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// A file with one API key per line; without it everyone who reaches the port may ask
    #[arg(long, value_name = "FILE")]
    pub api_keys: Option<PathBuf>,
    /// Certificate chain (PEM) for HTTPS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key (PEM) for HTTPS
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// How much runs together
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Tokens of one answer
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub max_tokens: usize,
    /// Bytes of one request's body
    #[arg(long, value_name = "N", default_value_t = 4 << 20)]
    pub max_body: usize,
    /// Seconds for one answer; 0: no limit
    #[arg(long, value_name = "S", default_value_t = 600)]
    pub time_limit: u64,
    /// Connections at the same time
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub connections: usize,
    /// Seconds for running answers to finish after SIGTERM or Ctrl-C
    #[arg(long, value_name = "S", default_value_t = 30)]
    pub drain: u64,
}

/// Flags of the engine, for serving and for measuring.
#[derive(Debug, clap::Args)]
pub struct EngineArgs {
    /// Sequences that run together
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub batch: usize,
    /// Answers that may wait, of an encoder texts; with so many, further requests are refused with 429
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub queue: usize,
    /// Tokens of one sequence, prompt and answer together
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub context: usize,
    /// Prompts are read in pieces of so many tokens, between decoding steps
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub chunk: usize,
    /// Tokens to guess ahead for each answer: what followed the same words earlier in its text; 0: none
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub speculate: usize,
    /// How it multiplies
    #[command(flatten)]
    pub products: Products,
    /// Milliseconds that a text for an encoder waits for others to join it
    #[arg(long, value_name = "MS", default_value_t = 2)]
    pub wait: u64,
    /// A folder for states, so that they survive a restart
    #[arg(long, value_name = "FOLDER")]
    pub states: Option<PathBuf>,
    /// MiB of states in memory
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub state_memory: u64,
    /// MiB of states without a name in the folder
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub state_disk: u64,
}

/// A model folder as something to serve, and the size of its vocabulary.
pub(crate) fn app(
    folder: &Path,
    args: &EngineArgs,
    name: &str,
    keys: &[String],
    limits: Limits,
    global: &Global,
) -> Result<(App, usize), Failure> {
    let mut opened = open_model(folder)?;
    let encodes = !gives_tokens(&opened.config);
    if !encodes {
        can_generate(&opened)?;
    }
    let tokenizer = tokenizer(&opened)?;
    let template = ChatTemplate::of(&opened).input()?;
    let stop_ids = opened.end_tokens().input()?;
    let device = device(&device_name(global, None))?;
    let metrics = Metrics::new().broken()?;
    let vocab = match opened.config.reads {
        Reads::Tokens { vocab } => vocab,
        Reads::Patches { .. } => 0,
    };
    let model = args.products.load(&mut opened, &device)?;
    let started = match encodes {
        true => {
            let own = opened.sentence_vectors().input()?;
            let longest = own.and_then(|own| own.tokens).unwrap_or(usize::MAX);
            let config = EncoderConfig {
                wait: Duration::from_millis(args.wait),
                queue: args.queue,
                context: args.context.min(longest),
                pool: own.map(|own| own.pool),
                unit: own.is_none_or(|own| own.unit),
                ..EncoderConfig::default()
            };
            Encoder::start(model, config, metrics.clone()).map(Served::Vectors)
        }
        false => {
            let config = EngineConfig {
                batch: args.batch,
                queue: args.queue,
                context: args.context,
                chunk: args.chunk,
                prefill: 2 * args.chunk,
                speculate: args.speculate,
                states: StatesConfig {
                    memory: args.state_memory << 20,
                    folder: args.states.clone(),
                    disk: args.state_disk << 20,
                },
            };
            Engine::start(model, config, metrics.clone()).map(Served::Tokens)
        }
    };
    let served = match started {
        Err(error @ EngineError::Thread(_)) => return Err(Failure::Broken(error.into())),
        other => other.input()?,
    };
    let app = App::new(
        served,
        metrics,
        tokenizer,
        template,
        stop_ids,
        name.to_string(),
        keys,
        limits,
    );
    Ok((app, vocab))
}

/// Serves until SIGTERM or Ctrl-C.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let keys = match &args.api_keys {
        Some(path) => keys(path)?,
        None => Vec::new(),
    };
    let own = || folder_name(&args.folder);
    let name = args.name.clone().unwrap_or_else(own);
    let limits = Limits {
        body: args.max_body,
        max_tokens: args.max_tokens,
        time: (args.time_limit > 0).then(|| Duration::from_secs(args.time_limit)),
        ..Limits::default()
    };
    let threads = start_threads_beside(global)?;
    let (app, _) = app(&args.folder, &args.engine, &name, &keys, limits, global)?;
    let server = Server::bind(
        app,
        ServerConfig {
            address: SocketAddr::new(args.host, args.port),
            connections: args.connections,
            drain: Duration::from_secs(args.drain),
            tls: args.tls_cert.clone().zip(args.tls_key.clone()),
            ..ServerConfig::default()
        },
    )
    .input()?;
    let stopper = server.stopper();
    stop_on_signal(move || stopper.stop())?;
    let url = server.url();
    let value = json!({"url": url, "model": name, "threads": threads});
    say.result(&value, || {
        format!("serving {name} at {url} (a page for a chat: {url}/ui)")
    });
    if !args.host.is_loopback() && keys.is_empty() {
        say.note(
            "note: other machines can reach this port and no API key is asked for; see --api-keys",
        );
    }
    server.run();
    say.note("stopped");
    Ok(())
}

/// The last part of the folder's path that says something.
fn folder_name(folder: &Path) -> String {
    let whole = folder
        .canonicalize()
        .unwrap_or_else(|_| folder.to_path_buf());
    let name = whole
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "model".to_string())
}

fn keys(path: &Path) -> Result<Vec<String>, Failure> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("read {}", path.display()))
        .input()?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let keys: Vec<String> = lines.map(str::to_string).collect();
    match keys.is_empty() {
        true => Err(bad_input(format!("read {}: no key in it", path.display()))),
        false => Ok(keys),
    }
}
