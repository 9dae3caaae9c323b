//! `anyformer eval FOLDER`.

use std::path::{Path, PathBuf};

use anyformer_data::{Split, Task};
use anyformer_hub::ModelFolder;
use anyformer_models::ModelConfig;
use anyformer_train::{evaluate, evaluate_early};
use serde_json::{Map, Value, json};

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::overrides;
use crate::products::Products;
use crate::progress::score;
use crate::run_file::model_config;
use crate::say::Say;
use crate::scoring;
use crate::session::{gives_tokens, open_model, task, task_defaults, task_table};
use crate::setup::{device, device_name, start_threads};
use crate::verbs::generate::tokenizer;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken), a model folder, or a GGUF file
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// The task [default: the one that the model was trained on, with its options]
    #[arg(long, value_name = "NAME")]
    pub task: Option<String>,
    /// Instead of a task: a text (UTF-8), cut in windows, whose tokens a language model is to foresee
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "split", "batch", "batches", "exit_above"])]
    pub text: Option<PathBuf>,
    /// Tokens of a window of the text; fewer where the model reads no more
    #[arg(long, value_name = "N", default_value_t = 512, requires = "text", value_parser = clap::value_parser!(u32).range(2..))]
    pub time: u32,
    /// The part of the data
    #[arg(long, value_name = "SPLIT", default_value = "test", value_parser = ["train", "validation", "test"])]
    pub split: String,
    /// Rows of one batch
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Batches
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub batches: u32,
    /// Stop each example at the first exit whose likeliest class has a probability above this; a model with exits only
    #[arg(long, value_name = "P", value_parser = probability)]
    pub exit_above: Option<f32>,
    /// How it multiplies
    #[command(flatten)]
    pub products: Products,
    /// What differs: options of the task, as task.time=1024, or keys of the model that need no other weights, as
    /// model.mixers.0.position=rerope
    #[arg(value_name = "KEY=VALUE")]
    pub changes: Vec<String>,
}

/// Prints loss and accuracy.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let mut opened = open_model(&args.folder)?;
    opened.config = changed(&opened.config, &args.changes)?;
    if let Some(path) = &args.text {
        return on_text(path, args, &mut opened, global, say);
    }
    let task = task(&table(args, opened.info.get("task"))?)?;
    fits(&opened.config, &*task)?;
    let device = device(&device_name(global, None))?;
    start_threads(global, None)?;
    let model = args.products.load(&mut opened, &device)?;
    let split = match args.split.as_str() {
        "train" => Split::Train,
        "validation" => Split::Validation,
        _ => Split::Test,
    };
    let (batch, batches) = (args.batch as usize, args.batches as usize);
    if let Some(threshold) = args.exit_above {
        if opened.config.exits.is_empty() {
            return Err(bad_input(format!(
                "stop {} early: it has no exits; train it with model.exits=[N]",
                args.folder.display()
            )));
        }
        let found = evaluate_early(&model, &*task, split, batch, batches, threshold).input()?;
        let of = opened.config.layers;
        let value = json!({
            "model": opened.path, "task": task_table(task.spec()), "split": args.split, "exit_above": threshold,
            "accuracy": found.accuracy, "layers": found.layers, "of_layers": of, "counted": found.counted,
        });
        say.result(&value, || {
            format!(
                "{}: accuracy {:.2} % with {:.2} of {of} layers on average ({} examples)",
                args.split,
                100.0 * found.accuracy,
                found.layers,
                found.counted
            )
        });
        return Ok(());
    }
    let found = evaluate(&model, &*task, split, batch, batches).broken()?;
    let perplexity = gives_tokens(&opened.config).then(|| found.loss.exp());
    let value = json!({
        "model": opened.path, "task": task_table(task.spec()), "split": args.split,
        "loss": found.loss, "accuracy": found.accuracy, "constant_accuracy": found.constant, "perplexity": perplexity,
        "counted": found.counted,
    });
    say.result(&value, || {
        format!(
            "{}: {}  (the best constant answer: {:.2} %; {} places scored)",
            args.split,
            score(found.loss, found.accuracy, perplexity),
            100.0 * found.constant,
            found.counted
        )
    });
    Ok(())
}

/// The loss of the tokens of a text.
fn on_text(
    path: &Path,
    args: &Args,
    opened: &mut ModelFolder,
    global: &Global,
    say: &Say,
) -> Result<(), Failure> {
    let shown = opened.path.display().to_string();
    if !gives_tokens(&opened.config) {
        return Err(bad_input(format!(
            "evaluate {shown} on a text: it is a classifier or an encoder and foresees no tokens"
        )));
    }
    if let Some(change) = args.changes.iter().find(|text| text.starts_with("task.")) {
        return Err(bad_input(format!(
            "evaluate with {change}: a text is not a task; leave it or --text out"
        )));
    }
    let ids = scoring::read(path, &tokenizer(opened)?)?;
    let rows = scoring::windows(&ids, scoring::longest(opened)?.min(args.time as usize));
    if rows.is_empty() {
        return Err(bad_input(format!(
            "evaluate on {}: {} tokens are too few; give a longer text",
            path.display(),
            ids.len()
        )));
    }
    let device = device(&device_name(global, None))?;
    start_threads(global, None)?;
    let model = args.products.load(opened, &device)?;
    let found = scoring::foresee(&model, &rows)?;
    let accuracy = found.correct as f64 / found.counted as f64;
    let perplexity = found.loss.exp();
    let speed = found.counted as f64 / found.seconds;
    let value = json!({
        "model": opened.path, "text": path, "time": args.time, "loss": found.loss, "accuracy": accuracy,
        "perplexity": perplexity, "counted": found.counted, "read_tokens_per_s": speed,
    });
    say.result(&value, || {
        let windows = rows.len();
        format!(
            "{}: {}  ({} tokens foreseen in {windows} windows, {speed:.0} tokens/s)",
            path.display(),
            score(found.loss, accuracy, Some(perplexity)),
            found.counted
        )
    });
    Ok(())
}

fn probability(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err(format!("expected a probability from 0 to 1, got {text}")),
    }
}

/// The table `[task]`: the model's own, or a new one by `--task`, then the changes.
fn table(args: &Args, own: Option<&Value>) -> Result<Map<String, Value>, Failure> {
    let table = match (&args.task, own) {
        (Some(name), _) => json!({ "name": name }),
        (None, Some(own)) => own.clone(),
        (None, None) => {
            return Err(bad_input(format!(
                "evaluate {}: the folder does not say on which task; give --task NAME, or --text FILE",
                args.folder.display()
            )));
        }
    };
    let mut root = Map::new();
    root.insert("task".into(), table);
    for text in &args.changes {
        let change = overrides::parse(text)?;
        let known = ["task", "model"].contains(&change.path[0].as_str());
        if !known || change.path.len() < 2 {
            return Err(bad_input(format!(
                "evaluate with {text}: options of the task and keys of the model may differ: task.KEY=VALUE, model.KEY=VALUE"
            )));
        }
        if change.path[0] == "task" {
            overrides::apply(&mut root, &change)?;
        }
    }
    match root.remove("task") {
        Some(Value::Object(map)) => Ok(map),
        other => Err(bad_input(format!(
            "read the task of the folder: expected a table, got {other:?}"
        ))),
    }
}

/// The model's config with the changes that are for it.
fn changed(config: &ModelConfig, changes: &[String]) -> Result<ModelConfig, Failure> {
    let mut root = Map::new();
    root.insert("model".into(), Value::Object(config.to_json()));
    for text in changes {
        let change = overrides::parse(text)?;
        if change.path[0] == "model" && change.path.len() > 1 {
            overrides::apply(&mut root, &change)?;
        }
    }
    ModelConfig::from_json(&root["model"]).input()
}

/// Refuses a task whose data the model cannot read or score.
fn fits(config: &ModelConfig, task: &dyn Task) -> Result<(), Failure> {
    let mut table = Map::new();
    table.insert("reads".into(), json!(config.reads));
    table.insert("gives".into(), json!(config.gives));
    model_config(table, &task_defaults(task.spec())?).map(|_| ())
}
