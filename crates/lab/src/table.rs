//! The comparison table as data: a row per contender, a column per quantity, each cell with the trials behind it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::stats::Summary;
use crate::trial::{BudgetKind, Goal, LatencyPoint, MetricUnit, TrialId, TrialRecord, TrialResult};
use crate::units;

mod marks;
mod text;

/// What a column shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Quality on one task.
    Quality {
        /// The task.
        task: String,
        /// How the metric is printed.
        unit: MetricUnit,
    },
    /// Trainable parameters.
    Params,
    /// Largest distance from the budget over the tasks, signed.
    Mismatch,
    /// FLOPs per token of a forward pass.
    FlopsPerToken,
    /// Bytes of carried state at the length of the task.
    StateBytes,
    /// Training tokens per second.
    TrainRate,
    /// Peak memory of training.
    PeakMemory,
    /// Seconds for a whole prompt of the table's length.
    Prefill,
    /// Seconds for one more token after a prompt of that length.
    PerToken,
}

/// One column.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Column {
    /// What it shows.
    pub quantity: Quantity,
    /// First line of its heading.
    pub title: String,
    /// Second line of its heading: metric or unit.
    pub unit: String,
    /// Which direction is better; absent where neither is (the budgeted quantity, the mismatch).
    pub goal: Option<Goal>,
}

/// How a cell stands among the others of its column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    /// The best mean.
    Best,
    /// Its mean is within two standard errors of the difference from the best one.
    Tied,
    /// Neither.
    Plain,
}

/// One cell.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// Statistics over the trials, in the unit of the measurement (bytes, seconds, fraction).
    pub summary: Summary,
    /// The trials behind the number.
    pub trials: Vec<TrialId>,
    /// How it stands in its column.
    pub mark: Mark,
    /// The number as printed, without the mark.
    pub text: String,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TableRow {
    /// The contender.
    pub mixer: String,
    /// A cell per column; absent where nothing was measured.
    pub cells: Vec<Option<Cell>>,
}

/// The table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Table {
    /// Its columns.
    pub columns: Vec<Column>,
    /// Its rows, in the order asked for.
    pub rows: Vec<TableRow>,
    /// Prompt length of the prefill and per-token columns; absent if no latency was measured.
    pub latency_length: Option<u64>,
    /// What the reader must know beside the numbers: failed and unfinished trials, meaning of the marks.
    pub notes: Vec<String>,
}

/// How to build the table.
#[derive(Debug, Clone, Default)]
pub struct TableOptions {
    /// Tasks, in column order; empty: in order of first trial.
    pub tasks: Vec<String>,
    /// Contenders, in row order; empty: in order of first trial.
    pub mixers: Vec<String>,
    /// Prompt length of the latency columns; absent: the largest length that every contender with latencies has.
    pub latency_length: Option<u64>,
}

impl Table {
    /// Builds the table from the rows of a store; unfinished and failed trials count only in the notes.
    pub fn build(records: &[TrialRecord], options: &TableOptions) -> Self {
        let tasks = names(&options.tasks, records, |record| &record.key.task);
        let mixers = names(&options.mixers, records, |record| &record.key.mixer);
        let chosen: Vec<(&TrialRecord, &TrialResult)> = records
            .iter()
            .filter(|record| tasks.contains(&record.key.task) && mixers.contains(&record.key.mixer))
            .filter_map(|record| Some((record, record.result.as_ref()?)))
            .collect();
        let latency_length = options.latency_length.or_else(|| common_length(&chosen));
        let columns = columns(&chosen, &tasks, latency_length);
        let mut rows: Vec<TableRow> = mixers
            .iter()
            .map(|mixer| {
                let mine: Vec<_> = chosen
                    .iter()
                    .copied()
                    .filter(|(record, _)| &record.key.mixer == mixer)
                    .collect();
                let cells = columns
                    .iter()
                    .map(|column| cell(column, &mine, latency_length))
                    .collect();
                TableRow {
                    mixer: mixer.clone(),
                    cells,
                }
            })
            .collect();
        for (index, column) in columns.iter().enumerate() {
            marks::mark(&mut rows, index, column.goal);
        }
        let notes = marks::notes(records, &tasks, &mixers, &rows);
        Self {
            columns,
            rows,
            latency_length,
            notes,
        }
    }
}

fn names(
    asked: &[String],
    records: &[TrialRecord],
    get: fn(&TrialRecord) -> &String,
) -> Vec<String> {
    if !asked.is_empty() {
        return asked.to_vec();
    }
    let mut found: Vec<String> = Vec::new();
    for record in records {
        if !found.contains(get(record)) {
            found.push(get(record).clone());
        }
    }
    found
}

fn common_length(chosen: &[(&TrialRecord, &TrialResult)]) -> Option<u64> {
    let mut lengths: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (record, result) in chosen
        .iter()
        .filter(|(_, result)| !result.latency.is_empty())
    {
        lengths
            .entry(&record.key.mixer)
            .or_default()
            .extend(result.latency.iter().map(|point| point.length));
    }
    let mut all = lengths.into_values();
    let mut common = all.next()?;
    for other in all {
        common.retain(|length| other.contains(length));
    }
    common.into_iter().max()
}

fn columns(
    chosen: &[(&TrialRecord, &TrialResult)],
    tasks: &[String],
    latency_length: Option<u64>,
) -> Vec<Column> {
    let budget = chosen.first().map(|(record, _)| record.key.budget.kind);
    let mut columns = Vec::new();
    for task in tasks {
        // A task without a finished trial keeps its column, so that the gap is seen.
        let metric = chosen
            .iter()
            .find(|(record, _)| &record.key.task == task)
            .map(|(_, result)| &result.metric);
        let unit = metric.map_or(MetricUnit::Plain, |metric| metric.unit);
        let percent = if unit == MetricUnit::Fraction {
            " %"
        } else {
            ""
        };
        columns.push(Column {
            quantity: Quantity::Quality {
                task: task.clone(),
                unit,
            },
            title: task.clone(),
            unit: metric.map_or(String::new(), |metric| format!("{}{percent}", metric.name)),
            goal: metric.map(|metric| metric.goal),
        });
    }
    let mut add = |quantity, title: &str, unit: &str, goal| {
        columns.push(Column {
            quantity,
            title: title.into(),
            unit: unit.into(),
            goal,
        });
    };
    let unless = |kind, goal| {
        if budget == Some(kind) {
            None
        } else {
            Some(goal)
        }
    };
    add(Quantity::Params, "params", "", None);
    add(
        Quantity::Mismatch,
        "mismatch",
        budget.map_or("", BudgetKind::name),
        None,
    );
    add(
        Quantity::FlopsPerToken,
        "FLOPs",
        "per token",
        unless(BudgetKind::Flops, Goal::Minimize),
    );
    add(
        Quantity::StateBytes,
        "state",
        "per sequence",
        unless(BudgetKind::State, Goal::Minimize),
    );
    add(
        Quantity::TrainRate,
        "training",
        "tokens/s",
        Some(Goal::Maximize),
    );
    add(
        Quantity::PeakMemory,
        "memory",
        "training peak",
        Some(Goal::Minimize),
    );
    if let Some(length) = latency_length {
        add(
            Quantity::Prefill,
            "prefill",
            &format!("{} tokens", units::grouped(length)),
            Some(Goal::Minimize),
        );
        add(
            Quantity::PerToken,
            "next token",
            &format!("after {}", units::grouped(length)),
            Some(Goal::Minimize),
        );
    }
    columns
}

fn cell(
    column: &Column,
    mine: &[(&TrialRecord, &TrialResult)],
    length: Option<u64>,
) -> Option<Cell> {
    let at = |result: &TrialResult| -> Option<LatencyPoint> {
        result
            .latency
            .iter()
            .find(|point| Some(point.length) == length)
            .cloned()
    };
    let value = |record: &TrialRecord, result: &TrialResult| -> Option<f64> {
        match &column.quantity {
            Quantity::Quality { task, .. } => {
                (&record.key.task == task).then_some(result.metric.value)
            }
            Quantity::Params => Some(result.params as f64),
            Quantity::Mismatch => Some(result.mismatch(&record.key.budget)),
            Quantity::FlopsPerToken => Some(result.flops_per_token),
            Quantity::StateBytes => result.state_bytes.map(|bytes| bytes as f64),
            Quantity::TrainRate => Some(result.train_tokens_per_second),
            Quantity::PeakMemory => result.peak_memory_bytes.map(|bytes| bytes as f64),
            Quantity::Prefill => at(result).map(|point| point.prefill_seconds),
            Quantity::PerToken => at(result).and_then(|point| point.step_seconds),
        }
    };
    let found: Vec<(TrialId, f64)> = mine
        .iter()
        .filter_map(|(record, result)| Some((record.id.clone(), value(record, result)?)))
        .collect();
    let values: Vec<f64> = found.iter().map(|(_, value)| *value).collect();
    let summary = Summary::of(&values)?;
    let text = show(&column.quantity, &summary);
    Some(Cell {
        summary,
        trials: found.into_iter().map(|(id, _)| id).collect(),
        mark: Mark::Plain,
        text,
    })
}

fn show(quantity: &Quantity, summary: &Summary) -> String {
    let exact = |show: fn(f64) -> String| {
        let (low, high) = (show(summary.min), show(summary.max));
        if low == high {
            low
        } else {
            format!("{low} – {high}")
        }
    };
    match quantity {
        Quantity::Quality { unit, .. } => quality(*unit, summary),
        Quantity::Params | Quantity::FlopsPerToken => exact(units::count),
        Quantity::StateBytes => exact(units::bytes),
        Quantity::Mismatch => {
            let worst = if summary.max.abs() >= summary.min.abs() {
                summary.max
            } else {
                summary.min
            };
            format!("{:+.2} %", worst * 100.0)
        }
        Quantity::TrainRate => units::count(summary.mean),
        Quantity::PeakMemory => units::bytes(summary.mean),
        Quantity::Prefill | Quantity::PerToken => units::seconds(summary.mean),
    }
}

/// `mean ± standard error` with equal decimals: one for percentages, three for other metrics.
pub(crate) fn quality(unit: MetricUnit, summary: &Summary) -> String {
    let decimals = if unit == MetricUnit::Fraction { 1 } else { 3 };
    let mean = format!("{:.*}", decimals, unit.scale(summary.mean));
    match summary.standard_error {
        Some(error) => format!("{mean} ± {:.*}", decimals, unit.scale(error)),
        None => mean,
    }
}
