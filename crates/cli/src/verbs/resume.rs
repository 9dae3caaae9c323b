//! `anyformer resume RUN_DIR`.

use std::path::PathBuf;

use anyformer_train::{MAY_CHANGE, RunFolder};

use crate::args::Global;
use crate::exit::{Failure, bad_input};
use crate::overrides;
use crate::say::Say;
use crate::session::{Plan, train_failure};

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of the run
    #[arg(value_name = "RUN_DIR")]
    pub folder: PathBuf,
    /// Keys of the run that may change, as train.log_every=1 or run.threads=4
    #[arg(value_name = "KEY=VALUE")]
    pub changes: Vec<String>,
}

/// Goes on from the newest complete checkpoint, or from the start when there is none yet.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let (folder, mut options) = RunFolder::open(&args.folder).map_err(train_failure)?;
    let Some(root) = options.as_object_mut() else {
        return Err(bad_input(format!(
            "read the options of {}: not a table",
            args.folder.display()
        )));
    };
    for text in &args.changes {
        let change = overrides::parse(text)?;
        let allowed = match change.path.as_slice() {
            [table, key] if table == "train" => MAY_CHANGE.contains(&key.as_str()),
            [table, _] => table == "run",
            _ => false,
        };
        if !allowed {
            return Err(bad_input(format!(
                "resume with {text}: a run keeps its options; these may change: run.device, run.threads, train.{}. Start a new run to change others",
                MAY_CHANGE.join(", train.")
            )));
        }
        overrides::apply(root, &change)?;
    }
    let plan = Plan::from_options(&options, &args.folder.join("run.toml"), global)?;
    plan.prepare(global)?.train(folder, say)
}
