//! `anyformer data list` and `anyformer data get NAME`.

use std::path::PathBuf;

use anyformer_lab::units::bytes;
use serde_json::json;

use crate::exit::Failure;
use crate::format::table;
use crate::progress::spinner;
use crate::say::Say;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs of `data`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the data sets: those that ship with the program and those that can be fetched
    List,
    /// Fetch a data set, check it, and lay it where tasks find it; goes on where a fetch was cut off
    Get {
        /// The name in `anyformer data list`
        name: String,
        /// A file or folder on this machine, or an address, instead of the canonical address; checked all the same
        #[arg(long, value_name = "PATH | URL")]
        from: Option<String>,
        /// The folder to lay it in
        #[arg(long, value_name = "DIR", default_value = "data")]
        dest: PathBuf,
    },
}

/// Lists or fetches.
pub fn run(_args: &Args, _say: &Say) -> Result<(), Failure> { todo!() }
