//! `anyformer generate FOLDER`: the prompt is read at once, then one token a step from the carried state.

use std::path::PathBuf;
use std::time::Instant;

use anyformer_data::Tokenizer;
use anyformer_hub::ModelFolder;
use anyformer_mixers::token_mixer;
use anyformer_models::{Reads, SampleOptions, Sampler};
use anyformer_ops::tensor_values;
use anyhow::Context;
use serde_json::json;

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::say::Say;
use crate::session::{gives_tokens, open_model};
use crate::setup::{device, device_name, start_threads};
use crate::text_stream::TextStream;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken) or a model folder
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// The text to continue
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file"
    )]
    pub prompt: Option<String>,
    /// A file (UTF-8) that holds the text to continue
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Tokens to make
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub max_tokens: usize,
    /// Scores are divided by it; 0 always takes the likeliest token (greedy)
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub temperature: f32,
    /// Choose among the N likeliest tokens; 0: among all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the fewest tokens that hold this share of the probability
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub top_p: f32,
    /// Seed of the choice; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// Streams the continuation.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let options = SampleOptions {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut sampler = Sampler::new(options).input()?;
    let prompt = prompt(args)?;
    let opened = open_model(&args.folder)?;
    can_generate(&opened)?;
    let tokenizer = tokenizer(&opened)?;
    let ids = tokenizer.encode(&prompt).input()?;
    if ids.is_empty() {
        return Err(bad_input(
            "read the prompt: it is empty; give at least one character",
        ));
    }
    let device = device(&device_name(global, None))?;
    start_threads(global, None)?;
    let model = opened.load(&device).input()?;

    if !say.is_json() {
        say.raw(prompt.as_bytes());
    }
    let began = Instant::now();
    // A prompt that does not fit the model (too long for its positions) is the user's to change.
    let (mut scores, mut state) = model.prefill(&ids, 1, None, None).input()?;
    let prefill_s = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let mut stream = TextStream::default();
    let mut text = String::new();
    let mut made = Vec::new();
    let mut give = |part: String| {
        if !say.is_json() {
            say.raw(part.as_bytes());
        }
        text.push_str(&part);
    };
    for index in 0..args.max_tokens {
        let id = sampler.choose(&tensor_values(scores));
        made.push(id);
        give(stream.push(&tokenizer.decode(&[id])));
        if index + 1 == args.max_tokens || say.is_gone() {
            break;
        }
        (scores, state) = model.step(&[id], &state).broken()?;
    }
    give(stream.finish());
    let decode_s = began.elapsed().as_secs_f64();
    if say.is_json() {
        let value = json!({
            "prompt": prompt, "text": text, "tokens": made, "prompt_tokens": ids.len(),
            "prefill_s": prefill_s, "decode_s": decode_s, "state_bytes": state.bytes(),
        });
        say.result(&value, String::new);
    } else {
        say.raw(b"\n");
        let speed = made.len() as f64 / decode_s.max(1e-9);
        say.note(format!(
            "{} tokens, {speed:.0} tokens/s, state {} bytes",
            made.len(),
            state.bytes()
        ));
    }
    Ok(())
}

fn prompt(args: &Args) -> Result<String, Failure> {
    match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) => std::fs::read_to_string(path)
            .with_context(|| format!("read {}", path.display()))
            .input(),
        (None, None) => Err(bad_input(
            "generate: give --prompt TEXT or --prompt-file FILE",
        )),
    }
}

/// Refuses models that make no text before anything is loaded.
pub(crate) fn can_generate(opened: &ModelFolder) -> Result<(), Failure> {
    let path = opened.path.display();
    if !gives_tokens(&opened.config) {
        return Err(bad_input(format!(
            "generate with {path}: it is a classifier; `anyformer eval` scores it"
        )));
    }
    for spec in &opened.config.mixers {
        if !token_mixer(&spec.name).input()?.streams(&spec.options) {
            return Err(bad_input(format!(
                "generate with {path}: its mixer {} cannot stream, so it has no state to go on from (see `anyformer info {}`)",
                spec.name, spec.name
            )));
        }
    }
    Ok(())
}

/// The folder's own tokenizer; without one, a vocabulary of 256 is bytes.
pub(crate) fn tokenizer(opened: &ModelFolder) -> Result<Tokenizer, Failure> {
    match (opened.tokenizer().input()?, opened.config.reads) {
        (Some(text), _) => Tokenizer::from_json(&text)
            .with_context(|| format!("read the tokenizer of {}", opened.path.display()))
            .input(),
        (None, Reads::Tokens { vocab: 256 }) => Ok(Tokenizer::Bytes),
        (None, _) => Err(bad_input(format!(
            "generate with {}: it has no tokenizer.json, so its tokens are no text",
            opened.path.display()
        ))),
    }
}
