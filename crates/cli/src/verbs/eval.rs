//! `anyformer eval FOLDER`.

use std::path::PathBuf;

use anyformer_data::{Split, Task};
use anyformer_models::ModelConfig;
use anyformer_train::evaluate;
use serde_json::{Map, Value, json};

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::overrides;
use crate::progress::score;
use crate::run_file::model_config;
use crate::say::Say;
use crate::session::{gives_tokens, open_model, task, task_defaults, task_table};
use crate::setup::{device, device_name, start_threads};

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken) or a model folder
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// The task [default: the one that the model was trained on, with its options]
    #[arg(long, value_name = "NAME")]
    pub task: Option<String>,
    /// The part of the data
    #[arg(long, value_name = "SPLIT", default_value = "test", value_parser = ["train", "validation", "test"])]
    pub split: String,
    /// Rows of one batch
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Batches
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub batches: u32,
    /// Options of the task that differ, as task.time=1024
    #[arg(value_name = "KEY=VALUE")]
    pub changes: Vec<String>,
}

/// Prints loss and accuracy.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let opened = open_model(&args.folder)?;
    let task = task(&table(args, opened.info.get("task"))?)?;
    fits(&opened.config, &*task)?;
    let device = device(&device_name(global, None))?;
    start_threads(global, None)?;
    let model = opened.load(&device).input()?;
    let split = match args.split.as_str() {
        "train" => Split::Train,
        "validation" => Split::Validation,
        _ => Split::Test,
    };
    let (batch, batches) = (args.batch as usize, args.batches as usize);
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

/// The table `[task]`: the model's own, or a new one by `--task`, then the changes.
fn table(args: &Args, own: Option<&Value>) -> Result<Map<String, Value>, Failure> {
    let table = match (&args.task, own) {
        (Some(name), _) => json!({ "name": name }),
        (None, Some(own)) => own.clone(),
        (None, None) => {
            return Err(bad_input(format!(
                "evaluate {}: the folder does not say on which task; give --task NAME",
                args.folder.display()
            )));
        }
    };
    let mut root = Map::new();
    root.insert("task".into(), table);
    for text in &args.changes {
        let change = overrides::parse(text)?;
        if change.path[0] != "task" || change.path.len() < 2 {
            return Err(bad_input(format!(
                "evaluate with {text}: only options of the task may differ: task.KEY=VALUE"
            )));
        }
        overrides::apply(&mut root, &change)?;
    }
    match root.remove("task") {
        Some(Value::Object(map)) => Ok(map),
        other => Err(bad_input(format!(
            "read the task of the folder: expected a table, got {other:?}"
        ))),
    }
}

/// Refuses a task whose data the model cannot read or score.
fn fits(config: &ModelConfig, task: &dyn Task) -> Result<(), Failure> {
    let mut table = Map::new();
    table.insert("reads".into(), json!(config.reads));
    table.insert("gives".into(), json!(config.gives));
    model_config(table, &task_defaults(task.spec())?).map(|_| ())
}
