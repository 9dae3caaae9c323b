//! One trial: what was asked (the key, whose hash is its identity) and what was measured (the result).

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::canonical;

/// What the contenders of a comparison are made equal in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BudgetKind {
    /// Trainable parameters.
    Params,
    /// FLOPs per token of a forward pass (one multiply-add = 2).
    Flops,
    /// Bytes of carried state at the length of the task.
    State,
    /// Seconds of training.
    Time,
}

impl BudgetKind {
    /// The name used on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Params => "params",
            Self::Flops => "flops",
            Self::State => "state",
            Self::Time => "time",
        }
    }

    /// The quantity in words, with its unit.
    pub fn quantity(self) -> &'static str {
        match self {
            Self::Params => "parameters",
            Self::Flops => "FLOPs per token",
            Self::State => "bytes of state",
            Self::Time => "seconds of training",
        }
    }

    /// A value of this budget for a reader.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Params | Self::Flops => crate::units::count(value),
            Self::State => crate::units::bytes(value),
            Self::Time => crate::units::seconds(value),
        }
    }
}

impl std::str::FromStr for BudgetKind {
    type Err = UnknownBudget;

    fn from_str(name: &str) -> Result<Self, UnknownBudget> {
        [Self::Params, Self::Flops, Self::State, Self::Time]
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| UnknownBudget(name.to_string()))
    }
}

/// A budget kind that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read the budget kind {0:?}: expected params, flops, state or time")]
pub struct UnknownBudget(pub String);

/// The budget of one task: what is equal, how much of it, and how far a contender may be off.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// What is equal.
    pub kind: BudgetKind,
    /// How much of it, in the unit of `kind`.
    pub target: f64,
    /// Largest allowed `|achieved / target - 1|`; 0.02 is 2 %.
    pub tolerance: f64,
}

/// Everything that decides the outcome of a trial. Two equal keys are the same trial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialKey {
    /// Task name, such as `mqar`.
    pub task: String,
    /// Contender name, such as `gated_delta_net`.
    pub mixer: String,
    /// The resolved size of the model (preset, width, layers, ...).
    pub size: Value,
    /// Everything else that changes the outcome: task settings, optimiser, schedule, steps, batch, dtype.
    pub setup: Value,
    /// Seed of weights, data and order.
    pub seed: u64,
    /// The budget that `size` was solved for.
    pub budget: Budget,
}

impl TrialKey {
    /// The key as canonical JSON, the text that is hashed.
    pub fn canonical(&self) -> String {
        // A key holds strings, numbers and JSON values only, which always serialise.
        canonical::text(&serde_json::to_value(self).expect("a trial key serialises"))
    }

    /// Content hash of the key: the same on every machine, whatever order its JSON was written in.
    pub fn id(&self) -> TrialId {
        TrialId::of_canonical(&self.canonical())
    }
}

/// Identity of a trial: the first 16 hexadecimal digits of the SHA-256 of its canonical key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TrialId(pub(crate) String);

impl TrialId {
    pub(crate) fn of_canonical(text: &str) -> Self {
        Self(canonical::hash(text)[..16].to_string())
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrialId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Which direction of a number is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Larger is better.
    Maximize,
    /// Smaller is better.
    Minimize,
}

impl Goal {
    /// Whether `a` is strictly better than `b`; NaN is never better.
    pub fn better(self, a: f64, b: f64) -> bool {
        match self {
            Self::Maximize => a > b,
            Self::Minimize => a < b,
        }
    }
}

/// How a metric is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MetricUnit {
    /// A fraction in `[0, 1]`, printed as a percentage.
    Fraction,
    /// Nats, bits, or anything else printed as it is.
    Plain,
}

impl MetricUnit {
    /// `value` in the unit that is printed (percent for a fraction).
    pub fn scale(self, value: f64) -> f64 {
        match self {
            Self::Fraction => value * 100.0,
            Self::Plain => value,
        }
    }
}

/// The quality of a trained model on held-out data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Name, such as `accuracy` or `bits per byte`.
    pub name: String,
    /// Value on held-out data.
    #[serde(with = "crate::float")]
    pub value: f64,
    /// How it is printed.
    pub unit: MetricUnit,
    /// Which direction is better.
    pub goal: Goal,
}

/// One point of a learning curve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Optimiser steps done.
    pub step: u64,
    /// Training tokens seen.
    pub tokens: u64,
    /// Seconds of training since the start.
    pub seconds: f64,
    /// Training loss, mean over the steps since the last point.
    #[serde(with = "crate::float")]
    pub train_loss: f64,
    /// The task's metric on held-out data, where it was measured at this step.
    #[serde(default, with = "crate::float::optional")]
    pub metric: Option<f64>,
}

/// What inference costs at one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LatencyPoint {
    /// Tokens of the prompt.
    pub length: u64,
    /// Seconds for the whole prompt at once.
    pub prefill_seconds: f64,
    /// Seconds for one more token; absent where the mixer cannot stream.
    pub step_seconds: Option<f64>,
    /// Bytes of the carried state after the prompt; absent where the mixer cannot stream.
    pub state_bytes: Option<u64>,
    /// Peak bytes allocated during the prefill, where they can be measured.
    pub memory_bytes: Option<u64>,
}

/// What was measured in one finished trial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialResult {
    /// Quality on held-out data.
    pub metric: Metric,
    /// Loss on held-out data.
    #[serde(with = "crate::float")]
    pub loss: f64,
    /// The quantity that the budget fixes, as achieved, in the unit of the budget.
    pub budget_value: f64,
    /// Trainable parameters, exact.
    pub params: u64,
    /// FLOPs per token of a forward pass (one multiply-add = 2), exact.
    pub flops_per_token: f64,
    /// Bytes of carried state at the length of the task; absent where the mixer cannot stream.
    pub state_bytes: Option<u64>,
    /// Training tokens per second.
    pub train_tokens_per_second: f64,
    /// Peak memory of training in bytes, where it can be measured.
    pub peak_memory_bytes: Option<u64>,
    /// Seconds of the whole trial.
    pub wall_seconds: f64,
    /// Learning curve, in order of steps.
    pub curve: Vec<CurvePoint>,
    /// Inference against length.
    pub latency: Vec<LatencyPoint>,
    /// Commit of the program that ran the trial.
    pub commit: String,
    /// The machine in words: processor, cores, threads used, memory.
    pub machine: String,
    /// The command line.
    pub command: String,
    /// Start, in seconds since 1970.
    pub started: i64,
    /// End, in seconds since 1970.
    pub finished: i64,
}

impl TrialResult {
    /// Relative distance from the budget, signed: `achieved / target - 1`.
    pub fn mismatch(&self, budget: &Budget) -> f64 {
        self.budget_value / budget.target - 1.0
    }
}

/// Where a trial stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Somebody started it; if that process is gone, it will be run again.
    Claimed,
    /// It has a result.
    Done,
    /// It ended with an error, such as a loss that is not a number.
    Failed,
}

impl Status {
    /// The name in the store.
    pub fn name(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// One row of the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialRecord {
    /// Identity, the hash of `key`.
    pub id: TrialId,
    /// What was asked.
    pub key: TrialKey,
    /// Where it stands.
    pub status: Status,
    /// How often it was started.
    pub attempts: u32,
    /// What was measured; present when done.
    pub result: Option<TrialResult>,
    /// Why it failed; present when failed.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn key(size: Value) -> TrialKey {
        TrialKey {
            task: "mqar".into(),
            mixer: "gla".into(),
            size,
            setup: json!({"steps": 100}),
            seed: 7,
            budget: Budget {
                kind: BudgetKind::Params,
                target: 1e5,
                tolerance: 0.02,
            },
        }
    }

    #[test]
    fn id_depends_on_content_only() {
        let a = key(json!({"width": 64, "layers": 2}));
        let b = key(json!({"layers": 2, "width": 64}));
        assert_eq!(a.id(), b.id());
        assert_ne!(a.id(), key(json!({"layers": 2, "width": 65})).id());
        assert_ne!(
            a.id(),
            TrialKey {
                seed: 8,
                ..a.clone()
            }
            .id()
        );
        assert_eq!(a.id().as_str().len(), 16);
        // Pinned: a change here orphans the rows of every store that exists.
        assert_eq!(a.id().as_str(), "0a517f8bf593d439");
    }

    #[test]
    fn not_a_number_survives_json() {
        for value in [
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            0.1 + 0.2,
            1.0 / 3.0,
        ] {
            let point = CurvePoint {
                step: 1,
                tokens: 2,
                seconds: 0.5,
                train_loss: value,
                metric: Some(value),
            };
            let text = serde_json::to_string(&point).unwrap();
            let back: CurvePoint = serde_json::from_str(&text).unwrap();
            assert_eq!(back.train_loss.to_bits(), value.to_bits(), "{text}");
            assert_eq!(back.metric.unwrap().to_bits(), value.to_bits(), "{text}");
        }
        let absent: CurvePoint = serde_json::from_str(
            r#"{"step":1,"tokens":1,"seconds":0,"train_loss":1,"metric":null}"#,
        )
        .unwrap();
        assert_eq!(absent.metric, None);
        assert!(
            serde_json::from_str::<CurvePoint>(
                r#"{"step":1,"tokens":1,"seconds":0,"train_loss":"x"}"#
            )
            .is_err()
        );
    }

    #[test]
    fn budget_kinds_parse() {
        assert_eq!("flops".parse::<BudgetKind>().unwrap(), BudgetKind::Flops);
        assert!(
            "speed"
                .parse::<BudgetKind>()
                .unwrap_err()
                .to_string()
                .contains("params, flops, state or time")
        );
    }
}
