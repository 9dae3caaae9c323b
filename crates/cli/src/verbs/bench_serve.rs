//! `anyformer bench serve`: a load on a server that runs, or on one started for it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyformer_lab::units::seconds;
use anyformer_serve::{Limits, LoadConfig, LoadReport, Quantiles, Server, ServerConfig, run_load};
use serde_json::json;

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::format::table;
use crate::say::Say;
use crate::session::open_model;
use crate::setup::start_threads_beside;
use crate::verbs::generate::can_generate;
use crate::verbs::serve::{EngineArgs, app};

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder or a model folder to serve on a free port and measure
    #[arg(value_name = "FOLDER", required_unless_present = "address")]
    pub folder: Option<PathBuf>,
    /// A server that runs, as 127.0.0.1:8080
    #[arg(long, value_name = "ADDRESS", conflicts_with = "folder")]
    pub address: Option<SocketAddr>,
    /// Requests per second, on average; they come whether or not the server keeps up
    #[arg(long, value_name = "X", default_value_t = 4.0)]
    pub rate: f64,
    /// Requests
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub requests: usize,
    /// Longest prompt in tokens; the mean is 0.6 of it
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub prompt: usize,
    /// Longest answer in tokens; the mean is 0.6 of it
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub answer: usize,
    /// Prompts are random tokens below this [default: the model's vocabulary; 256 with --address]
    #[arg(long, value_name = "N")]
    pub vocab: Option<u32>,
    /// API key of the server that runs
    #[arg(long, value_name = "KEY", requires = "address")]
    pub api_key: Option<String>,
    /// Seed of arrivals, lengths and tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// The engine of the server that is started
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// Prints the report.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let mut config = LoadConfig {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        rate: args.rate,
        requests: args.requests,
        prompt: args.prompt,
        answer: args.answer,
        vocab: args.vocab.unwrap_or(256),
        key: args.api_key.clone(),
        seed: args.seed,
        patience: Duration::from_secs(600),
    };
    let report = match (&args.folder, args.address) {
        (Some(folder), _) => {
            can_generate(&open_model(folder)?)?;
            start_threads_beside(global)?;
            let limits = Limits::default();
            let (app, vocab) = app(folder, &args.engine, "model", &[], limits, global)?;
            config.vocab = args.vocab.unwrap_or(vocab as u32);
            let server = Server::bind(
                app,
                ServerConfig {
                    address: config.address,
                    connections: args.requests.max(1024),
                    ..ServerConfig::default()
                },
            )
            .input()?;
            config.address = server.address();
            let stopper = server.stopper();
            let serving = std::thread::spawn(move || server.run());
            let report = run_load(config);
            stopper.stop();
            // What it was asked has been answered by now.
            let _ = serving.join();
            report.input()?
        }
        (None, Some(address)) => {
            config.address = address;
            run_load(config).input()?
        }
        (None, None) => return Err(bad_input("measure: give FOLDER or --address")),
    };
    say.result(&json!(report), || text(&report));
    Ok(())
}

fn text(report: &LoadReport) -> String {
    let row = |name: &str, times: &Quantiles| {
        let times = [times.p50, times.p90, times.p99, times.max];
        [vec![name.to_string()], times.map(seconds).to_vec()].concat()
    };
    let rows = [
        row("first token", &report.first_token_s),
        row("between tokens", &report.inter_token_s),
        row("whole answer", &report.total_s),
    ];
    let header = ["", "median", "90 %", "99 %", "longest"];
    let mut text = table(&header, &[1, 2, 3, 4], &rows);
    text += &format!(
        "\n{} of {} answered, {} refused, {} failed; {:.0} tokens/s made in {} at {} requests/s\n",
        report.answered,
        report.requests,
        report.refused,
        report.failed,
        report.tokens_per_s,
        seconds(report.seconds),
        report.rate,
    );
    if let Some(failure) = &report.failure {
        text += &format!("one failure: {failure}\n");
    }
    text
}
