//! `anyformer info NAME`: the card of a mixer and the exact cost of a model made of it, or of a model folder. No parameter
//! is allocated.

use std::fmt::Write;
use std::path::Path;

use anyformer_lab::units::{bytes, count, grouped};
use anyformer_mixers::card::nearest_name;
use anyformer_mixers::{
    Card, Cost, MixerSpec, Options, channel_mixer, channel_mixers, token_mixer, token_mixers,
};
use anyformer_models::{Gives, Model, ModelConfig, Pool};
use serde_json::{Map, Value, json};

use crate::exit::{Failure, Kind, bad_input};
use crate::overrides::{self, Override};
use crate::say::Say;
use crate::verbs::info_model;
use crate::verbs::list::{card_json, direction};

/// Adds the operations and the state of a model to a text.
pub(super) fn costs(text: &mut String, cost: &Cost, per_token: u64, time: usize) {
    let _ = writeln!(
        text,
        "  FLOPs per token  {} ({}; forward, {} tokens, a multiply-add is 2)",
        grouped(per_token),
        count(per_token as f64),
        grouped(time as u64)
    );
    let _ = writeln!(
        text,
        "  state            {} bytes ({}) after {} tokens of one sequence",
        grouped(cost.state_bytes),
        bytes(cost.state_bytes as f64),
        grouped(time as u64)
    );
}

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A token mixer or channel mixer, or else a run folder, model folder or GGUF file
    pub name: String,
    /// A published size, as `130m` [default: a small model of this mixer]
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Change a key of the model, as `dim=256`, or a knob of the mixer, as `heads=8`; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Tokens of the sequence whose cost is told
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub time: u32,
}

/// Prints the card and the cost.
pub fn run(args: &Args, say: &Say) -> Result<(), Failure> {
    let found = find(&args.name);
    let path = Path::new(&args.name);
    if found.is_err() && path.exists() {
        if args.preset.is_some() || !args.set.is_empty() {
            return Err(bad_input(format!(
                "tell about {}: it is a model, which has no presets and cannot be changed; leave --preset and --set out",
                path.display()
            )));
        }
        return info_model::run(path, args.time as usize, say);
    }
    let (card, resolve, is_token) = found?;
    let config = config(args, card, is_token)?;
    let model = Model::shapes(&config).input()?;
    let time = args.time as usize;
    let cost = model.cost(time);
    let params = model.params().count() as u64;
    let spec = match is_token {
        true => config.mixer(0),
        false => &config.channel,
    };
    let knobs = resolve(&spec.options).input()?;
    let per_token = cost.flops / time as u64;
    let mut value = card_json(card);
    if let Value::Object(map) = &mut value {
        map.insert("equation".into(), json!(card.equation));
        map.insert("notes".into(), json!(card.notes));
        map.insert("knobs".into(), Value::Object(knobs.clone()));
        map.insert("preset".into(), json!(args.preset));
        map.insert("model".into(), Value::Object(config.to_json()));
        map.insert("time".into(), json!(time));
        map.insert("parameters".into(), json!(params));
        map.insert("flops_per_token".into(), json!(per_token));
        map.insert("state_bytes".into(), json!(cost.state_bytes));
    }
    say.result(&value, || {
        let mut text = about(card, &knobs, is_token);
        let size = match &args.preset {
            Some(preset) => format!("preset {preset}"),
            None => "a small model".to_string(),
        };
        let mixers: Vec<&str> = config
            .mixers
            .iter()
            .map(|spec| spec.name.as_str())
            .collect();
        let _ = writeln!(
            text,
            "\nModel ({size}): dim {}, {} layers of {} + {}",
            config.dim,
            config.layers,
            mixers.join(", "),
            config.channel.name
        );
        let _ = writeln!(text, "  parameters       {}", grouped(params));
        costs(&mut text, &cost, per_token, time);
        text
    });
    Ok(())
}

fn about(card: &Card, knobs: &Options, is_token: bool) -> String {
    let mut text = format!("{}: {}\n{}\n\n", card.name, card.title, card.paper);
    for line in card.equation.lines() {
        let _ = writeln!(text, "    {line}");
    }
    let _ = writeln!(text, "\n{}", card.notes);
    if is_token {
        let streams = if card.streams { "yes" } else { "no" };
        let _ = writeln!(
            text,
            "\nDirection {}; streams: {streams}; state: {}",
            direction(card),
            card.state
        );
    }
    if !card.knobs.is_empty() {
        let rows: Vec<Vec<String>> = card
            .knobs
            .iter()
            .map(|knob| {
                let value = knobs
                    .get(knob.name)
                    .map_or(String::new(), ToString::to_string);
                vec![knob.name.to_string(), value, knob.doc.to_string()]
            })
            .collect();
        let _ = write!(
            text,
            "\n{}",
            crate::format::table(&["knob", "value", "meaning"], &[], &rows)
        );
    }
    text
}

type Resolve = fn(&Options) -> Result<Options, anyformer_mixers::ConfigError>;

/// The mixer of either kind.
fn find(name: &str) -> Result<(&'static Card, Resolve, bool), Failure> {
    if let Ok(entry) = token_mixer(name) {
        return Ok((entry.card, entry.resolve, true));
    }
    if let Ok(entry) = channel_mixer(name) {
        return Ok((entry.card, entry.resolve, false));
    }
    let tokens = token_mixers().iter().map(|entry| entry.card.name);
    let names = tokens.chain(channel_mixers().iter().map(|entry| entry.card.name));
    let hint =
        nearest_name(name, names).map_or(String::new(), |hint| format!("; did you mean {hint:?}?"));
    Err(bad_input(format!(
        "find the mixer {name:?}: no such name{hint} `anyformer list` shows all"
    )))
}

fn config(args: &Args, card: &'static Card, is_token: bool) -> Result<ModelConfig, Failure> {
    let mut table = match &args.preset {
        None => {
            let spec = MixerSpec::named(card.name);
            let config = match is_token {
                true => of_mixer(spec),
                false => ModelConfig {
                    channel: spec,
                    ..ModelConfig::default()
                },
            };
            config.to_json()
        }
        Some(name) => preset(card, name)?,
    };
    let known = ModelConfig::default().to_json();
    for text in &args.set {
        let change = overrides::parse(text)?;
        let change = match known.contains_key(&change.path[0]) {
            true => change,
            false => knob(card, is_token, change, &known)?,
        };
        overrides::apply(&mut table, &change)?;
    }
    crate::run_file::expand_mixers(&mut table);
    ModelConfig::from_json(&Value::Object(table)).input()
}

/// The default model with this token mixer: a language model where the mixer looks back only, else a classifier.
pub(crate) fn of_mixer(spec: MixerSpec) -> ModelConfig {
    let config = ModelConfig {
        mixers: vec![spec],
        ..ModelConfig::default()
    };
    match config.causal() {
        true => config,
        false => ModelConfig {
            gives: Gives::class(10, Pool::Mean),
            ..config
        },
    }
}

/// `heads=8` means the knob of the mixer that is shown.
fn knob(
    card: &Card,
    is_token: bool,
    change: Override,
    known: &Map<String, Value>,
) -> Result<Override, Failure> {
    let key = change.path[0].as_str();
    if !card.knobs.iter().any(|knob| knob.name == key) {
        let names = card.knobs.iter().map(|knob| knob.name);
        let hint = nearest_name(key, names.chain(known.keys().map(String::as_str)));
        let hint = hint.map_or(String::new(), |hint| format!("; did you mean {hint:?}?"));
        return Err(bad_input(format!(
            "set {key:?}: neither a knob of {} nor a key of the model{hint}",
            card.name
        )));
    }
    let front: &[&str] = if is_token {
        &["mixers", "0"]
    } else {
        &["channel"]
    };
    let front = front.iter().map(ToString::to_string);
    Ok(Override {
        path: front.chain(change.path).collect(),
        value: change.value,
    })
}

fn preset(card: &Card, name: &str) -> Result<Map<String, Value>, Failure> {
    let Some(preset) = card.presets.iter().find(|preset| preset.name == name) else {
        let names: Vec<&str> = card.presets.iter().map(|preset| preset.name).collect();
        let all = match names.is_empty() {
            true => "it has none".to_string(),
            false => format!("it has {}", names.join(", ")),
        };
        return Err(bad_input(format!(
            "find preset {name:?} of {}: {all}",
            card.name
        )));
    };
    let table: Map<String, Value> = serde_json::from_str(preset.model).broken()?;
    let mut full = ModelConfig::from_json(&Value::Object(table))
        .broken()?
        .to_json();
    crate::run_file::expand_mixers(&mut full);
    Ok(full)
}
