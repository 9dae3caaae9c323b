//! The options of a training run: the `[train]` table of a run file. Every key does something.

use anyformer_mixers::card::nearest_name;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::TrainError;

/// How the learning rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// It stays at `lr`.
    Constant,
    /// Half a cosine from `lr` to `min_lr`.
    #[default]
    Cosine,
    /// The inverse root of the number of updates: `lr · sqrt(warmup / step)`.
    Rsqrt,
    /// Warm-up, stable, decay: `lr`, then a straight line to `min_lr` over the last part of the run.
    Wsd {
        /// The part of all steps that decays, above 0 and at most 1.
        decay: f64,
    },
}

/// The options of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainConfig {
    /// Updates of the parameters.
    pub steps: u64,
    /// Rows of one batch.
    pub batch: usize,
    /// Batches whose gradients make one update; as one batch of `accumulate * batch` rows.
    pub accumulate: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Learning rate at the end of a cosine or WSD schedule.
    pub min_lr: f64,
    /// Updates over which the rate rises in a straight line.
    pub warmup: u64,
    /// How it goes on.
    pub schedule: Schedule,
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, of the parameters that decay.
    pub weight_decay: f64,
    /// Largest norm of the whole gradient; larger ones are scaled down to it. 0: no clipping.
    pub clip: f64,
    /// Of the initial parameters and of the order of the data.
    pub seed: u64,
    /// Updates between evaluations. 0: only after the last.
    pub eval_every: u64,
    /// Batches of one evaluation.
    pub eval_batches: usize,
    /// Updates between checkpoints. 0: only after the last and when stopped.
    pub checkpoint_every: u64,
    /// Newest checkpoints that are kept.
    pub keep: usize,
    /// Updates between events.
    pub log_every: u64,
    /// Compute activations again in the backward pass instead of keeping them: less memory, more time.
    pub gradient_checkpointing: bool,
    /// Chance with which each layer is left out of an update, whole (LayerDrop, Fan et al. 2019, arXiv 1909.11556).
    pub layer_drop: f64,
    /// A run or model folder whose scores are learned too; see [`anyformer_models::Teacher`].
    pub teacher: Option<String>,
    /// The teacher's part of the loss, from 0 to 1; 0: the plain loss.
    pub teacher_mix: f64,
    /// What scores are divided by before student and teacher are compared.
    pub temperature: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            steps: 1000,
            batch: 32,
            accumulate: 1,
            lr: 1e-3,
            min_lr: 1e-5,
            warmup: 100,
            schedule: Schedule::Cosine,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            seed: 0,
            eval_every: 200,
            eval_batches: 16,
            checkpoint_every: 200,
            keep: 2,
            log_every: 10,
            gradient_checkpointing: false,
            layer_drop: 0.0,
            teacher: None,
            teacher_mix: 0.5,
            temperature: 2.0,
        }
    }
}

/// Keys that a resumed run may change: they change no number of the training.
pub const MAY_CHANGE: [&str; 4] = ["checkpoint_every", "eval_every", "keep", "log_every"];

impl TrainConfig {
    /// Reads the options from JSON (or from TOML by way of it), refusing unknown keys with the nearest one.
    pub fn from_json(value: &Value) -> Result<Self, TrainError> {
        let wrong = |message: String| Err(TrainError::Config(message));
        let Value::Object(map) = value else {
            return wrong(format!("expected a table, got {value}"));
        };
        let known = Self::default().to_json();
        if let Some(key) = map.keys().find(|key| !known.contains_key(*key)) {
            let nearest = nearest_name(key, known.keys().map(String::as_str));
            let hint = nearest.map_or(String::new(), |name| format!("; did you mean {name:?}?"));
            return wrong(format!("unknown key {key:?}{hint}"));
        }
        let config: TrainConfig = match serde_json::from_value(value.clone()) {
            Ok(config) => config,
            Err(error) => return wrong(error.to_string()),
        };
        config.check()?;
        Ok(config)
    }

    /// The options as JSON, every key present.
    pub fn to_json(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map,
            other => panic!("a config serialises to a map, not {other:?}"),
        }
    }

    /// Refuses what cannot be run.
    pub fn check(&self) -> Result<(), TrainError> {
        let wrong = |key: &str, want: &str, got: String| {
            Err(TrainError::Config(format!(
                "{key} must be {want}, got {got}"
            )))
        };
        let counts = [
            ("steps", self.steps),
            ("batch", self.batch as u64),
            ("accumulate", self.accumulate as u64),
            ("eval_batches", self.eval_batches as u64),
            ("keep", self.keep as u64),
            ("log_every", self.log_every),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return wrong(key, "at least 1", "0".into());
        }
        if self.warmup > self.steps {
            return wrong(
                "warmup",
                &format!("at most steps ({})", self.steps),
                self.warmup.to_string(),
            );
        }
        if !(0.0..1.0).contains(&self.layer_drop) {
            return wrong(
                "layer_drop",
                "at least 0 and below 1",
                self.layer_drop.to_string(),
            );
        }
        if !(0.0..=1.0).contains(&self.teacher_mix) {
            return wrong("teacher_mix", "from 0 to 1", self.teacher_mix.to_string());
        }
        let positive = [
            ("lr", self.lr),
            ("eps", self.eps),
            ("temperature", self.temperature),
        ];
        if let Some((key, value)) = positive
            .iter()
            .find(|(_, value)| !(*value > 0.0 && value.is_finite()))
        {
            return wrong(key, "a finite number above 0", value.to_string());
        }
        let signless = [
            ("weight_decay", self.weight_decay),
            ("clip", self.clip),
            ("min_lr", self.min_lr),
        ];
        if let Some((key, value)) = signless
            .iter()
            .find(|(_, value)| !(*value >= 0.0 && value.is_finite()))
        {
            return wrong(key, "a finite number, 0 or more", value.to_string());
        }
        if self.schedule != Schedule::Constant && self.min_lr > self.lr {
            return wrong(
                "min_lr",
                &format!("at most lr ({})", self.lr),
                self.min_lr.to_string(),
            );
        }
        if self.betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            return wrong(
                "betas",
                "at least 0 and below 1",
                format!("{:?}", self.betas),
            );
        }
        match self.schedule {
            Schedule::Wsd { decay } if !(decay > 0.0 && decay <= 1.0) => wrong(
                "schedule.wsd.decay",
                "above 0 and at most 1",
                decay.to_string(),
            ),
            _ => Ok(()),
        }
    }

    /// The learning rate of update `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let between = |part: f64| self.min_lr + (self.lr - self.min_lr) * part;
        match self.schedule {
            Schedule::Constant => self.lr,
            Schedule::Rsqrt => {
                let warmup = self.warmup.max(1) as f64;
                self.lr * (warmup / (step + 1) as f64).sqrt().min(1.0)
            }
            Schedule::Cosine => {
                let length = (self.steps - self.warmup).saturating_sub(1).max(1);
                let done = (step - self.warmup) as f64 / length as f64;
                between(0.5 + 0.5 * (std::f64::consts::PI * done.min(1.0)).cos())
            }
            Schedule::Wsd { decay } => {
                let length = (self.steps as f64 * decay).ceil();
                let left = self.steps.saturating_sub(step + 1) as f64;
                between((left / length).min(1.0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bad_options_are_refused_by_name() {
        let message = |value: Value| TrainConfig::from_json(&value).unwrap_err().to_string();
        assert!(message(json!({"warmpu": 3})).contains("did you mean \"warmup\"?"));
        assert!(message(json!({"steps": 0})).contains("steps must be at least 1, got 0"));
        assert!(
            message(json!({"steps": 5, "warmup": 6}))
                .contains("warmup must be at most steps (5), got 6")
        );
        assert!(message(json!({"lr": -1.0})).contains("lr must be"));
        assert!(message(json!({"schedule": "cosin"})).contains("cosine"));
        assert!(message(json!({"schedule": {"wsd": {"decya": 0.1}}})).contains("decya"));
        assert!(message(json!({"betas": [0.9, 1.0]})).contains("betas"));
        assert!(message(json!({"layer_drop": 1.0})).contains("layer_drop must be"));
        assert!(message(json!({"teacher_mix": 2})).contains("teacher_mix must be"));
        assert!(message(json!({"temperature": 0})).contains("temperature must be"));
        assert!(message(json!([1])).contains("expected a table"));
    }

    #[test]
    fn toml_round_trip_keeps_every_option() {
        let config = TrainConfig {
            schedule: Schedule::Wsd { decay: 0.25 },
            lr: 0.1 + 0.2,
            ..TrainConfig::default()
        };
        let text = toml::to_string(&config).unwrap();
        let value: Value = toml::from_str(&text).unwrap();
        assert_eq!(TrainConfig::from_json(&value).unwrap(), config);
    }

    #[test]
    fn schedules_reach_their_ends() {
        let config = |schedule| TrainConfig {
            steps: 100,
            warmup: 10,
            lr: 1.0,
            min_lr: 0.1,
            schedule,
            ..TrainConfig::default()
        };
        for schedule in [
            Schedule::Constant,
            Schedule::Cosine,
            Schedule::Wsd { decay: 0.2 },
        ] {
            let config = config(schedule);
            assert_eq!(config.rate(0), 0.1);
            assert_eq!(config.rate(9), 1.0);
            assert_eq!(config.rate(10), 1.0);
            let last = if schedule == Schedule::Constant {
                1.0
            } else {
                0.1
            };
            assert!((config.rate(99) - last).abs() < 1e-12, "{schedule:?}");
            assert!((1..90).all(|step| config.rate(step + 10) <= config.rate(step + 9)));
        }
        let wsd = config(Schedule::Wsd { decay: 0.2 });
        assert_eq!(wsd.rate(79), 1.0);
        assert!((wsd.rate(89) - 0.55).abs() < 1e-12);
    }
}
