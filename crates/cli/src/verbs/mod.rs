//! One file per verb: its flags and what it does.

pub mod bench;
pub mod bench_serve;
pub mod chat;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod data;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod info;
mod info_model;
pub mod list;
pub mod lra;
pub mod man;
pub mod resume;
pub mod serve;
pub mod train;

use crate::args::{Cli, Verb};
use crate::exit::Failure;
use crate::say::Say;

/// Runs the verb that was typed.
pub fn run(cli: &Cli, say: &Say) -> Result<(), Failure> {
    let global = &cli.global;
    match &cli.verb {
        Verb::List(args) => list::run(args, say),
        Verb::Info(args) => info::run(args, say),
        Verb::Train(args) => train::run(args, global, say),
        Verb::Resume(args) => resume::run(args, global, say),
        Verb::Eval(args) => eval::run(args, global, say),
        Verb::Generate(args) => generate::run(args, global, say),
        Verb::Chat(args) => chat::run(args, global, say),
        Verb::Convert(args) => convert::run(args, global, say),
        Verb::Export(args) => export::run(args, global, say),
        Verb::Serve(args) => serve::run(args, global, say),
        Verb::Compare(args) => compare::run(args, global, say),
        Verb::Lra(args) => lra::run(args, global, say),
        Verb::Bench(args) => bench::run(args, global, say),
        Verb::Doctor(args) => doctor::run(args, global, say),
        Verb::Data(args) => data::run(args, say),
        Verb::Completions(args) => completions::run(args, say),
        Verb::Man(args) => man::run(args, say),
    }
}
