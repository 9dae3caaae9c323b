//! `anyformer convert`: one model folder made into another.

pub mod prune;
pub mod quantize;

use crate::args::Global;
use crate::exit::Failure;
use crate::say::Say;

/// What is done to the model.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How.
    #[command(subcommand)]
    pub how: How,
}

/// The ways.
#[derive(Debug, clap::Subcommand)]
pub enum How {
    /// Take weights out: the smallest, a pattern, heads, units or layers
    Prune(prune::Args),
    /// Write a model with weights of 8 or 4 bits, and say what that costs and gains
    Quantize(quantize::Args),
}

/// Does it.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    match &args.how {
        How::Prune(args) => prune::run(args, global, say),
        How::Quantize(args) => quantize::run(args, global, say),
    }
}
