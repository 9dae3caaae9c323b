//! `anyformer compare`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyformer_kernels::instructions::Instructions;
use anyformer_lab::compare::{self, CompareError, Event, Plan, TaskPlan, Where, parse_mixer};
use anyformer_lab::units::{bytes, count, grouped};
use anyformer_mixers::{MixerSpec, token_mixers};
use anyformer_train::StopFlag;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::overrides;
use crate::progress::quoted;
use crate::run_file::check_keys;
use crate::say::Say;
use crate::session::train_failure;
use crate::setup::{cores, device, device_name, start_threads, stop_on_signal};
use crate::verbs::doctor;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tasks, by commas [default: the preset's]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub tasks: Vec<String>,
    /// Contenders, by commas, as gla,attention(heads=8); the first sets the budget [default: the preset's]
    #[arg(long, value_name = "NAMES")]
    pub mixers: Option<String>,
    /// What is equal among contenders [default: the preset's, params]
    #[arg(long = "match", value_name = "BUDGET", value_parser = ["params", "flops", "state", "time"])]
    pub budget: Option<String>,
    /// Largest distance from the budget, as 2% [default: the preset's, 2%]
    #[arg(long, value_name = "PERCENT")]
    pub tolerance: Option<String>,
    /// Seeds of each contender: 0 to N-1 [default: the preset's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub seeds: Option<u16>,
    /// Training steps of each trial [default: the preset's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// The settings that the other flags change: quick takes about three minutes on two cores
    #[arg(long, value_name = "NAME", default_value = "quick", value_parser = ["quick", "full"])]
    pub preset: String,
    /// The folder of the comparison; one that holds the same comparison goes on where it was
    #[arg(long, short, value_name = "DIR", default_value = "comparison")]
    pub out: PathBuf,
    /// Keys of the plan that differ, as model.dim=96 or train.lr=1e-3
    #[arg(value_name = "KEY=VALUE")]
    pub changes: Vec<String>,
}

/// Plans, runs what is not done yet, prints the table.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let plan = plan(args)?;
    plan.check().map_err(failure)?;
    let place = place(&args.out, global)?;
    let stop = StopFlag::default();
    let asked = stop.clone();
    stop_on_signal(move || asked.request())?;
    say.note(format!(
        "{} trials in {}",
        plan.trials(),
        args.out.display()
    ));
    let mut show = Show::new(say, plan.trials());
    let outcome = compare::run(&plan, &place, &stop, &mut |event| show.event(event));
    drop(show);
    let comparison = finished(outcome, &place)?;
    let value = json!({
        "report": comparison.report, "exports": comparison.exports, "table": args.out.join("table.md"),
        "trials": comparison.records,
    });
    say.result(&value, || {
        let exports = comparison
            .exports
            .iter()
            .map(|path| path.display().to_string());
        let exports: Vec<String> = exports.collect();
        format!(
            "{}\nreport: {}\ndata:   {}",
            comparison.table.to_text(width()),
            comparison.report.display(),
            exports.join(", ")
        )
    });
    Ok(())
}

/// Columns of the terminal; wide where there is none.
pub(super) fn width() -> usize {
    match std::io::stdout().is_terminal() {
        true => terminal_size::terminal_size().map_or(100, |(width, _)| usize::from(width.0)),
        false => 160,
    }
}

/// The whole command line, to be typed again.
/// Where a comparison runs, and what is noted about it; starts the threads.
pub(super) fn place(folder: &Path, global: &Global) -> Result<Where, Failure> {
    let device = device(&device_name(global, None))?;
    let threads = start_threads(global, None)?;
    Ok(Where {
        folder: folder.to_path_buf(),
        commit: env!("ANYFORMER_COMMIT").to_string(),
        machine: machine(threads),
        command: command(),
        device,
    })
}

/// What a comparison gave; one that was interrupted says how to go on.
pub(super) fn finished<T>(outcome: Result<T, CompareError>, place: &Where) -> Result<T, Failure> {
    match outcome {
        Err(CompareError::Stopped) => Err(Failure::Interrupted(format!(
            "interrupted; what is finished is kept, the same command goes on: {}",
            place.command
        ))),
        other => other.map_err(failure),
    }
}

fn command() -> String {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .map(|word| quoted(word.as_ref()))
        .collect();
    format!("anyformer {}", words.join(" "))
}

fn machine(threads: usize) -> String {
    let processor = doctor::processor().unwrap_or(std::env::consts::ARCH.to_string());
    let memory =
        doctor::memory()[0].map_or(String::new(), |total| format!(", {}", bytes(total as f64)));
    format!(
        "{processor}, {} cores, {threads} threads, {}{memory}",
        cores(),
        doctor::simd(Instructions::best())
    )
}

/// The preset under the flags under the overrides.
fn plan(args: &Args) -> Result<Plan, Failure> {
    let mut plan = match args.preset.as_str() {
        "full" => full(),
        _ => Plan::quick(),
    };
    if !args.tasks.is_empty() {
        let plans = args.tasks.iter().map(|name| {
            // Unknown names are refused before anything else is looked at.
            anyformer_data::task(name, &Value::Null).input()?;
            let held = plan.tasks.iter().find(|task| task.name == *name).cloned();
            Ok(held
                .or_else(|| TaskPlan::preset(name))
                .unwrap_or_else(|| TaskPlan::named(name)))
        });
        plan.tasks = plans.collect::<Result<_, Failure>>()?;
    }
    if let Some(names) = &args.mixers {
        let mixers = split(names)
            .into_iter()
            .map(|name| parse_mixer(name).map_err(failure));
        plan.mixers = mixers.collect::<Result<_, Failure>>()?;
    }
    if let Some(name) = &args.budget {
        plan.budget = name.parse().input()?;
    }
    if let Some(text) = &args.tolerance {
        plan.tolerance = percent(text)?;
    }
    if let Some(seeds) = args.seeds {
        plan.seeds = (0..u64::from(seeds)).collect();
    }
    if let Some(steps) = args.steps {
        plan.tasks
            .iter_mut()
            .for_each(|task| train_for(task, steps));
    }
    let mut plan = overridden(plan, &args.changes)?;
    if let Some(steps) = args.steps {
        reach_new_tasks(&mut plan, steps);
    }
    Ok(plan)
}

/// Tasks that an override has put in have not heard of `--steps`.
fn reach_new_tasks(plan: &mut Plan, steps: u64) {
    let silent = |task: &&mut TaskPlan| !task.train.contains_key("steps");
    let tasks = plan.tasks.iter_mut().filter(silent);
    tasks.for_each(|task| train_for(task, steps));
}

/// Sets the steps of a task, with a warm-up that fits in.
fn train_for(task: &mut TaskPlan, steps: u64) {
    let warmup = task.train.get("warmup").and_then(Value::as_u64);
    let warmup = warmup.unwrap_or(0).min(steps / 10);
    task.train.insert("steps".into(), json!(steps));
    task.train.insert("warmup".into(), json!(warmup));
}

/// Every token mixer that looks back only, three seeds, five times the training, the learning rate tuned for each.
fn full() -> Plan {
    let mut plan = Plan::quick();
    let causal = token_mixers()
        .iter()
        .filter(|entry| entry.causal(&Default::default()));
    plan.mixers = causal
        .map(|entry| MixerSpec::named(entry.card.name))
        .collect();
    plan.seeds = vec![0, 1, 2];
    plan.learning_rates = vec![1e-3, 3e-3, 1e-2];
    for task in &mut plan.tasks {
        let steps = task
            .train
            .get("steps")
            .and_then(Value::as_u64)
            .unwrap_or(200);
        task.train.insert("steps".into(), json!(5 * steps));
    }
    plan
}

fn overridden(plan: Plan, changes: &[String]) -> Result<Plan, Failure> {
    if changes.is_empty() {
        return Ok(plan);
    }
    let table = serde_json::to_value(&plan).broken()?;
    let Value::Object(mut table) = table else {
        return Err(bad_input("plan the comparison: the plan is not a table"));
    };
    let known: Vec<String> = table.keys().cloned().collect();
    for text in changes {
        let change = overrides::parse(text)?;
        overrides::apply(&mut table, &change)?;
        // One rate that is given is the rate of all, and nothing is tuned.
        if change.path == ["train", "lr"] {
            table.insert("learning_rates".into(), json!([change.value]));
        }
    }
    check_keys(
        &table,
        known.iter().map(String::as_str),
        "the overrides",
        "key of the plan",
    )?;
    serde_json::from_value(Value::Object(table))
        .map_err(|error| bad_input(format!("read the overrides: {error}")))
}

/// `gla,attention(heads=8,variant=sqa)` at the commas outside of brackets.
pub(super) fn split(names: &str) -> Vec<&str> {
    let mut depth = 0_i32;
    let parts = names.split(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        c == ',' && depth == 0
    });
    parts
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect()
}

/// `2%` or `0.02`.
fn percent(text: &str) -> Result<f64, Failure> {
    let (number, scale) = match text.strip_suffix('%') {
        Some(number) => (number, 0.01),
        None => (text, 1.0),
    };
    let value: f64 = number.trim().parse().map_err(|_| {
        bad_input(format!(
            "read the tolerance {text:?}: expected a number as 2% or 0.02"
        ))
    })?;
    Ok(value * scale)
}

/// Which side a failure is on.
pub(super) fn failure(error: CompareError) -> Failure {
    match error {
        CompareError::Train(error) => train_failure(error),
        CompareError::Folder { .. }
        | CompareError::Export(_)
        | CompareError::Report(_)
        | CompareError::Stopped => Failure::Broken(error.into()),
        other => Failure::Input(other.into()),
    }
}

/// Progress: one bar over all trials on a terminal, a line a trial elsewhere.
pub(super) struct Show<'a> {
    say: &'a Say,
    bar: Option<ProgressBar>,
    now: String,
}

impl<'a> Show<'a> {
    pub(super) fn new(say: &'a Say, trials: usize) -> Self {
        let bar = say.can_redraw().then(|| {
            let target = ProgressDrawTarget::stderr_with_hz(8);
            let bar = ProgressBar::with_draw_target(Some(trials as u64), target);
            if let Ok(style) = ProgressStyle::with_template(
                "{bar:20} {pos}/{len}  {msg}  {elapsed} gone, {eta} left",
            ) {
                bar.set_style(style);
            }
            bar
        });
        Show {
            say,
            bar,
            now: String::new(),
        }
    }

    fn line(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.say.note(text)),
            None => self.say.note(text),
        }
    }

    pub(super) fn event(&mut self, event: &Event) {
        match event {
            Event::Sized {
                task,
                mixer,
                dim,
                params,
                mismatch,
            } => {
                let params = grouped(*params);
                self.line(format!(
                    "{task}: {mixer} at dim {dim}, {params} parameters, {:+.2} % off",
                    100.0 * mismatch
                ));
            }
            Event::LeftOut {
                task,
                mixer,
                reason,
            } => self.line(format!("{task}: {mixer} is left out: {reason}")),
            Event::Timed { mixer, lengths } => {
                self.line(format!("{mixer} timed at {lengths} lengths"));
            }
            Event::Started {
                task, mixer, seed, ..
            } => self.now = format!("{task} {mixer} seed {seed}"),
            Event::Step {
                step,
                steps,
                loss,
                tokens_per_second,
            } => {
                if let Some(bar) = &self.bar {
                    let speed = count(*tokens_per_second);
                    bar.set_message(format!(
                        "{}  step {step}/{steps}  loss {loss:.3}  {speed} tokens/s",
                        self.now
                    ));
                }
            }
            Event::Finished {
                done,
                total,
                record,
                earlier,
            } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*done as u64);
                }
                let key = &record.key;
                let how = match (&record.result, earlier) {
                    (None, _) => "failed".to_string(),
                    (Some(result), earlier) => {
                        let value = result.metric.unit.scale(result.metric.value);
                        let kept = if *earlier { ", kept from before" } else { "" };
                        format!("{} {value:.3}{kept}", result.metric.name)
                    }
                };
                self.line(format!(
                    "{done}/{total}  {} {} seed {}: {how}",
                    key.task, key.mixer, key.seed
                ));
            }
        }
    }
}

impl Drop for Show<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_split_outside_of_brackets() {
        assert_eq!(
            split("gla, attention(heads=8,variant=sqa),mamba"),
            ["gla", "attention(heads=8,variant=sqa)", "mamba"]
        );
        assert!(percent("2%").is_ok_and(|value| (value - 0.02).abs() < 1e-12));
        assert!(percent("0.02").is_ok_and(|value| (value - 0.02).abs() < 1e-12));
        assert!(percent("two").is_err());
    }

    #[test]
    fn overrides_change_the_plan_and_unknown_keys_are_refused() {
        let plan = |words: &[&str]| {
            overridden(
                Plan::quick(),
                &words.iter().map(ToString::to_string).collect::<Vec<_>>(),
            )
        };
        let changed = plan(&["model.dim=96", "train.lr=0.01", "tasks.0.train.steps=7"]);
        assert!(changed.is_ok_and(|plan| {
            plan.model["dim"] == 96
                && plan.learning_rates == [0.01]
                && plan.tasks[0].train["steps"] == 7
        }));
        let new = plan(&[r#"tasks=[{name="mqar"},{name="gap",train={steps=7}}]"#]);
        assert!(new.is_ok_and(|mut plan| {
            reach_new_tasks(&mut plan, 50);
            let steps = plan.tasks.iter().map(|task| task.train["steps"].as_u64());
            steps.eq([Some(50), Some(7)])
        }));
        for wrong in ["modle.dim=3", "seeds=three", "tasks.0.nmae=x"] {
            assert!(matches!(plan(&[wrong]), Err(Failure::Input(_))), "{wrong}");
        }
        assert!(full().check().is_ok());
    }
}
