//! `anyformer convert prune FOLDER --to DIR`.

use std::path::PathBuf;

use anyformer_hub::prune::{Prune, prune};
use anyformer_hub::{Extra, save};
use anyformer_lab::units::grouped;
use anyformer_ops::Device;
use serde_json::json;

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::say::Say;
use crate::session::open_model;
use crate::setup::start_threads;

/// Flags.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("what").required(true),
    after_help = "\
Examples:
  anyformer convert prune runs/text --part 0.5 --to half
  anyformer convert prune runs/text --pattern 2:4 --to sparse
  anyformer convert prune runs/text --layers 0,2 --to short"
)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken) or a model folder
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// The folder to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Set this part of the layers' weights to zero, the smallest
    #[arg(long, value_name = "P", group = "what")]
    pub part: Option<f64>,
    /// Keep N of every M neighbouring weights, set the others to zero
    #[arg(long, value_name = "N:M", group = "what", value_parser = ratio)]
    pub pattern: Option<(usize, usize)>,
    /// Keep this many attention heads of every layer
    #[arg(long, value_name = "N", group = "what")]
    pub heads: Option<usize>,
    /// Keep this many inner units of every channel mixer
    #[arg(long, value_name = "N", group = "what")]
    pub units: Option<usize>,
    /// Keep these layers, counted from 0
    #[arg(long, value_name = "I,J,...", group = "what", value_delimiter = ',')]
    pub layers: Option<Vec<usize>>,
}

fn ratio(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once(':');
    let read = parts.and_then(|(keep, of)| Some((keep.parse().ok()?, of.parse().ok()?)));
    read.ok_or_else(|| format!("expected N:M as 2:4, got {text}"))
}

/// Writes the smaller model and says what went.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let how = match args {
        Args {
            part: Some(part), ..
        } => Prune::Smallest { part: *part },
        Args {
            pattern: Some((keep, of)),
            ..
        } => Prune::Pattern {
            keep: *keep,
            of: *of,
        },
        Args {
            heads: Some(keep), ..
        } => Prune::Heads(*keep),
        Args {
            units: Some(keep), ..
        } => Prune::Units(*keep),
        Args {
            layers: Some(keep), ..
        } => Prune::Layers(keep.clone()),
        _ => {
            return Err(bad_input(
                "prune: say what, one of --part, --pattern, --heads, --units, --layers",
            ));
        }
    };
    let opened = open_model(&args.folder)?;
    start_threads(global, None)?;
    let model = opened.load(&Device::flex()).input()?;
    let shown = args.folder.display();
    let (after, report) =
        prune(&model, &how).map_err(|message| bad_input(format!("prune {shown}: {message}")))?;
    save(&args.to, &after, &Extra::of(&opened).input()?).input()?;
    let value = json!({
        "model": opened.path, "to": args.to, "parameters_before": report.before, "parameters": report.after,
        "zeros": report.zeros, "weights": report.weights,
    });
    say.result(&value, || {
        format!(
            "{} written: {} parameters of {}, {:.2} % of the layers' weights are zero",
            args.to.display(),
            grouped(report.after as u64),
            grouped(report.before as u64),
            100.0 * report.zeros as f64 / report.weights.max(1) as f64
        )
    });
    Ok(())
}
