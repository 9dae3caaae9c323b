//! Long Range Arena: six tasks, every mixer, one table; and a table of speed and memory against length.
//!
//! Tay et al. (2021), arXiv 2011.04006. A [`Definition`] is a preset in a dialect; it makes a plan for [`crate::compare`], so
//! budgets, seeds, the store and going on after a stop are those of every comparison. Tasks whose data is not at hand are
//! replaced by generated ones, which keep their own names in every table.

mod board;
mod define;
mod recipe;
pub mod speed;

use std::path::PathBuf;

use anyformer_ops::Device;
use anyformer_train::StopFlag;

pub use board::Board;
pub use define::{Column, Definition, Preset};

use crate::compare::{self, CompareError, Comparison, Event, Where};

/// What a run left.
#[derive(Debug)]
pub struct Arena {
    /// The comparison beneath, with its own report.
    pub comparison: Comparison,
    /// Accuracy of every model on every task, with averages.
    pub quality: Board,
    /// Speed and memory relative to the first model; absent if no length was asked for.
    pub speed: Option<Board>,
    /// `lra.md` and `lra.html`.
    pub files: [PathBuf; 2],
}

/// Runs a definition, or what is left of it, in `place.folder`.
pub fn run(
    definition: &Definition,
    lengths: &speed::Lengths,
    place: &Where,
    stop: &StopFlag,
    events: &mut dyn FnMut(&Event),
) -> Result<Arena, CompareError> {
    let plan = definition.plan()?;
    let mut left_out = Vec::new();
    let comparison = compare::run(&plan, place, stop, &mut |event| {
        left_out.extend(absence(event));
        events(event);
    })?;
    let quality = board::quality(definition, &plan, &comparison.records, &left_out)?;
    let points = match lengths.lengths.is_empty() {
        true => Vec::new(),
        false => speed::measure(
            &definition.model()?,
            &plan.mixers,
            lengths,
            place,
            stop,
            events,
        )?,
    };
    let speed = (!points.is_empty()).then(|| board::speed(&points));
    let files = board::write(definition, place, &quality, speed.as_ref(), &points)?;
    Ok(Arena {
        comparison,
        quality,
        speed,
        files,
    })
}

/// What every contender of a definition costs, without training anything.
pub fn prices(
    definition: &Definition,
    place: &Where,
    events: &mut dyn FnMut(&Event),
) -> Result<Board, CompareError> {
    let plan = definition.plan()?;
    let mut left_out = Vec::new();
    let prices = compare::prices(&plan, place, &mut |event| {
        left_out.extend(absence(event));
        events(event);
    })?;
    Ok(board::prices(&plan, &prices, &left_out))
}

/// The sentence about a contender that takes no part.
fn absence(event: &Event) -> Option<String> {
    match event {
        Event::LeftOut {
            task,
            mixer,
            reason,
        } => Some(format!("{task}: {mixer} is left out: {reason}.")),
        _ => None,
    }
}

/// The device that lengths are timed on: the CPU, with gradients.
pub(crate) fn timing_device() -> Device {
    Device::flex().autodiff()
}
