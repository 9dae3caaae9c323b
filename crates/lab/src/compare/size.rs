//! The size of a contender: the width and hidden size at which it costs what the budget says.

use anyformer_mixers::MixerSpec;
use anyformer_models::{Model, ModelConfig};
use serde_json::Value;

use super::CompareError;
use crate::match_budget::{Knob, solve, solve_pair};
use crate::trial::BudgetKind;

/// A contender's solved model.
#[derive(Clone, Debug)]
pub struct Sized {
    /// The model.
    pub config: ModelConfig,
    /// What it costs, in the unit of the budget.
    pub value: f64,
}

/// Widths tried are multiples of this, so that the default heads divide them.
const WIDTH_STEP: usize = 16;
/// Hidden sizes tried are multiples of this.
const HIDDEN_STEP: usize = 4;

/// The exact cost of `config` for sequences of `time` tokens; infinite when it cannot be built.
pub fn cost(config: &ModelConfig, kind: BudgetKind, time: usize) -> f64 {
    let Ok(model) = Model::shapes(config) else {
        return f64::INFINITY;
    };
    let cost = model.cost(time);
    match kind {
        BudgetKind::Params => cost.params as f64,
        BudgetKind::Flops => cost.flops as f64 / time.max(1) as f64,
        BudgetKind::State => cost.state_bytes as f64,
        BudgetKind::Time => f64::NAN,
    }
}

fn with(base: &ModelConfig, mixer: &MixerSpec, dim: usize, hidden: Option<usize>) -> ModelConfig {
    let mut config = ModelConfig {
        dim,
        mixers: vec![mixer.clone()],
        ..base.clone()
    };
    if let Some(hidden) = hidden {
        let options = &mut config.channel.options;
        options.insert("hidden".into(), Value::from(hidden));
    }
    config
}

/// Solves the size of one contender. The hidden size of the channel mixer is tried first at the base width, then both.
pub fn solve_size(
    base: &ModelConfig,
    mixer: &MixerSpec,
    kind: BudgetKind,
    target: f64,
    tolerance: f64,
    time: usize,
    measure: &mut dyn FnMut(&ModelConfig) -> Result<f64, CompareError>,
) -> Result<Sized, CompareError> {
    let fine = base.channel.name != "none" && kind != BudgetKind::State;
    let width = Knob {
        name: "dim",
        lo: (base.dim / 4).max(WIDTH_STEP),
        hi: 2 * base.dim,
        multiple: WIDTH_STEP,
    };
    let hidden = Knob {
        name: "hidden",
        lo: HIDDEN_STEP,
        hi: 8 * base.dim,
        multiple: HIDDEN_STEP,
    };
    let budget = |error| CompareError::Budget {
        mixer: super::plan::label(mixer),
        error,
    };
    if kind == BudgetKind::Time {
        return solve_time(base, mixer, target, tolerance, hidden, measure, budget);
    }
    let price =
        |dim: usize, hidden: Option<usize>| cost(&with(base, mixer, dim, hidden), kind, time);
    let found = match fine {
        false => {
            let solution =
                solve(&width, target, tolerance, |dim| price(dim, None)).map_err(budget)?;
            with(base, mixer, solution.size, None)
        }
        true => {
            let at_base = solve(&hidden, target, tolerance, |size| {
                price(base.dim, Some(size))
            });
            match at_base {
                Ok(solution) => with(base, mixer, base.dim, Some(solution.size)),
                Err(_) => {
                    let nominal = |dim: usize| (dim * 8 / 3).next_multiple_of(HIDDEN_STEP);
                    let pair = solve_pair(
                        &width,
                        nominal,
                        |_| hidden,
                        target,
                        tolerance,
                        |dim, size| price(dim, Some(size)),
                    )
                    .map_err(budget)?;
                    with(base, mixer, pair.coarse, Some(pair.fine))
                }
            }
        }
    };
    let value = cost(&found, kind, time);
    Ok(Sized {
        config: found,
        value,
    })
}

fn solve_time(
    base: &ModelConfig,
    mixer: &MixerSpec,
    target: f64,
    tolerance: f64,
    hidden: Knob,
    measure: &mut dyn FnMut(&ModelConfig) -> Result<f64, CompareError>,
    budget: impl Fn(crate::match_budget::BudgetError) -> CompareError,
) -> Result<Sized, CompareError> {
    let mut failed = None;
    let solution = crate::match_budget::solve_measured(&hidden, target, tolerance, |size| {
        measure(&with(base, mixer, base.dim, Some(size))).unwrap_or_else(|error| {
            failed = Some(error);
            f64::INFINITY
        })
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let solution = solution.map_err(budget)?;
    Ok(Sized {
        config: with(base, mixer, base.dim, Some(solution.size)),
        value: solution.cost,
    })
}
