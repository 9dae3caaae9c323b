//! Tests of the comparison's parts that need no model, in one binary; the kill test runs this binary again as its child.

mod browser;
mod export;
mod fixture;
mod kill;
mod match_budget;
mod report;
mod store;
mod table;
