//! `anyformer generate FOLDER`: the prompt is read at once, then one token a step from the carried state.

use std::path::PathBuf;

use anyformer_data::Tokenizer;
use anyformer_hub::ModelFolder;
use anyformer_mixers::token_mixer;
use anyformer_models::Reads;
use anyhow::Context;
use serde_json::json;

use crate::args::Global;
use crate::continuation::{Sampling, Writer};
use crate::exit::{Failure, Kind, bad_input};
use crate::products::Products;
use crate::say::Say;
use crate::session::{gives_tokens, open_model};
use crate::setup::{device, device_name, start_threads};

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken), a model folder, or a GGUF file
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
    /// How it multiplies
    #[command(flatten)]
    pub products: Products,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: Sampling,
}

/// Streams the continuation.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let mut sampler = args.sampling.sampler(say)?;
    let prompt = prompt(args)?;
    let mut opened = open_model(&args.folder)?;
    can_generate(&opened)?;
    let tokenizer = tokenizer(&opened)?;
    let ids = tokenizer.encode_whole(&prompt).input()?;
    let ends = opened.end_tokens().input()?;
    let grammar = args
        .sampling
        .grammar(&tokenizer, opened.config.reads, &ends)?;
    let device = device(&device_name(global, None))?;
    start_threads(global, None)?;
    let model = args.products.load(&mut opened, &device)?;
    let writer = Writer {
        model: &model,
        tokenizer: &tokenizer,
        ends: &ends,
        sampling: &args.sampling,
        grammar,
    };
    let mut begun = false;
    let made = writer.go_on(&mut sampler, &ids, None, &mut |part| {
        if !say.is_json() {
            if !std::mem::replace(&mut begun, true) {
                say.raw(prompt.as_bytes());
            }
            say.raw(part.as_bytes());
        }
        !say.is_gone()
    })?;
    if say.is_json() {
        let mut value = json!({
            "prompt": prompt, "text": made.text, "tokens": made.tokens, "finish": made.finish,
            "prompt_tokens": ids.len(), "prefill_s": made.prefill_s, "decode_s": made.decode_s,
            "state_bytes": made.state.bytes(),
        });
        if args.sampling.speculate > 0 {
            value["guessed"] = json!(made.guesses.made);
            value["accepted"] = json!(made.guesses.accepted);
        }
        if args.sampling.logprobs.is_some() {
            value["logprobs"] = json!(made.logprobs);
        }
        say.result(&value, String::new);
    } else {
        say.raw(b"\n");
        let speed = made.tokens.len() as f64 / made.decode_s.max(1e-9);
        let guesses = match args.sampling.speculate {
            0 => String::new(),
            _ => format!(
                ", {} of {} guesses accepted",
                made.guesses.accepted, made.guesses.made
            ),
        };
        say.note(format!(
            "{} tokens, {speed:.0} tokens/s, state {} bytes{guesses}",
            made.tokens.len(),
            made.state.bytes()
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
            "generate with {path}: it is a classifier or an encoder and makes no text"
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
            "read the tokenizer of {}: it has no tokenizer.json, so its tokens are no text",
            opened.path.display()
        ))),
    }
}
