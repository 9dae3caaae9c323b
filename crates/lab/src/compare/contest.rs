//! The contenders of a plan on its tasks, each at the size that the budget gives it.

use std::io::Write;
use std::path::Path;

use anyformer_data::Task;
use anyformer_mixers::token_mixer;
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::Device;
use anyformer_train::{StopFlag, TrainConfig, Trainer, training_device};
use serde_json::{Map, Value, json};

use super::plan::{Plan, TaskPlan, Unfit, label};
use super::run::Where;
use super::size::{Sized, cost, solve_size};
use super::{CompareError, Event, task_model};
use crate::atomic;
use crate::trial::{Budget, BudgetKind};

/// One contender on one task.
pub(super) struct Contest<'a> {
    pub(super) task: &'a TaskPlan,
    pub(super) data: &'a dyn Task,
    pub(super) mixer: String,
    pub(super) sized: Sized,
    pub(super) train: TrainConfig,
    pub(super) budget: Budget,
    /// Measure inference here (once per contender).
    pub(super) latency: bool,
}

/// Sizes every contender for every task.
pub(super) fn contests<'a>(
    plan: &'a Plan,
    place: &Where,
    tasks: &'a [Box<dyn Task>],
    events: &mut dyn FnMut(&Event),
) -> Result<Vec<Contest<'a>>, CompareError> {
    let mut all = Vec::new();
    let kept = place.folder.join("sizes.json");
    let mut measured: Map<String, Value> = match std::fs::read_to_string(&kept) {
        Ok(text) if plan.budget == BudgetKind::Time => {
            serde_json::from_str(&text).unwrap_or_default()
        }
        _ => Map::new(),
    };
    for (task, data) in plan.tasks.iter().zip(tasks) {
        let base = task_model(&plan.model, &task.model, data.spec())?;
        let time = data.spec().time;
        let mut train = plan.train.clone();
        train.extend(task.train.clone());
        let train = TrainConfig::from_json(&Value::Object(train))?;
        let mut measure =
            |config: &ModelConfig| step_seconds(config, &**data, &train, &place.device);
        let target = match plan.target {
            Some(target) => target,
            None => {
                let reference = ModelConfig {
                    mixers: vec![task.contender(&plan.mixers[0])?],
                    ..base.clone()
                };
                reference.check()?;
                match plan.budget {
                    BudgetKind::Time => measure(&reference)?,
                    kind => cost(&reference, kind, time),
                }
            }
        };
        for mixer in &plan.mixers {
            let fitted = task.contender(mixer)?;
            let base = match token_mixer(&fitted.name)?.causal(&fitted.options) {
                true => {
                    let mut own = task.model.clone();
                    own.extend(task.causal.clone());
                    task_model(&plan.model, &own, data.spec())?
                }
                false => base.clone(),
            };
            let budget = Budget {
                kind: plan.budget,
                target,
                tolerance: plan.tolerance,
            };
            let name = format!("{}/{}", task.name, label(mixer));
            let sized = match measured.get(&name).and_then(read_sized) {
                Some(sized) => Ok(sized),
                None => solve_size(
                    &base,
                    &fitted,
                    plan.budget,
                    target,
                    plan.tolerance,
                    time,
                    &mut measure,
                ),
            };
            let sized = match (sized, plan.unfit) {
                (Err(CompareError::Budget { .. }), Unfit::AsItIs) => {
                    let config = ModelConfig {
                        mixers: vec![fitted],
                        ..base
                    };
                    Sized {
                        value: cost(&config, plan.budget, time),
                        config,
                    }
                }
                (Err(error @ CompareError::Budget { .. }), Unfit::LeaveOut) => {
                    events(&Event::LeftOut {
                        task: task.name.clone(),
                        mixer: label(mixer),
                        reason: error.to_string(),
                    });
                    continue;
                }
                (sized, _) => sized?,
            };
            if plan.budget == BudgetKind::Time {
                let model = Value::Object(sized.config.to_json());
                measured.insert(
                    name,
                    json!({"model": model, "value": sized.value, "target": target}),
                );
            }
            events(&Event::Sized {
                task: task.name.clone(),
                mixer: label(mixer),
                dim: sized.config.dim,
                params: Model::shapes(&sized.config)?.cost(time).params,
                mismatch: sized.value / target - 1.0,
            });
            all.push(Contest {
                task,
                data: &**data,
                mixer: label(mixer),
                sized,
                train: train.clone(),
                budget,
                latency: std::ptr::eq(task, &plan.tasks[0]),
            });
        }
    }
    if plan.budget == BudgetKind::Time {
        make(&place.folder)?;
        write(&kept, &Value::Object(measured).to_string())?;
    }
    Ok(all)
}

fn read_sized(value: &Value) -> Option<Sized> {
    Some(Sized {
        config: ModelConfig::from_json(value.get("model")?).ok()?,
        value: value.get("value")?.as_f64()?,
    })
}

/// Seconds of one training step of `config`: the fastest of a few after a warm-up, which repeats best.
fn step_seconds(
    config: &ModelConfig,
    data: &dyn Task,
    train: &TrainConfig,
    device: &Device,
) -> Result<f64, CompareError> {
    let model = Model::new(config, &training_device(device, train), 0)?;
    let train = TrainConfig {
        steps: 12,
        log_every: 1,
        eval_batches: 1,
        eval_every: 0,
        ..train.clone()
    };
    let mut last = 0.0;
    let mut steps = Vec::new();
    let mut trainer = Trainer::new(model, data, train)?;
    let mut sink = |event: &anyformer_train::Event| {
        if let anyformer_train::Event::Step { seconds, .. } = event {
            steps.push(seconds - last);
            last = *seconds;
        }
        Ok(())
    };
    trainer.run(&mut sink, &StopFlag::default())?;
    Ok(steps.iter().skip(2).copied().fold(f64::INFINITY, f64::min))
}

pub(super) fn make(folder: &Path) -> Result<(), CompareError> {
    std::fs::create_dir_all(folder).map_err(|error| CompareError::Folder {
        path: folder.to_path_buf(),
        error,
    })
}

pub(crate) fn write(path: &Path, text: &str) -> Result<(), CompareError> {
    atomic::write(path, |file| file.write_all(text.as_bytes())).map_err(|error| {
        CompareError::Folder {
            path: path.to_path_buf(),
            error,
        }
    })
}
