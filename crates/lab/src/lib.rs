//! Comparison under equal budgets: what a trial is, where its result is kept, and how results become tables and plots.
//!
//! The parts that need no model:
//! - [`match_budget`] solves one or two integer sizes so that a contender meets a budget.
//! - [`trial`] names a trial by the hash of its content and holds what was measured.
//! - [`store`] keeps one row per trial in one SQLite file, so that a killed comparison goes on where it was.
//! - [`lra`] is Long Range Arena on top of [`compare`].
//! - [`stats`], [`table`], [`report`], [`export`] turn the rows into numbers, a table, one HTML file, CSV and Parquet.

mod atomic;
pub mod canonical;
pub mod compare;
pub mod export;
mod float;
mod frame;
mod lock;
pub mod lra;
pub mod match_budget;
pub mod report;
pub mod stats;
pub mod store;
pub mod table;
pub mod trial;
pub mod units;
