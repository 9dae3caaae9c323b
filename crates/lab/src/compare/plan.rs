//! What a comparison is: tasks, contenders, the budget that makes them equal, seeds.

use anyformer_mixers::{MixerSpec, token_mixer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::CompareError;
use crate::trial::BudgetKind;

/// One task of a comparison with everything about its training that all contenders share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskPlan {
    /// Registered name.
    pub name: String,
    /// The task's own options.
    #[serde(default)]
    pub options: Map<String, Value>,
    /// Keys of the model config that differ from the plan's for this task.
    #[serde(default)]
    pub model: Map<String, Value>,
    /// Keys of the training config that differ from the plan's for this task.
    #[serde(default)]
    pub train: Map<String, Value>,
    /// Knobs that every contender gets that has such a knob and was not given it.
    #[serde(default)]
    pub knobs: Map<String, Value>,
    /// Keys of the model config that differ for contenders that look back only: what stands first sees nothing there.
    #[serde(default)]
    pub causal: Map<String, Value>,
    /// Batches of the final evaluation.
    #[serde(default = "eval_batches")]
    pub eval_batches: usize,
}

fn eval_batches() -> usize {
    8
}

/// What becomes of a contender that cannot be made to cost the budget on a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unfit {
    /// The comparison is refused.
    #[default]
    Refuse,
    /// It is left out of the task.
    LeaveOut,
    /// It runs at the model's own width; the mismatch stands in the table.
    AsItIs,
}

/// A whole comparison. Two equal plans share a store, and one that asks for more tasks, mixers or seeds goes on in it; another
/// plan is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The tasks.
    pub tasks: Vec<TaskPlan>,
    /// The contenders; the first is the reference whose size sets the budget when no target is given.
    pub mixers: Vec<MixerSpec>,
    /// What is equal.
    pub budget: BudgetKind,
    /// How much of it; absent: what the first contender costs at the model's own width.
    pub target: Option<f64>,
    /// Largest allowed relative distance from the target.
    pub tolerance: f64,
    /// What becomes of a contender further off.
    #[serde(default)]
    pub unfit: Unfit,
    /// Seeds of weights, data and order.
    pub seeds: Vec<u64>,
    /// Keys of the model config shared by all.
    pub model: Map<String, Value>,
    /// Keys of the training config shared by all.
    pub train: Map<String, Value>,
    /// Learning rates tried for every contender on the first seed; the best by validation is used for all its seeds. One
    /// entry: no tuning. Every contender has the same list, so the tuning budget is equal. None: each task's own rate.
    pub learning_rates: Vec<f64>,
    /// Prompt lengths at which inference is measured; empty: not measured.
    pub latency_lengths: Vec<usize>,
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

impl Plan {
    /// The main job: six architectures on three tasks under one parameter budget, in about three minutes on two cores.
    pub fn quick() -> Self {
        let names = [
            "attention",
            "linear_attention",
            "gla",
            "delta_net",
            "gated_delta_net",
            "mamba",
        ];
        Plan {
            tasks: vec![
                TaskPlan::preset("mqar").unwrap_or_else(|| TaskPlan::named("mqar")),
                TaskPlan::preset("text").unwrap_or_else(|| TaskPlan::named("text")),
                TaskPlan::preset("images").unwrap_or_else(|| TaskPlan::named("images")),
            ],
            mixers: names.iter().map(|name| MixerSpec::named(name)).collect(),
            budget: BudgetKind::Params,
            target: None,
            tolerance: 0.02,
            unfit: Unfit::Refuse,
            seeds: vec![0, 1],
            model: object(json!({"dim": 64, "layers": 2})),
            train: object(
                json!({"schedule": "cosine", "lr": 5e-3, "weight_decay": 0.1, "eval_every": 60, "eval_batches": 4}),
            ),
            learning_rates: vec![5e-3],
            latency_lengths: vec![128, 512, 2048],
        }
    }

    /// Refuses what cannot be run, before anything is trained.
    pub fn check(&self) -> Result<(), CompareError> {
        let refuse = |message: &str| Err(CompareError::Plan(message.to_string()));
        if self.tasks.is_empty() || self.mixers.is_empty() || self.seeds.is_empty() {
            return refuse("a comparison needs at least one task, one mixer and one seed");
        }
        if !(self.tolerance > 0.0 && self.tolerance < 1.0) {
            return refuse("tolerance must lie between 0 and 1; 0.02 is 2 %");
        }
        for mixer in &self.mixers {
            (token_mixer(&mixer.name)?.resolve)(&mixer.options)?;
        }
        let labels: Vec<String> = self.mixers.iter().map(label).collect();
        for (index, name) in labels.iter().enumerate() {
            if labels[..index].contains(name) {
                return refuse(&format!("the contender {name} is named twice"));
            }
        }
        Ok(())
    }

    /// Number of trials, tuning runs included, where every contender takes part in every task.
    pub fn trials(&self) -> usize {
        self.trials_of(self.tasks.len() * self.mixers.len())
    }

    /// Number of trials of so many contenders, each on a task.
    pub(super) fn trials_of(&self, contests: usize) -> usize {
        let tuning = match self.learning_rates.len() {
            0 | 1 => 0,
            count => count,
        };
        contests * (self.seeds.len() + tuning)
    }
}

impl TaskPlan {
    /// A task with its own defaults.
    pub fn named(name: &str) -> Self {
        TaskPlan {
            name: name.to_string(),
            options: Map::new(),
            model: Map::new(),
            train: Map::new(),
            knobs: Map::new(),
            causal: Map::new(),
            eval_batches: eval_batches(),
        }
    }

    /// A contender with the knobs of this task.
    pub fn contender(&self, mixer: &MixerSpec) -> Result<MixerSpec, CompareError> {
        let known = token_mixer(&mixer.name)?.card.knobs;
        let mut fitted = mixer.clone();
        for (key, value) in &self.knobs {
            if known.iter().any(|knob| knob.name == key) && !mixer.options.contains_key(key) {
                fitted.options.insert(key.clone(), value.clone());
            }
        }
        Ok(fitted)
    }

    /// The settings under which a task trains in seconds; `None` for a task that has none.
    pub fn preset(name: &str) -> Option<Self> {
        let (options, train, eval_batches) = match name {
            "mqar" => (
                json!({"vocab": 64, "time": 32, "pairs": 4}),
                json!({"steps": 400, "batch": 32, "warmup": 20, "weight_decay": 0.0}),
                8,
            ),
            "list_ops" => (
                json!({"max_depth": 4, "max_args": 4, "min_length": 10, "max_length": 80}),
                json!({"steps": 200, "batch": 32, "warmup": 20}),
                16,
            ),
            "selective_copy" => (
                json!({"time": 64, "tokens": 8}),
                json!({"steps": 200, "batch": 32, "warmup": 20}),
                8,
            ),
            "induction_heads" => (
                json!({"time": 64}),
                json!({"steps": 200, "batch": 32, "warmup": 20}),
                8,
            ),
            "text" => (
                json!({"time": 128}),
                json!({"steps": 180, "batch": 8, "warmup": 20}),
                16,
            ),
            "images" => (
                json!({}),
                json!({"steps": 180, "batch": 16, "warmup": 20}),
                32,
            ),
            _ => return None,
        };
        Some(TaskPlan {
            name: name.to_string(),
            options: object(options),
            model: Map::new(),
            train: object(train),
            knobs: Map::new(),
            causal: Map::new(),
            eval_batches,
        })
    }
}

/// A contender's name in tables: the mixer, with the knobs that were given.
pub fn label(spec: &MixerSpec) -> String {
    if spec.options.is_empty() {
        return spec.name.clone();
    }
    let knobs: Vec<String> = spec
        .options
        .iter()
        .map(|(key, value)| match value {
            Value::String(text) => format!("{key}={text}"),
            other => format!("{key}={other}"),
        })
        .collect();
    format!("{}({})", spec.name, knobs.join(","))
}

/// Reads a contender: `gla` or `attention(heads=8,variant=sqa)`.
pub fn parse_mixer(text: &str) -> Result<MixerSpec, CompareError> {
    let text = text.trim();
    let Some((name, rest)) = text.split_once('(') else {
        token_mixer(text)?;
        return Ok(MixerSpec::named(text));
    };
    let Some(inside) = rest.strip_suffix(')') else {
        return Err(CompareError::Plan(format!(
            "read the contender {text:?}: expected name(key=value,…)"
        )));
    };
    let entry = token_mixer(name)?;
    let mut options = Map::new();
    for pair in inside.split(',').filter(|pair| !pair.trim().is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(CompareError::Plan(format!(
                "read the contender {text:?}: {pair:?} is not key=value"
            )));
        };
        let value = serde_json::from_str(value).unwrap_or(Value::String(value.to_string()));
        options.insert(key.trim().to_string(), value);
    }
    (entry.resolve)(&options)?;
    Ok(MixerSpec {
        name: name.to_string(),
        options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_are_read_and_written_alike() {
        let spec = parse_mixer("attention(heads=8,variant=sqa)").expect("a contender");
        assert_eq!(label(&spec), "attention(heads=8,variant=sqa)");
        assert_eq!(
            parse_mixer("gla").map(|spec| label(&spec)).ok(),
            Some("gla".into())
        );
        assert!(parse_mixer("atention").is_err());
        assert!(parse_mixer("gla(hedas=4)").is_err());
        assert!(parse_mixer("gla(heads=4").is_err());
    }

    #[test]
    fn a_plan_that_cannot_be_run_is_refused() {
        let mut plan = Plan::quick();
        assert!(plan.check().is_ok());
        plan.mixers.push(MixerSpec::named("gla"));
        assert!(plan.check().is_err());
        let seeds = Plan {
            seeds: vec![],
            ..Plan::quick()
        };
        assert!(seeds.check().is_err());
    }
}
