//! A run from its tables to its end: what `train` and `resume` share, and the folders that `eval` and `generate` open.

use std::path::{Path, PathBuf};

use anyformer_data::{Split, Task, TaskSpec, Tokenizer};
use anyformer_hub::{Extra, HubError, ModelFolder};
use anyformer_models::{Gives, Model, ModelConfig};
use anyformer_train::{
    Event, Fan, JsonlSink, Outcome, RunFolder, StopFlag, TensorBoardSink, TrainConfig, TrainError,
    Trainer, evaluate, latest_checkpoint, training_device,
};
use anyhow::Context;
use serde_json::{Map, Value, json};

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::progress::{Progress, quoted, score};
use crate::run_file::{Place, Tables, model_config, tables_of};
use crate::say::Say;
use crate::setup::{device, device_name, start_threads, stop_on_signal};

/// A checked run: nothing is written yet.
pub(crate) struct Plan {
    task: Box<dyn Task>,
    model: ModelConfig,
    train: TrainConfig,
    place: Place,
}

/// Which side a failure of setting up a run is on.
pub(crate) fn train_failure(error: TrainError) -> Failure {
    let broken = match &error {
        TrainError::Io { .. } | TrainError::Event(_) | TrainError::NotFinite { .. } => true,
        TrainError::Hub(error) => matches!(error, HubError::Write { .. }),
        _ => false,
    };
    match broken {
        true => Failure::Broken(error.into()),
        false => Failure::Input(error.into()),
    }
}

/// The task of a table `[task]`: its name and its options.
pub(crate) fn task(table: &Map<String, Value>) -> Result<Box<dyn Task>, Failure> {
    let mut options = table.clone();
    let name = options.remove("name");
    // A run is found again from any folder.
    if let Some(Value::String(path)) = options.get_mut("path")
        && let Ok(whole) = std::path::absolute(&*path)
    {
        *path = whole.display().to_string();
    }
    match name {
        Some(Value::String(name)) => anyformer_data::task(&name, &Value::Object(options)).input(),
        Some(other) => Err(bad_input(format!(
            "read [task]: name must be a text, is {other}"
        ))),
        None => {
            let names: Vec<&str> = anyformer_data::tasks()
                .iter()
                .map(|task| task.name)
                .collect();
            let names = names.join(", ");
            Err(bad_input(format!(
                "read [task]: no name; say task.name=NAME, one of {names}"
            )))
        }
    }
}

/// The table `[task]` that makes this task again.
pub(crate) fn task_table(spec: &TaskSpec) -> Map<String, Value> {
    let mut table = Map::new();
    table.insert("name".into(), json!(spec.name));
    table.extend(spec.options.clone());
    table
}

/// What the task alone makes of a model: what it reads and gives, and how long it is.
pub(crate) fn task_defaults(spec: &TaskSpec) -> Result<ModelConfig, Failure> {
    anyformer_lab::compare::task_model(&Map::new(), &Map::new(), spec).input()
}

impl Plan {
    /// Checks the tables: every key, and that task, model and training fit together.
    pub(crate) fn from_tables(tables: Tables, global: &Global) -> Result<Self, Failure> {
        // The cheap checks first: a task may read files.
        let mut train = TrainConfig::from_json(&Value::Object(tables.train)).input()?;
        // A run is found again from any folder, and so is its teacher.
        if let Some(teacher) = &mut train.teacher
            && let Ok(whole) = std::path::absolute(&*teacher)
        {
            *teacher = whole.display().to_string();
        }
        let name = device_name(global, tables.run.device.as_deref());
        device(&name)?;
        let task = task(&tables.task)?;
        let model = model_config(tables.model, &task_defaults(task.spec())?)?;
        // Heads that do not divide the width are found here, without allocating.
        Model::shapes(&model).input()?;
        Ok(Plan {
            task,
            model,
            train,
            place: Place {
                device: Some(name),
                threads: tables.run.threads,
            },
        })
    }

    /// From the options in a run folder.
    pub(crate) fn from_options(
        options: &Value,
        file: &Path,
        global: &Global,
    ) -> Result<Self, Failure> {
        Self::from_tables(tables_of(options, &file.display().to_string())?, global)
    }

    /// Starts the threads; the number is kept, because the same bits need the same number.
    pub(crate) fn prepare(mut self, global: &Global) -> Result<Self, Failure> {
        self.place.threads = start_threads(global, Some(self.place.threads))?;
        Ok(self)
    }

    /// The resolved options, as `run.toml` holds them.
    pub(crate) fn options(&self) -> Value {
        json!({
            "task": task_table(self.task.spec()),
            "model": self.model.to_json(),
            "train": self.train.to_json(),
            "run": self.place,
        })
    }

    /// Trains to the end or until Ctrl-C, and says how it went.
    pub(crate) fn train(self, folder: RunFolder, say: &Say) -> Result<(), Failure> {
        let run = folder.path().to_path_buf();
        let device = device(self.place.device.as_deref().unwrap_or("cpu"))?;
        let device = training_device(&device, &self.train);
        let model = Model::new(&self.model, &device, self.train.seed).input()?;
        let (metrics, tensorboard) = (folder.metrics(), folder.tensorboard().to_path_buf());
        let mut trainer = Trainer::new(model, &*self.task, self.train.clone())
            .map_err(train_failure)?
            .with_extra(self.extra()?)
            .with_folder(folder)
            .map_err(train_failure)?;
        let stop = StopFlag::default();
        let asked = stop.clone();
        stop_on_signal(move || asked.request())?;
        let mut progress = Progress::new(say);
        let outcome = {
            let mut events = Fan::default()
                .and(JsonlSink::open(&metrics, trainer.step()).broken()?)
                .and(TensorBoardSink::open(&tensorboard, trainer.step()).broken()?)
                .and(|event: &Event| anyformer_train::Events::event(&mut progress, event));
            trainer
                .run(&mut events, &stop)
                .with_context(|| format!("train {}", run.display()))
                .broken()?
        };
        if outcome == Outcome::Stopped {
            let step = trainer.step();
            return Err(Failure::Interrupted(format!(
                "interrupted after step {step}; go on with: anyformer resume {}",
                quoted(&run)
            )));
        }
        let last = progress.evaluated.take();
        drop(progress);
        self.finish(&trainer, last, &run, say)
    }

    /// Says the final evaluation: the one just made, or a new one when a finished run was resumed.
    fn finish(
        &self,
        trainer: &Trainer,
        last: Option<Event>,
        run: &Path,
        say: &Say,
    ) -> Result<(), Failure> {
        let step = trainer.step();
        let (loss, accuracy) = match last {
            Some(Event::Evaluated {
                step: at,
                loss,
                accuracy,
                ..
            }) if at == step => (loss, accuracy),
            _ => {
                let (batch, batches) = (self.train.batch, self.train.eval_batches);
                let found = evaluate(
                    trainer.model(),
                    &*self.task,
                    Split::Validation,
                    batch,
                    batches,
                )
                .broken()?;
                (found.loss, found.accuracy)
            }
        };
        let perplexity = gives_tokens(&self.model).then(|| loss.exp());
        let model = latest_checkpoint(run).broken()?;
        let value = json!({
            "run": run, "model": model, "step": step, "parameters": trainer.model().params().count(),
            "loss": loss, "accuracy": accuracy, "perplexity": perplexity, "best": trainer.best(),
        });
        say.result(&value, || {
            let model = model.map_or(String::new(), |path| format!("\nmodel: {}", path.display()));
            format!(
                "step {step}, held out: {}{model}",
                score(loss, accuracy, perplexity)
            )
        });
        Ok(())
    }

    /// What goes into every model folder: the tokenizer, and the task for `eval` to find.
    fn extra(&self) -> Result<Extra, Failure> {
        let tokenizer = self
            .task
            .tokenizer()
            .map(Tokenizer::to_json)
            .transpose()
            .broken()?;
        let mut info = Map::new();
        info.insert("task".into(), Value::Object(task_table(self.task.spec())));
        info.insert(
            "written_by".into(),
            json!(concat!("anyformer ", env!("CARGO_PKG_VERSION"))),
        );
        Ok(Extra {
            tokenizer,
            info,
            ..Extra::default()
        })
    }
}

/// True for a language model.
pub(crate) fn gives_tokens(model: &ModelConfig) -> bool {
    matches!(model.gives, Gives::NextToken { .. })
}

/// The model folder that the user means: the folder itself, or the newest checkpoint of a run folder.
pub(crate) fn open_model(folder: &Path) -> Result<ModelFolder, Failure> {
    if !folder.join("run.toml").is_file() {
        return ModelFolder::open(folder).input();
    }
    match latest_checkpoint(folder).input()? {
        Some(path) => ModelFolder::open(&path).input(),
        None => {
            let shown = folder.display();
            Err(bad_input(format!(
                "open the run in {shown}: it has no checkpoint yet; go on with: anyformer resume {}",
                quoted(&PathBuf::from(folder))
            )))
        }
    }
}
