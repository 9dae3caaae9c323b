//! What the benchmark is: for each preset and dialect, the six tasks with their models and their training.

use std::path::{Path, PathBuf};

use anyformer_data::Dialect;
use anyformer_mixers::{MixerSpec, token_mixers};
use serde_json::{Map, Value, json};

use super::recipe::Recipe;
use crate::compare::{CompareError, Plan, TaskPlan, Unfit, parse_mixer};
use crate::trial::BudgetKind;

/// How much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Every model on every task for a few updates: shows that all run, nothing else.
    Smoke,
    /// Small sizes that train to something in hours on two cores.
    Small,
    /// The published sizes and recipes.
    Paper,
}

/// One column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// Nested list operations.
    ListOps,
    /// Reviews, byte by byte.
    Text,
    /// Pairs of papers, byte by byte.
    Retrieval,
    /// Pictures, pixel by pixel.
    Image,
    /// Two discs, 32 x 32.
    Pathfinder,
    /// Two discs, 128 x 128.
    PathX,
}

impl Column {
    /// All six, in the order of the published table.
    pub const ALL: [Column; 6] = [
        Column::ListOps,
        Column::Text,
        Column::Retrieval,
        Column::Image,
        Column::Pathfinder,
        Column::PathX,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Column::ListOps => "listops",
            Column::Text => "text",
            Column::Retrieval => "retrieval",
            Column::Image => "image",
            Column::Pathfinder => "pathfinder",
            Column::PathX => "pathx",
        }
    }

    fn parse(name: &str) -> Result<Self, CompareError> {
        let found = Self::ALL.into_iter().find(|column| column.name() == name);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Column::name).join(", ");
            CompareError::Plan(format!("find the LRA task {name:?}: the tasks are {known}"))
        })
    }
}

/// A benchmark to run.
#[derive(Clone, Debug)]
pub struct Definition {
    /// How much of it.
    pub preset: Preset,
    /// Whose form of it.
    pub dialect: Dialect,
    /// Columns.
    pub columns: Vec<Column>,
    /// Contenders as they are typed; empty: every token mixer, attention first.
    pub models: Vec<String>,
    /// Seeds 0 to n - 1.
    pub seeds: u64,
    /// A folder with `imdb`, `aan`, `cifar10`, `listops`; what is not in it is generated.
    pub data: Option<PathBuf>,
    /// Updates of each trial instead of the preset's.
    pub steps: Option<u64>,
}

fn table(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

impl Definition {
    /// The columns of these names; none: all six.
    pub fn columns(names: &[String]) -> Result<Vec<Column>, CompareError> {
        match names {
            [] => Ok(Column::ALL.to_vec()),
            names => names.iter().map(|name| Column::parse(name)).collect(),
        }
    }

    /// The contenders.
    fn mixers(&self) -> Result<Vec<MixerSpec>, CompareError> {
        if !self.models.is_empty() {
            return self.models.iter().map(|name| parse_mixer(name)).collect();
        }
        let others = token_mixers().iter().map(|entry| entry.card.name);
        let others = others.filter(|name| *name != "attention");
        let typed = |name: &str| match name {
            // The dense form has as many scores as the sequence is long: at 4,000 tokens more than the whole model.
            "synthesizer" => parse_mixer("synthesizer(variant=factorised_dense)"),
            name => parse_mixer(name),
        };
        std::iter::once("attention")
            .chain(others)
            .map(typed)
            .collect()
    }

    /// The plan of the comparison.
    pub fn plan(&self) -> Result<Plan, CompareError> {
        let tasks = self.columns.iter().map(|column| self.task(*column));
        Ok(Plan {
            tasks: tasks.collect(),
            mixers: self.mixers()?,
            budget: BudgetKind::Params,
            target: None,
            // The benchmark's own rule: a model may have a tenth more parameters than the Transformer.
            tolerance: 0.1,
            unfit: match self.preset {
                Preset::Smoke => Unfit::AsItIs,
                Preset::Small | Preset::Paper => Unfit::LeaveOut,
            },
            seeds: (0..self.seeds).collect(),
            model: table(json!({"norm": "layer", "norm_eps": 1e-6, "embed_std": 1.0})),
            train: Map::new(),
            learning_rates: Vec::new(),
            latency_lengths: Vec::new(),
        })
    }

    /// The model that lengths are timed with: the text task's.
    pub(super) fn model(&self) -> Result<TaskPlan, CompareError> {
        Ok(self.task(Column::Text))
    }

    /// The folder of real data, if `marker` is in it.
    fn found(&self, name: &str, marker: &str) -> Option<PathBuf> {
        let folder = self.data.as_deref().map(|data: &Path| data.join(name))?;
        folder.join(marker).exists().then_some(folder)
    }

    /// Name and options of the task of a column, and its longest sequence and classes.
    fn source(&self, column: Column) -> (&'static str, Value, usize, usize) {
        let dialect = self.dialect;
        let sized = |smoke: usize, small: usize, paper: usize| match self.preset {
            Preset::Smoke => smoke,
            Preset::Small => small,
            Preset::Paper => paper,
        };
        let document = match dialect {
            Dialect::S4 => 4096,
            Dialect::Official | Dialect::Nystrom => 4000,
        };
        match column {
            Column::ListOps => {
                let longest = sized(80, 200, 2000);
                let depth = sized(4, 5, 10);
                let mut options = json!({
                    "max_depth": depth, "max_args": depth, "min_length": sized(10, 20, 500),
                    "max_length": longest, "dialect": dialect,
                });
                if let (Preset::Paper, Some(path)) =
                    (self.preset, self.found("listops", "basic_train.tsv"))
                {
                    options["path"] = json!(path);
                }
                (
                    "list_ops",
                    options,
                    longest + usize::from(dialect == Dialect::S4),
                    10,
                )
            }
            Column::Text => {
                let time = sized(128, 512, document);
                match self.found("imdb", "train") {
                    Some(path) => (
                        "text_classify",
                        json!({"path": path, "time": time, "dialect": dialect}),
                        time,
                        2,
                    ),
                    None => {
                        // Small models of bytes do not learn in an hour to tell one film from another.
                        let distraction = match self.preset {
                            Preset::Small => 0.0,
                            _ => 1.0,
                        };
                        let options = json!({"time": time, "distraction": distraction});
                        ("toy_reviews", options, time, 2)
                    }
                }
            }
            Column::Retrieval => {
                let time = sized(128, 256, document);
                match self.found("aan", "new_aan_pairs.train.tsv") {
                    Some(path) => (
                        "matching",
                        json!({"path": path, "time": time, "dialect": dialect}),
                        time,
                        2,
                    ),
                    None => (
                        "toy_citations",
                        json!({"time": time, "train_rows": 147_086, "topics": sized(32, 2, 32)}),
                        time,
                        2,
                    ),
                }
            }
            Column::Image => match self.found("cifar10", "data_batch_1.bin") {
                Some(path) => ("sequential_cifar10", json!({"path": path}), 1024, 10),
                None => ("images", json!({"as_sequence": true}), 784, 10),
            },
            Column::Pathfinder => (
                "pathfinder",
                json!({"contour_length": sized(6, 6, 14)}),
                1024,
                2,
            ),
            Column::PathX => match self.preset {
                Preset::Paper => ("path_x", json!({"contour_length": 14}), 128 * 128, 2),
                _ => ("pathfinder_64", json!({"contour_length": 6}), 64 * 64, 2),
            },
        }
    }

    fn task(&self, column: Column) -> TaskPlan {
        let (name, options, time, classes) = self.source(column);
        let recipe = Recipe::of(self.preset, self.dialect, column);
        // In published sizes the image is CIFAR's, whichever pictures stand in.
        let longest = match column {
            Column::Image => 1024,
            _ => time,
        };
        let gives = |pool: &str| {
            let pair = match (column, self.dialect) {
                (Column::Retrieval, Dialect::Official) => "concat",
                (Column::Retrieval, _) => "nli",
                _ => "none",
            };
            json!({"class": {"classes": classes, "pool": pool, "hidden": recipe.mlp, "pair": pair}})
        };
        let mut knobs = knobs(longest, recipe.heads);
        knobs.insert("dropout".into(), json!(recipe.attention_dropout));
        if recipe.qkv != recipe.dim {
            knobs.insert("head_dim".into(), json!(recipe.qkv / recipe.heads));
        }
        let steps = self.steps.unwrap_or(recipe.steps);
        let schedule = match (recipe.rsqrt, self.dialect) {
            (true, _) => json!("rsqrt"),
            (false, Dialect::Nystrom) => json!({"wsd": {"decay": 1.0}}),
            (false, _) => json!("cosine"),
        };
        TaskPlan {
            options: table(options),
            model: table(json!({
                "dim": recipe.dim,
                "layers": recipe.layers,
                "channel": {"name": "mlp", "hidden": recipe.mlp, "dropout": recipe.dropout},
                "positions": if recipe.learned_positions { "learned" } else { "sinusoid" },
                "max_time": longest,
                "dropout": recipe.dropout,
                "gives": gives(recipe.pool),
            })),
            train: table(json!({
                "steps": steps,
                "batch": recipe.batch,
                "lr": recipe.lr,
                "min_lr": 0.0,
                "warmup": recipe.warmup.min(steps),
                "schedule": schedule,
                "betas": [0.9, 0.98],
                "eps": 1e-9,
                "weight_decay": recipe.decay,
                "clip": recipe.clip,
                "eval_every": 0,
                "eval_batches": 1,
            })),
            knobs,
            causal: table(json!({"gives": gives("last")})),
            eval_batches: match self.preset {
                Preset::Smoke => 2,
                Preset::Small => 64,
                Preset::Paper => 10_000 / recipe.batch,
            },
            ..TaskPlan::named(name)
        }
    }
}

/// Knobs for sequences of `time` tokens and a class token: both directions, positions from the embedding, tables long
/// enough.
pub(super) fn knobs(time: usize, heads: usize) -> Map<String, Value> {
    let rank = ((time + 1) as f64).sqrt().ceil() as usize;
    table(json!({
        "causal": false,
        "position": "none",
        "heads": heads,
        "max_time": rank * (time + 1).div_ceil(rank),
        "rank": rank,
        "k": 16,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::task_model;
    use anyformer_data::{Split, task};
    use anyformer_models::{Model, ModelConfig};

    fn definition(preset: Preset, dialect: Dialect) -> Definition {
        Definition {
            preset,
            dialect,
            columns: Column::ALL.to_vec(),
            models: Vec::new(),
            seeds: 1,
            data: None,
            steps: None,
        }
    }

    /// The Transformer of every task has exactly the parameters of the released configuration.
    #[test]
    fn paper_sizes_are_exact() {
        let plan = definition(Preset::Paper, Dialect::Official)
            .plan()
            .expect("a plan");
        let read: Plan =
            serde_json::from_value(serde_json::to_value(&plan).expect("json")).expect("read");
        assert_eq!(plan, read);
        let published = [8_948_746, 3_486_722, 1_087_618, 248_458, 26_530, 537_954];
        for (task_plan, want) in plan.tasks.iter().zip(published) {
            let data = task(&task_plan.name, &Value::Object(task_plan.options.clone()));
            let data = data.expect("generated");
            let model = task_model(&plan.model, &task_plan.model, data.spec()).expect("fits");
            let config = ModelConfig {
                mixers: vec![task_plan.contender(&plan.mixers[0]).expect("known")],
                ..model
            };
            let dropout = match task_plan.name.as_str() {
                "images" | "sequential_cifar10" => 0.3,
                "pathfinder" => 0.2,
                _ => 0.1,
            };
            assert_eq!(config.dropout, dropout, "{}", task_plan.name);
            assert_eq!(config.channel.options["dropout"], json!(dropout));
            let of_weights = if dropout == 0.3 { 0.2 } else { 0.1 };
            assert_eq!(config.mixers[0].options["dropout"], json!(of_weights));
            // Padding has an embedding in the released code, as have bytes and pixels that never occur.
            let model = Model::shapes(&config).expect("builds");
            assert_eq!(
                model.cost(data.spec().time).params,
                want,
                "{}",
                task_plan.name
            );
            assert!(data.count(Split::Train).is_some_and(|rows| rows > 5000));
        }
    }

    #[test]
    fn every_dialect_and_preset_parses_and_every_model_has_a_price() {
        for preset in [Preset::Smoke, Preset::Small, Preset::Paper] {
            for dialect in [Dialect::Official, Dialect::Nystrom, Dialect::S4] {
                let plan = definition(preset, dialect).plan().expect("a plan");
                plan.check().expect("sound");
                for task_plan in &plan.tasks {
                    let data = task(&task_plan.name, &Value::Object(task_plan.options.clone()));
                    let data = data.expect("generated");
                    let base =
                        task_model(&plan.model, &task_plan.model, data.spec()).expect("fits");
                    for mixer in &plan.mixers {
                        let config = ModelConfig {
                            mixers: vec![task_plan.contender(mixer).expect("known")],
                            ..base.clone()
                        };
                        let model = Model::shapes(&config);
                        let model = model.unwrap_or_else(|error| panic!("{}: {error}", mixer.name));
                        assert!(model.cost(data.spec().time).flops > 0);
                    }
                }
            }
        }
    }
}
