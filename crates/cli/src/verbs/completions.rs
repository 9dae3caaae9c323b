//! `anyformer completions SHELL`.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::exit::Failure;
use crate::say::Say;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell; write the output to where it looks for completions
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Prints the script.
pub fn run(args: &Args, say: &Say) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "anyformer", &mut script);
    say.raw(&script);
    Ok(())
}
