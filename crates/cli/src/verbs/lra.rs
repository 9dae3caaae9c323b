//! `anyformer lra`.

use std::path::PathBuf;

use anyformer_data::Dialect;
use anyformer_lab::compare::Event;
use anyformer_lab::lra::{self, Board, Definition, Preset, speed::Lengths};
use anyformer_train::StopFlag;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::compare::{Show, failure, finished, place, split};
use crate::args::Global;
use crate::exit::Failure;
use crate::format::table;
use crate::say::Say;
use crate::setup::stop_on_signal;
use crate::verbs::doctor;

/// How much of the benchmark.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PresetName {
    /// Every model on every task for two updates, within ten minutes on two cores: shows that all run
    Smoke,
    /// Small sizes that train to something within a night on two cores
    Small,
    /// The published sizes and recipes
    Paper,
}

/// Whose form of the benchmark.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DialectName {
    /// The released code of Tay et al.
    Official,
    /// The port in the Nystromformer repository
    Nystrom,
    /// The port in the S4 repository
    S4,
}

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How much of it
    #[arg(long, value_name = "NAME", value_enum, default_value = "smoke")]
    pub preset: PresetName,
    /// Tasks, by commas: listops, text, retrieval, image, pathfinder, pathx [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub tasks: Vec<String>,
    /// Contenders, by commas, as gla,attention(heads=8); the first sets the budget [default: every token mixer]
    #[arg(long, value_name = "NAMES")]
    pub models: Option<String>,
    /// Whose form of the benchmark: data, models and training
    #[arg(long, value_name = "NAME", value_enum, default_value = "official")]
    pub dialect: DialectName,
    /// Seeds of each contender: 0 to N-1
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    pub seeds: u16,
    /// Training steps of each trial [default: the preset's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// A folder with imdb, aan, cifar10, listops; tasks that are not in it are generated, under names of their own
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Lengths of the speed table, by commas; 0 leaves it out [default: smoke 256,512,1024, else 1024 to 16384]
    #[arg(long, value_delimiter = ',', value_name = "TOKENS")]
    pub lengths: Option<Vec<usize>>,
    /// Most seconds of a step in the speed table
    #[arg(long, value_name = "S", default_value = "30")]
    pub step_limit: f64,
    /// Print the parameters and operations of every contender and train nothing
    #[arg(long)]
    pub plan: bool,
    /// The folder of the results; one that holds the same run goes on where it was
    #[arg(long, short, value_name = "DIR", default_value = "lra")]
    pub out: PathBuf,
}

/// Runs what is not done yet, prints both tables.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let definition = definition(args)?;
    let plan = definition.plan().map_err(failure)?;
    plan.check().map_err(failure)?;
    let place = place(&args.out, global)?;
    if args.plan {
        let board = lra::prices(&definition, &place, &mut |_: &Event| {}).map_err(failure)?;
        say.result(&json(&board), || text(&board));
        return Ok(());
    }
    let stop = StopFlag::default();
    let asked = stop.clone();
    stop_on_signal(move || asked.request())?;
    say.note(format!(
        "up to {} trials in {}",
        plan.trials(),
        args.out.display()
    ));
    let mut show = Show::new(say, plan.trials());
    let outcome = lra::run(&definition, &lengths(args), &place, &stop, &mut |event| {
        show.event(event);
    });
    drop(show);
    let arena = finished(outcome, &place)?;
    let value = json!({
        "quality": json(&arena.quality),
        "speed": arena.speed.as_ref().map(json),
        "files": arena.files, "report": arena.comparison.report, "trials": arena.comparison.records,
    });
    say.result(&value, || {
        let speed = arena.speed.as_ref().map_or(String::new(), text);
        let files = arena
            .files
            .each_ref()
            .map(|path| path.display().to_string());
        format!("{}\n{speed}\n{}", text(&arena.quality), files.join(", "))
    });
    Ok(())
}

fn definition(args: &Args) -> Result<Definition, Failure> {
    let models = args.models.as_deref().map(split).unwrap_or_default();
    Ok(Definition {
        preset: match args.preset {
            PresetName::Smoke => Preset::Smoke,
            PresetName::Small => Preset::Small,
            PresetName::Paper => Preset::Paper,
        },
        dialect: match args.dialect {
            DialectName::Official => Dialect::Official,
            DialectName::Nystrom => Dialect::Nystrom,
            DialectName::S4 => Dialect::S4,
        },
        columns: Definition::columns(&args.tasks).map_err(failure)?,
        models: models.iter().map(ToString::to_string).collect(),
        seeds: u64::from(args.seeds),
        data: args.data.clone(),
        steps: args.steps,
    })
}

fn lengths(args: &Args) -> Lengths {
    let mut lengths = match (&args.lengths, args.preset) {
        (Some(lengths), _) => lengths.clone(),
        (None, PresetName::Smoke) => vec![256, 512, 1024],
        (None, _) => vec![1024, 2048, 4096, 8192, 16_384],
    };
    lengths.retain(|length| *length > 0);
    lengths.sort_unstable();
    lengths.dedup();
    Lengths {
        lengths,
        // Half of what is there, so that nothing else has to give way.
        memory: doctor::memory()[0].map_or(4 << 30, |total| total / 2),
        seconds: args.step_limit,
    }
}

fn json(board: &Board) -> Value {
    json!({"headings": board.headings, "rows": board.rows, "notes": board.notes})
}

fn text(board: &Board) -> String {
    let headings: Vec<&str> = board.headings.iter().map(String::as_str).collect();
    let right: Vec<usize> = (1..headings.len()).collect();
    let notes: String = board
        .notes
        .iter()
        .map(|note| format!("  {note}\n"))
        .collect();
    format!("{}{notes}", table(&headings, &right, &board.rows))
}
