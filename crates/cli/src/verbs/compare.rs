//! `anyformer compare`.

use std::path::PathBuf;

use crate::args::Global;
use crate::exit::{Failure, bad_input};
use crate::say::Say;

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

pub fn run(_args: &Args, _global: &Global, _say: &Say) -> Result<(), Failure> { todo!() }
