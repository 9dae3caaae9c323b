//! The trials as flat columns: what CSV and Parquet files hold.

use crate::trial::TrialRecord;

/// One column; an absent value is `None`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Cells {
    Text(Vec<Option<String>>),
    Count(Vec<Option<u64>>),
    Number(Vec<Option<f64>>),
}

/// Named columns of equal length.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) columns: Vec<(&'static str, Cells)>,
}

fn text<T>(rows: &[T], get: impl Fn(&T) -> Option<String>) -> Cells {
    Cells::Text(rows.iter().map(get).collect())
}

fn count<T>(rows: &[T], get: impl Fn(&T) -> Option<u64>) -> Cells {
    Cells::Count(rows.iter().map(get).collect())
}

fn number<T>(rows: &[T], get: impl Fn(&T) -> Option<f64>) -> Cells {
    Cells::Number(rows.iter().map(get).collect())
}

impl Frame {
    /// One row per trial.
    pub(crate) fn trials(records: &[TrialRecord]) -> Self {
        use crate::trial::TrialResult as R;
        let r = records;
        let result =
            |get: fn(&R) -> Option<f64>| number(r, move |row| row.result.as_ref().and_then(get));
        let whole =
            |get: fn(&R) -> Option<u64>| count(r, move |row| row.result.as_ref().and_then(get));
        let words = |get: fn(&R) -> String| text(r, move |row| row.result.as_ref().map(get));
        let columns = vec![
            ("id", text(r, |row| Some(row.id.to_string()))),
            ("task", text(r, |row| Some(row.key.task.clone()))),
            ("mixer", text(r, |row| Some(row.key.mixer.clone()))),
            ("seed", count(r, |row| Some(row.key.seed))),
            (
                "size",
                text(r, |row| Some(crate::canonical::text(&row.key.size))),
            ),
            (
                "setup",
                text(r, |row| Some(crate::canonical::text(&row.key.setup))),
            ),
            (
                "budget",
                text(r, |row| Some(row.key.budget.kind.name().into())),
            ),
            (
                "budget_target",
                number(r, |row| Some(row.key.budget.target)),
            ),
            (
                "budget_tolerance",
                number(r, |row| Some(row.key.budget.tolerance)),
            ),
            ("status", text(r, |row| Some(row.status.name().into()))),
            ("attempts", count(r, |row| Some(u64::from(row.attempts)))),
            ("error", text(r, |row| row.error.clone())),
            ("metric", words(|result| result.metric.name.clone())),
            ("metric_value", result(|result| Some(result.metric.value))),
            ("loss", result(|result| Some(result.loss))),
            ("budget_value", result(|result| Some(result.budget_value))),
            ("params", whole(|result| Some(result.params))),
            (
                "flops_per_token",
                result(|result| Some(result.flops_per_token)),
            ),
            ("state_bytes", whole(|result| result.state_bytes)),
            (
                "train_tokens_per_second",
                result(|result| Some(result.train_tokens_per_second)),
            ),
            (
                "peak_memory_bytes",
                whole(|result| result.peak_memory_bytes),
            ),
            ("wall_seconds", result(|result| Some(result.wall_seconds))),
            ("commit", words(|result| result.commit.clone())),
            ("machine", words(|result| result.machine.clone())),
            ("command", words(|result| result.command.clone())),
            (
                "started",
                whole(|result| u64::try_from(result.started).ok()),
            ),
            (
                "finished",
                whole(|result| u64::try_from(result.finished).ok()),
            ),
        ];
        Self { columns }
    }

    /// One row per point of a learning curve.
    pub(crate) fn curves(records: &[TrialRecord]) -> Self {
        let rows: Vec<_> = records
            .iter()
            .flat_map(|record| {
                record
                    .result
                    .iter()
                    .flat_map(|r| &r.curve)
                    .map(move |point| (record, point))
            })
            .collect();
        let columns = vec![
            ("id", text(&rows, |(record, _)| Some(record.id.to_string()))),
            ("step", count(&rows, |(_, point)| Some(point.step))),
            ("tokens", count(&rows, |(_, point)| Some(point.tokens))),
            ("seconds", number(&rows, |(_, point)| Some(point.seconds))),
            (
                "train_loss",
                number(&rows, |(_, point)| Some(point.train_loss)),
            ),
            ("metric_value", number(&rows, |(_, point)| point.metric)),
        ];
        Self { columns }
    }

    /// One row per measured length.
    pub(crate) fn latency(records: &[TrialRecord]) -> Self {
        let rows: Vec<_> = records
            .iter()
            .flat_map(|record| {
                record
                    .result
                    .iter()
                    .flat_map(|r| &r.latency)
                    .map(move |point| (record, point))
            })
            .collect();
        let columns = vec![
            ("id", text(&rows, |(record, _)| Some(record.id.to_string()))),
            ("length", count(&rows, |(_, point)| Some(point.length))),
            (
                "prefill_seconds",
                number(&rows, |(_, point)| Some(point.prefill_seconds)),
            ),
            (
                "step_seconds",
                number(&rows, |(_, point)| point.step_seconds),
            ),
            ("state_bytes", count(&rows, |(_, point)| point.state_bytes)),
            (
                "memory_bytes",
                count(&rows, |(_, point)| point.memory_bytes),
            ),
        ];
        Self { columns }
    }

    /// Number of rows.
    pub(crate) fn height(&self) -> usize {
        match self.columns.first() {
            None => 0,
            Some((_, Cells::Text(cells))) => cells.len(),
            Some((_, Cells::Count(cells))) => cells.len(),
            Some((_, Cells::Number(cells))) => cells.len(),
        }
    }
}

impl Cells {
    /// The value of `row` as CSV text; a number prints so that it reads back to the same bits.
    pub(crate) fn show(&self, row: usize) -> String {
        match self {
            Self::Text(cells) => cells[row].clone().unwrap_or_default(),
            Self::Count(cells) => cells[row]
                .map(|value| value.to_string())
                .unwrap_or_default(),
            Self::Number(cells) => cells[row]
                .map(|value| value.to_string())
                .unwrap_or_default(),
        }
    }
}
