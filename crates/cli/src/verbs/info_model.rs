//! `anyformer info FOLDER`: what a model folder or GGUF file holds, and what it costs. No weight is read.

use std::fmt::Write;
use std::path::Path;

use anyformer_hub::ChatTemplate;
use anyformer_lab::units::{bytes, grouped};
use anyformer_models::{Gives, Model};
use serde_json::json;

use crate::exit::{Failure, Kind};
use crate::say::Say;
use crate::session::open_model;

/// Prints config, parameters, cost and state.
pub(crate) fn run(path: &Path, time: usize, say: &Say) -> Result<(), Failure> {
    let opened = open_model(path)?;
    let config = &opened.config;
    let model = Model::shapes(config).input()?;
    let cost = model.cost(time);
    let params = model.params().count() as u64;
    let per_token = cost.flops / time as u64;
    let chat = ChatTemplate::of(&opened).input()?.is_some();
    let kind = opened.family.map_or("anyformer", |family| family.kind());
    let value = json!({
        "model": opened.path, "model_type": kind, "config": config.to_json(), "parameters": params, "time": time,
        "flops_per_token": per_token, "state_bytes": cost.state_bytes, "chat_template": chat, "info": opened.info,
        "quantisation": opened.quantisation,
    });
    say.result(&value, || {
        let gives = match config.gives {
            Gives::NextToken { .. } => "the next token".to_string(),
            Gives::Class { classes, .. } => format!("one of {classes} classes"),
            Gives::MaskedToken => "the token of every position".to_string(),
            Gives::Hidden => "the hidden vector of every position".to_string(),
        };
        let mut names: Vec<&str> = Vec::new();
        for spec in config.mixers.iter().take(config.layers) {
            if names.last() != Some(&spec.name.as_str()) {
                names.push(&spec.name);
            }
        }
        let mut text = format!(
            "{}: model_type {kind}, gives {gives}\n",
            opened.path.display()
        );
        let _ = writeln!(
            text,
            "dim {}, {} layers of {} + {}\n",
            config.dim,
            config.layers,
            names.join(", "),
            config.channel.name
        );
        let _ = writeln!(
            text,
            "  parameters       {} ({} as f32)",
            grouped(params),
            bytes(4.0 * params as f64)
        );
        if let Some(how) = &opened.quantisation {
            let group = match how.group {
                0 => "the whole row".to_string(),
                group => format!("{group} neighbours"),
            };
            let _ = writeln!(
                text,
                "  quantised        {} bits by {}, a scale for {group}",
                how.bits,
                how.method.name()
            );
        }
        super::info::costs(&mut text, &cost, per_token, time);
        let _ = writeln!(
            text,
            "  chat template    {}",
            if chat { "yes" } else { "no" }
        );
        text
    });
    Ok(())
}
