//! The command line of Anyformer, thin: verbs parse what was typed, call a library, and print.
//!
//! - [`args`] is the one list of verbs and flags; help, completions, the man page and [`reference`] derive from it.
//! - `verbs/` holds one file per verb.
//! - [`run_file`] reads a run from TOML and dotted overrides.
//! - [`exit`] is the one place that chooses exit codes; [`say`] the one place that writes.

pub mod args;
pub mod continuation;
pub mod exit;
mod format;
pub mod overrides;
pub mod products;
mod progress;
mod reference;
pub mod run_file;
pub mod say;
mod scoring;
mod session;
pub mod setup;
pub mod verbs;

use std::process::ExitCode;

use clap::Parser;

pub use reference::reference;

/// Parses the command line, runs the verb, reports, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    let say = say::Say::new(cli.global.json, cli.global.quiet);
    let result = verbs::run(&cli, &say).and_then(|()| say.finish());
    exit::report(result, &say)
}
