//! `anyformer export FOLDER --to DIR`.

use std::path::PathBuf;

use serde_json::json;

use crate::args::Global;
use crate::exit::{Failure, Kind};
use crate::say::Say;
use crate::session::open_model;
use crate::setup::start_threads;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken), a model folder, or a GGUF file
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// The folder to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
}

/// Writes the folder and says of which family it is.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let opened = open_model(&args.folder)?;
    start_threads(global, None)?;
    let family = anyformer_hub::export(&opened, &args.to).input()?;
    let value = json!({"model": opened.path, "to": args.to, "model_type": family.kind()});
    say.result(&value, || {
        format!(
            "{} written, model_type {}",
            args.to.display(),
            family.kind()
        )
    });
    Ok(())
}
