//! The one list of verbs and flags. Help, completions, the man page and the reference derive from it.

use clap::{Args, Parser, Subcommand};

use crate::verbs::{
    bench, chat, compare, completions, convert, data, doctor, eval, export, generate, info, list,
    lra, man, resume, serve, train,
};

/// Efficient transformers: train, compare under equal budgets, and run them.
#[derive(Debug, Parser)]
#[command(
    name = "anyformer",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (Ctrl-C; training can be resumed)."
)]
pub struct Cli {
    /// Flags of every verb.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Flags of every verb.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Print results as JSON on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Print results and errors only: no progress, no notes
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Number of worker threads [default: all cores; the results of a run are the same bits for the same number]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Where to compute; `gpu` needs a binary built with `--features gpu` [default: cpu]
    #[arg(long, global = true, value_name = "DEVICE", value_parser = ["cpu", "gpu"])]
    pub device: Option<String>,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the mixers, tasks and published sizes
    List(list::Args),
    /// Show what is true of a mixer (equation, knobs) or of a model folder: exact parameters, operations, state
    Info(info::Args),
    /// Train a model on a task
    Train(train::Args),
    /// Go on with a run that was stopped or killed
    Resume(resume::Args),
    /// Evaluate a trained model
    Eval(eval::Args),
    /// Continue a text with a trained language model
    Generate(generate::Args),
    /// Talk with a language model that has a chat template
    Chat(chat::Args),
    /// Make another model of a model: weights of 8 or 4 bits, weights taken out
    Convert(convert::Args),
    /// Write a model as a folder that transformers or flash-linear-attention loads
    Export(export::Args),
    /// Serve a model over HTTP, for the clients that people have
    Serve(serve::Args),
    /// Compare mixers under an equal budget; writes a table and report.html
    Compare(compare::Args),
    /// Run Long Range Arena: six tasks, every mixer, one table; speed and memory against length
    Lra(lra::Args),
    /// Measure the speed of mixers against length
    Bench(bench::Args),
    /// Show what this machine and this binary have
    Doctor(doctor::Args),
    /// List or fetch data sets
    Data(data::Args),
    /// Print completions for a shell
    Completions(completions::Args),
    /// Print the manual page (roff)
    Man(man::Args),
}
