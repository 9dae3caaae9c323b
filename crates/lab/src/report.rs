//! `report.html`: one file without outside requests that holds the table, the plots and every trial.
//!
//! Plots are inline SVG, styles are inline CSS with a light and a dark theme, there is no script. Every number of the main table
//! links to the trials behind it, and every trial names its commit, machine and command.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::atomic;
use crate::table::{Table, TableOptions};
use crate::trial::{Budget, TrialRecord};

mod axis;
mod figures;
pub(crate) mod html;
mod plot;
mod trials;

/// The score of an answer that ignores the input, drawn as a dashed line.
#[derive(Debug, Clone, PartialEq)]
pub struct Floor {
    /// In the unit of the task's metric (a fraction stays a fraction).
    pub value: f64,
    /// What answers so, such as `most frequent class`.
    pub label: String,
}

/// A task as the report explains it.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskInfo {
    /// Its name in the trial keys.
    pub name: String,
    /// One or two sentences: what is asked, lengths, number of held-out examples.
    pub description: String,
    /// The constant-answer floor, where there is one.
    pub floor: Option<Floor>,
}

/// Everything the report shows.
#[derive(Debug, Clone)]
pub struct ReportData {
    /// Heading of the page.
    pub title: String,
    /// The command line that made it.
    pub command: String,
    /// Commit of the program.
    pub commit: String,
    /// The machine in words.
    pub machine: String,
    /// The seeds of the comparison.
    pub seeds: Vec<u64>,
    /// When it was made, in seconds since 1970.
    pub made: i64,
    /// The budget; targets may differ between tasks, the rows carry their own.
    pub budget: Budget,
    /// The tasks, in the order of the table's columns.
    pub tasks: Vec<TaskInfo>,
    /// The contenders, in the order of the table's rows.
    pub mixers: Vec<String>,
    /// Prompt length of the latency columns; absent: the largest that all have.
    pub latency_length: Option<u64>,
    /// The rows of the store.
    pub records: Vec<TrialRecord>,
}

impl ReportData {
    /// The table that the report shows; with `task`, only that task's trials.
    pub fn table(&self, task: Option<&str>) -> Table {
        let tasks = self.tasks.iter().map(|info| info.name.clone());
        let options = TableOptions {
            tasks: tasks
                .filter(|name| task.is_none_or(|task| task == name))
                .collect(),
            mixers: self.mixers.clone(),
            latency_length: self.latency_length,
        };
        Table::build(&self.records, &options)
    }

    /// Where a contender stands in the order of the report; gives it its colour, marker and anchor.
    fn mixer_index(&self, mixer: &str) -> Option<usize> {
        self.mixers.iter().position(|name| name == mixer)
    }

    fn task_index(&self, task: &str) -> Option<usize> {
        self.tasks.iter().position(|info| info.name == task)
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A plot could not be drawn.
    #[error("draw the plot {title:?}: {detail}")]
    Plot {
        /// Title of the plot.
        title: String,
        /// What the drawing library said.
        detail: String,
    },
    /// The file could not be written; an older one is untouched.
    #[error("write the report {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

/// The report as one HTML text.
pub fn render(data: &ReportData) -> Result<String, ReportError> {
    html::page(data)
}

/// Writes the report to `path`, whole or not at all.
pub fn write(path: &Path, data: &ReportData) -> Result<(), ReportError> {
    let text = render(data)?;
    atomic::write(path, |file| file.write_all(text.as_bytes())).map_err(|source| ReportError::Io {
        path: path.into(),
        source,
    })
}
