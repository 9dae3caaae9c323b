//! `anyformer man`.

use anyhow::Context;
use clap::CommandFactory;

use crate::args::Cli;
use crate::exit::{Failure, Kind};
use crate::say::Say;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The verb to describe; without one, the page of the whole command
    pub verb: Option<String>,
}

/// Prints the page in roff: `anyformer man | man -l -`.
pub fn run(args: &Args, say: &Say) -> Result<(), Failure> {
    let mut command = Cli::command();
    command.build();
    let shown = match &args.verb {
        None => command,
        Some(name) => crate::reference::find(&command, name)?.clone(),
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(shown)
        .render(&mut page)
        .context("write the manual page")
        .broken()?;
    say.raw(&page);
    Ok(())
}
