//! `anyformer train`.

use std::path::PathBuf;

use anyformer_train::RunFolder;

use crate::args::Global;
use crate::exit::Failure;
use crate::run_file;
use crate::say::Say;
use crate::session::{Plan, train_failure};

/// Flags.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  anyformer train recipes/text_gla.toml --out runs/text
  anyformer train recipes/text_gla.toml train.lr=3e-4 model.mixers.0.heads=8 --out runs/other
  anyformer train task.name=mqar model.mixers=delta_net train.steps=500 --out runs/mqar")]
pub struct Args {
    /// A run file (TOML with the tables task, model, train, run), then keys that differ from it
    #[arg(value_name = "CONFIG.toml | KEY=VALUE")]
    pub words: Vec<String>,
    /// The run folder to make; it must not exist or be empty
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,
}

/// Checks everything, makes the folder, trains.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let (file, changes) = run_file::split(&args.words);
    let plan = Plan::from_tables(run_file::read(file, changes)?, global)?;
    let ready = plan.prepare(global)?;
    let folder = RunFolder::create(&args.out, &ready.options()).map_err(train_failure)?;
    ready.train(folder, say)
}
