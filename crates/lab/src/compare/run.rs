//! Running a plan: solve sizes, claim and run trials, write table, exports and report.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyformer_data::{Split, Task};
use anyformer_kernels::memory;
use anyformer_mixers::{Cost, MixerSpec};
use anyformer_models::{Gives, Model, ModelConfig};
use anyformer_ops::Device;
use anyformer_train::{Outcome, StopFlag, TrainConfig, Trainer, evaluate, training_device};
use serde_json::{Value, json};

use super::contest::{Contest, contests, make, write};
use super::plan::{Plan, TaskPlan, label};
use super::{CompareError, Event, latency};
use crate::export;
use crate::report::{self, Floor, ReportData, TaskInfo};
use crate::store::{Claim, Store};
use crate::table::{Table, TableOptions};
use crate::trial::{CurvePoint, Goal, Metric, MetricUnit, TrialKey, TrialRecord, TrialResult};
use crate::units;

/// Where and by what a comparison is run: written beside every number.
#[derive(Clone, Debug)]
pub struct Where {
    /// Folder of the store, the exports and the report.
    pub folder: PathBuf,
    /// Commit of the program.
    pub commit: String,
    /// The machine in words.
    pub machine: String,
    /// The command line.
    pub command: String,
    /// Device to train and measure on.
    pub device: Device,
}

/// What a comparison left.
#[derive(Debug)]
pub struct Comparison {
    /// Every trial that counts (tuning trials are in the store and the exports only).
    pub records: Vec<TrialRecord>,
    /// The table.
    pub table: Table,
    /// The report.
    pub report: PathBuf,
    /// The exports.
    pub exports: Vec<PathBuf>,
}

/// A contender's model for a task, and its exact cost for the longest sequence.
#[derive(Clone, Debug)]
pub struct Price {
    /// The task.
    pub task: String,
    /// The contender.
    pub mixer: String,
    /// The model.
    pub config: ModelConfig,
    /// Its cost.
    pub cost: Cost,
}

/// The size and cost of every contender that takes part, without training anything.
pub fn prices(
    plan: &Plan,
    place: &Where,
    events: &mut dyn FnMut(&Event),
) -> Result<Vec<Price>, CompareError> {
    plan.check()?;
    let tasks = open_tasks(plan)?;
    let contests = contests(plan, place, &tasks, events)?;
    let price = |contest: Contest| {
        let model = Model::shapes(&contest.sized.config)?;
        Ok(Price {
            task: contest.task.name.clone(),
            mixer: contest.mixer,
            cost: model.cost(contest.data.spec().time),
            config: contest.sized.config,
        })
    };
    contests.into_iter().map(price).collect()
}

fn open_tasks(plan: &Plan) -> Result<Vec<Box<dyn Task>>, CompareError> {
    let open = |task: &TaskPlan| {
        let options = Value::Object(task.options.clone());
        Ok(anyformer_data::task(&task.name, &options)?)
    };
    plan.tasks.iter().map(open).collect()
}

/// Runs a plan, or what is left of it, in `place.folder`.
pub fn run(
    plan: &Plan,
    place: &Where,
    stop: &StopFlag,
    events: &mut dyn FnMut(&Event),
) -> Result<Comparison, CompareError> {
    plan.check()?;
    let tasks = open_tasks(plan)?;
    // A budget that cannot be met leaves nothing behind.
    let contests = contests(plan, place, &tasks, events)?;
    make(&place.folder)?;
    let as_json =
        serde_json::to_value(plan).map_err(|error| CompareError::Plan(error.to_string()))?;
    let mut store = Store::open(&place.folder.join("trials.sqlite"), &as_json)?;
    let mut runner = Runner {
        plan,
        place,
        stop,
        events,
        store: &mut store,
        done: 0,
        total: plan.trials_of(contests.len()),
    };
    let mut rates: BTreeMap<usize, f64> = BTreeMap::new();
    for (index, contest) in contests.iter().enumerate() {
        rates.insert(index, runner.tune(contest)?);
    }
    // Seed by seed, so that every contender has its first result early.
    for seed in &plan.seeds {
        for (index, contest) in contests.iter().enumerate() {
            let rate = rates.get(&index).copied().unwrap_or(contest.train.lr);
            runner.trial(contest, *seed, rate, false)?;
        }
    }
    finish(plan, place, &tasks, &contests, &store)
}

struct Runner<'a> {
    plan: &'a Plan,
    place: &'a Where,
    stop: &'a StopFlag,
    events: &'a mut dyn FnMut(&Event),
    store: &'a mut Store,
    done: usize,
    total: usize,
}

impl Runner<'_> {
    /// The learning rate of a contender: the one with the best validation on the first seed.
    fn tune(&mut self, contest: &Contest) -> Result<f64, CompareError> {
        let rates = &self.plan.learning_rates;
        match rates.as_slice() {
            [] => return Ok(contest.train.lr),
            [only] => return Ok(*only),
            _ => {}
        }
        let mut best: Option<(f64, Metric)> = None;
        for rate in rates {
            let record = self.trial(contest, self.plan.seeds[0], *rate, true)?;
            let Some(result) = record.result else {
                continue;
            };
            let metric = result.metric;
            let better = best
                .as_ref()
                .is_none_or(|(_, held)| held.goal.better(metric.value, held.value));
            if better {
                best = Some((*rate, metric));
            }
        }
        Ok(best.map_or(rates[0], |(rate, _)| rate))
    }

    /// Runs one trial, unless the store has it.
    fn trial(
        &mut self,
        contest: &Contest,
        seed: u64,
        lr: f64,
        tuning: bool,
    ) -> Result<TrialRecord, CompareError> {
        let train = TrainConfig {
            lr,
            min_lr: contest.train.min_lr.min(lr),
            seed,
            ..contest.train.clone()
        };
        let key = TrialKey {
            task: contest.task.name.clone(),
            mixer: contest.mixer.clone(),
            size: Value::Object(contest.sized.config.to_json()),
            setup: json!({
                "task": contest.task.options,
                "train": train.to_json(),
                "eval_batches": contest.task.eval_batches,
                "latency_lengths": self.plan.latency_lengths,
                "tuning": tuning,
            }),
            seed,
            budget: contest.budget,
        };
        let total = self.total;
        let (record, earlier) = match self.store.claim(&key)? {
            Claim::Done(record) | Claim::Failed(record) => (*record, true),
            Claim::Busy => {
                return Err(CompareError::Plan(
                    "a trial is being run by another process".into(),
                ));
            }
            Claim::Run(ticket) => {
                (self.events)(&Event::Started {
                    done: self.done,
                    total,
                    task: key.task.clone(),
                    mixer: key.mixer.clone(),
                    seed,
                });
                match self.measure(contest, &train, tuning) {
                    Ok(result) => self.store.finish(&ticket, &result)?,
                    Err(CompareError::Stopped) => {
                        self.store.release(ticket)?;
                        return Err(CompareError::Stopped);
                    }
                    Err(
                        error @ CompareError::Train(anyformer_train::TrainError::NotFinite {
                            ..
                        }),
                    ) => {
                        self.store.fail(&ticket, &error.to_string())?;
                    }
                    Err(error) => {
                        self.store.release(ticket)?;
                        return Err(error);
                    }
                }
                let Some(record) = self.store.get(&key.id())? else {
                    return Err(CompareError::Plan("a finished trial left the store".into()));
                };
                (record, false)
            }
        };
        self.done += 1;
        (self.events)(&Event::Finished {
            done: self.done,
            total,
            record: Box::new(record.clone()),
            earlier,
        });
        Ok(record)
    }

    fn measure(
        &mut self,
        contest: &Contest,
        train: &TrainConfig,
        tuning: bool,
    ) -> Result<TrialResult, CompareError> {
        let started = units::now();
        let clock = Instant::now();
        let config = &contest.sized.config;
        let spec = contest.data.spec();
        let before = memory::allocated();
        memory::reset_peak();
        let device = training_device(&self.place.device, train);
        let model = Model::new(config, &device, train.seed)?;
        let cost = model.cost(spec.time);
        let mut curve = Vec::new();
        let mut trainer = Trainer::new(model, contest.data, train.clone())?;
        let events = &mut *self.events;
        let mut sink = |event: &anyformer_train::Event| {
            follow(event, train.steps, contest, &mut curve, events);
            Ok(())
        };
        let outcome = trainer.run(&mut sink, self.stop)?;
        if outcome == Outcome::Stopped {
            return Err(CompareError::Stopped);
        }
        let peak = memory::peak().saturating_sub(before) as u64;
        let model = trainer.into_model();
        let split = if tuning {
            Split::Validation
        } else {
            Split::Test
        };
        let batches = contest.task.eval_batches;
        let score = evaluate(&model, contest.data, split, train.batch, batches)?;
        drop(model);
        let first = train.seed == self.plan.seeds[0] && contest.latency && !tuning;
        let latency = match first {
            true => latency::measure(config, &self.plan.latency_lengths)?,
            false => Vec::new(),
        };
        let (tokens, seconds) = curve
            .last()
            .map_or((0, 0.0), |point: &CurvePoint| (point.tokens, point.seconds));
        let rate = tokens as f64 / f64::max(seconds, 1e-9);
        Ok(TrialResult {
            metric: metric(contest, score.loss, score.accuracy),
            loss: score.loss,
            budget_value: contest.sized.value,
            params: cost.params,
            flops_per_token: cost.flops as f64 / spec.time.max(1) as f64,
            state_bytes: config.streams().then_some(cost.state_bytes),
            train_tokens_per_second: rate,
            peak_memory_bytes: (peak > 0).then_some(peak),
            wall_seconds: clock.elapsed().as_secs_f64(),
            curve,
            latency,
            commit: self.place.commit.clone(),
            machine: self.place.machine.clone(),
            command: self.place.command.clone(),
            started,
            finished: units::now(),
        })
    }
}

/// Turns training events into points of the curve and progress.
fn follow(
    event: &anyformer_train::Event,
    steps: u64,
    contest: &Contest,
    curve: &mut Vec<CurvePoint>,
    events: &mut dyn FnMut(&Event),
) {
    match event {
        anyformer_train::Event::Step {
            step,
            loss,
            tokens,
            tokens_per_second,
            seconds,
            ..
        } => {
            curve.push(CurvePoint {
                step: *step,
                tokens: *tokens,
                seconds: *seconds,
                train_loss: *loss,
                metric: None,
            });
            events(&Event::Step {
                step: *step,
                steps,
                loss: *loss,
                tokens_per_second: *tokens_per_second,
            });
        }
        anyformer_train::Event::Evaluated { loss, accuracy, .. } => {
            if let Some(point) = curve.last_mut() {
                point.metric = Some(metric(contest, *loss, *accuracy).value);
            }
        }
        _ => {}
    }
}

/// Accuracy; for language modelling, where a share of right guesses says little, bits per token.
fn metric(contest: &Contest, loss: f64, accuracy: f64) -> Metric {
    let language = contest.task.name == "text"
        && matches!(contest.sized.config.gives, Gives::NextToken { .. });
    match language {
        true => Metric {
            name: "bits per token".into(),
            value: loss / std::f64::consts::LN_2,
            unit: MetricUnit::Plain,
            goal: Goal::Minimize,
        },
        false => Metric {
            name: "accuracy".into(),
            value: accuracy,
            unit: MetricUnit::Fraction,
            goal: Goal::Maximize,
        },
    }
}

fn finish(
    plan: &Plan,
    place: &Where,
    tasks: &[Box<dyn Task>],
    contests: &[Contest],
    store: &Store,
) -> Result<Comparison, CompareError> {
    let all = store.records()?;
    let counts = |record: &&TrialRecord| record.key.setup.get("tuning") != Some(&Value::Bool(true));
    let records: Vec<TrialRecord> = all.iter().filter(counts).cloned().collect();
    let task_names: Vec<String> = plan.tasks.iter().map(|task| task.name.clone()).collect();
    let mixers: Vec<String> = plan
        .mixers
        .iter()
        .map(|mixer: &MixerSpec| label(mixer))
        .collect();
    let latency_length = plan.latency_lengths.last().map(|length| *length as u64);
    let table = Table::build(
        &records,
        &TableOptions {
            tasks: task_names,
            mixers: mixers.clone(),
            latency_length,
        },
    );
    let exports = export::write_all(&place.folder, &all)?;
    let report = place.folder.join("report.html");
    let data = ReportData {
        title: "Anyformer comparison".into(),
        command: place.command.clone(),
        commit: place.commit.clone(),
        machine: place.machine.clone(),
        seeds: plan.seeds.clone(),
        made: units::now(),
        budget: contests[0].budget,
        tasks: plan
            .tasks
            .iter()
            .zip(tasks)
            .map(|(task, data)| TaskInfo {
                name: task.name.clone(),
                description: data.spec().description.clone(),
                floor: data.spec().floor.map(|value| Floor {
                    value,
                    label: "constant answer".into(),
                }),
            })
            .collect(),
        mixers,
        latency_length,
        records: records.clone(),
    };
    report::write(&report, &data).map_err(|error| CompareError::Report(error.to_string()))?;
    let markdown = place.folder.join("table.md");
    write(&markdown, &table.to_markdown())?;
    Ok(Comparison {
        records,
        table,
        report,
        exports,
    })
}
