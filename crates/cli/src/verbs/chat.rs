//! `anyformer chat FOLDER`: turns from standard input, answers to standard output, the state carried from turn to turn.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use anyformer_hub::{ChatTemplate, Message};
use anyformer_models::ModelState;
use anyhow::Context;
use serde_json::json;

use crate::args::Global;
use crate::continuation::{Sampling, Writer};
use crate::exit::{Failure, Kind, bad_input};
use crate::products::Products;
use crate::say::Say;
use crate::session::open_model;
use crate::setup::{device, device_name, start_threads};
use crate::verbs::generate::{can_generate, tokenizer};

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A model folder with a chat template, or a GGUF file
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// How it multiplies
    #[command(flatten)]
    pub products: Products,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: Sampling,
}

/// What the model has read of the conversation so far.
#[derive(Default)]
struct Read {
    text: String,
    state: Option<ModelState>,
    /// The last token made, where the state has not read it.
    pending: Option<u32>,
}

/// Answers every line until the input ends; `/new` begins another conversation.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let mut sampler = args.sampling.sampler(say)?;
    let mut opened = open_model(&args.folder)?;
    can_generate(&opened)?;
    let shown = opened.path.display().to_string();
    let template = ChatTemplate::of(&opened).input()?.ok_or_else(|| {
        bad_input(format!(
            "chat with {shown}: it has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); `anyformer generate` continues plain text"
        ))
    })?;
    let tokenizer = tokenizer(&opened)?;
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
    let system = || -> Vec<Message> {
        let text = args.system.iter();
        text.map(|text| Message::new("system", text)).collect()
    };
    let mut turns = system();
    let mut read = Read::default();
    let mut input = std::io::stdin().lock();
    let asks = std::io::stdin().is_terminal() && !say.is_quiet() && !say.is_json();
    loop {
        if asks {
            // Nothing is left to do when even this cannot be written.
            let _ = write!(std::io::stderr(), "> ").and_then(|()| std::io::stderr().flush());
        }
        let mut line = String::new();
        let count = input.read_line(&mut line);
        if count.context("read a turn from standard input").input()? == 0 || say.is_gone() {
            return Ok(());
        }
        match line.trim() {
            "" => continue,
            "/new" => {
                (turns, read) = (system(), Read::default());
                continue;
            }
            turn => turns.push(Message::new("user", turn)),
        }
        let text = template.render(&turns, true).input()?;
        // Where the template goes on from what was read, only the rest is read; else all of it again.
        let rest = match (&read.state, text.strip_prefix(&read.text)) {
            (Some(_), Some(rest)) => rest,
            _ => {
                read = Read::default();
                &text[..]
            }
        };
        let mut ids: Vec<u32> = read.pending.into_iter().collect();
        ids.extend(tokenizer.encode(rest).input()?);
        let made = writer.go_on(&mut sampler, &ids, read.state.as_ref(), &mut |part| {
            if !say.is_json() {
                say.raw(part.as_bytes());
            }
            !say.is_gone()
        })?;
        if say.is_json() {
            let mut value = json!({
                "answer": made.text, "tokens": made.tokens, "finish": made.finish, "read_tokens": ids.len(),
                "prefill_s": made.prefill_s, "decode_s": made.decode_s, "state_bytes": made.state.bytes(),
            });
            if args.sampling.logprobs.is_some() {
                value["logprobs"] = json!(made.logprobs);
            }
            say.result(&value, String::new);
        } else {
            say.raw(b"\n");
        }
        // An answer that a stop string cut has tokens that the conversation does not.
        read = match made.finish {
            "stop" => Read::default(),
            _ => Read {
                text: text + &made.text,
                state: Some(made.state),
                pending: made.pending,
            },
        };
        turns.push(Message::new("assistant", &made.text));
    }
}
