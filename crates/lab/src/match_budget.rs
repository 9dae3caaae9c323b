//! Solving sizes: which width (and hidden size) makes a contender cost what the budget says.
//!
//! Costs are exact functions of the size (parameters, FLOPs, state bytes), so [`solve`] looks at every size and is right
//! for any cost, monotone or not. A cost that is a measurement (seconds) uses [`solve_measured`], which evaluates
//! about `2 log2(n)` sizes and assumes that a larger size costs more.

use std::collections::BTreeMap;

use crate::units::three_digits;

/// The sizes that one integer knob may take: multiples of `multiple` in `lo..=hi`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Knob {
    /// Name for messages, such as `width`.
    pub name: &'static str,
    /// Smallest allowed size.
    pub lo: usize,
    /// Largest allowed size.
    pub hi: usize,
    /// Every size is a multiple of this (at least 1).
    pub multiple: usize,
}

impl Knob {
    fn sizes(&self) -> (usize, usize, usize) {
        let step = self.multiple.max(1);
        (self.lo.div_ceil(step).max(1), self.hi / step, step)
    }

    fn describe(&self) -> String {
        format!(
            "{} in {}..={} in steps of {}",
            self.name,
            self.lo,
            self.hi,
            self.multiple.max(1)
        )
    }
}

/// A size that meets the budget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Solution {
    /// The size.
    pub size: usize,
    /// What it costs.
    pub cost: f64,
    /// `cost / target - 1`.
    pub mismatch: f64,
}

/// Two sizes that meet the budget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairSolution {
    /// The coarse size, such as the width.
    pub coarse: usize,
    /// The fine size, such as the hidden size of the channel mixer.
    pub fine: usize,
    /// What they cost.
    pub cost: f64,
    /// `cost / target - 1`.
    pub mismatch: f64,
}

/// Why no size meets the budget.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BudgetError {
    /// The target or the tolerance makes no sense.
    #[error(
        "match a budget of {target} within {tolerance}: expected a finite target above 0 and a tolerance of at least 0"
    )]
    BadTarget {
        /// The target as given.
        target: f64,
        /// The tolerance as given.
        tolerance: f64,
    },
    /// The range of sizes holds no multiple, or no size has a finite cost.
    #[error("match the budget: no usable {knobs}; widen the range or lower the multiple")]
    NoSize {
        /// The knobs and their ranges.
        knobs: String,
    },
    /// The closest size is out of tolerance.
    #[error(
        "match the budget of {}: {knobs} comes closest at {best_at} with {} ({:+.2} % off, tolerance {:.2} %); {hint}",
        show(*.target), show(*.best), .mismatch * 100.0, .tolerance * 100.0
    )]
    OutOfTolerance {
        /// The target.
        target: f64,
        /// The tolerance.
        tolerance: f64,
        /// The knobs and their ranges.
        knobs: String,
        /// The closest size, such as `width=128`.
        best_at: String,
        /// Its cost.
        best: f64,
        /// `best / target - 1`.
        mismatch: f64,
        /// What would help.
        hint: String,
    },
}

fn show(value: f64) -> String {
    if value.fract() == 0.0 && (0.0..1e15).contains(&value) {
        crate::units::grouped(value as u64)
    } else {
        three_digits(value)
    }
}

fn check(target: f64, tolerance: f64) -> Result<(), BudgetError> {
    if target.is_finite() && target > 0.0 && tolerance.is_finite() && tolerance >= 0.0 {
        return Ok(());
    }
    Err(BudgetError::BadTarget { target, tolerance })
}

/// The closest of `candidates` to `target`; of equally close ones the smallest size.
fn closest(candidates: impl IntoIterator<Item = (usize, f64)>, target: f64) -> Option<Solution> {
    let mut best: Option<Solution> = None;
    for (size, cost) in candidates.into_iter().filter(|(_, cost)| cost.is_finite()) {
        let mismatch = cost / target - 1.0;
        if best.is_none_or(|found| mismatch.abs() < found.mismatch.abs()) {
            best = Some(Solution {
                size,
                cost,
                mismatch,
            });
        }
    }
    best
}

fn accept(
    knob: &Knob,
    found: Option<Solution>,
    target: f64,
    tolerance: f64,
) -> Result<Solution, BudgetError> {
    let found = found.ok_or_else(|| BudgetError::NoSize {
        knobs: knob.describe(),
    })?;
    if found.mismatch.abs() <= tolerance {
        return Ok(found);
    }
    let (first, last, step) = knob.sizes();
    let hint = if found.mismatch < 0.0 && found.size == last * step {
        format!(
            "raise the largest {} above {}, or lower the budget",
            knob.name, knob.hi
        )
    } else if found.mismatch > 0.0 && found.size == first * step {
        format!(
            "lower the smallest {} below {}, or raise the budget",
            knob.name, found.size
        )
    } else if step > 1 {
        format!(
            "use a multiple below {step}, a second knob, or a tolerance of {}",
            needed(found.mismatch)
        )
    } else {
        format!(
            "use a second knob or a tolerance of {}",
            needed(found.mismatch)
        )
    };
    Err(BudgetError::OutOfTolerance {
        target,
        tolerance,
        knobs: knob.describe(),
        best_at: format!("{}={}", knob.name, found.size),
        best: found.cost,
        mismatch: found.mismatch,
        hint,
    })
}

fn needed(mismatch: f64) -> String {
    format!("{:.1} %", (mismatch.abs() * 1000.0).ceil() / 10.0)
}

/// The size of `knob` whose `cost` is closest to `target`, by looking at all of them; any cost, monotone or not.
/// A size whose cost is not finite is left out. Fails if the closest is further than `tolerance` (0.02 is 2 %).
pub fn solve(
    knob: &Knob,
    target: f64,
    tolerance: f64,
    cost: impl Fn(usize) -> f64,
) -> Result<Solution, BudgetError> {
    check(target, tolerance)?;
    let (first, last, step) = knob.sizes();
    let all = (first..=last).map(|unit| (unit * step, cost(unit * step)));
    accept(knob, closest(all, target), target, tolerance)
}

/// As [`solve`], for a cost that is a measurement: bisection, about `2 log2(n)` evaluations, each size measured once.
/// If the cost is not monotone the result is still what was measured, but a closer size may exist.
pub fn solve_measured(
    knob: &Knob,
    target: f64,
    tolerance: f64,
    mut cost: impl FnMut(usize) -> f64,
) -> Result<Solution, BudgetError> {
    check(target, tolerance)?;
    let (first, last, step) = knob.sizes();
    let mut measured: BTreeMap<usize, f64> = BTreeMap::new();
    if first <= last {
        let mut at = |unit: usize| *measured.entry(unit).or_insert_with(|| cost(unit * step));
        let (mut low, mut high) = (first, last);
        if at(low) < target && at(high) > target {
            while high - low > 1 {
                let middle = low + (high - low) / 2;
                if at(middle) < target {
                    low = middle
                } else {
                    high = middle
                }
            }
        } else {
            at(high);
        }
    }
    let all = measured
        .into_iter()
        .map(|(unit, value)| (unit * step, value));
    accept(knob, closest(all, target), target, tolerance)
}

/// Two knobs: a coarse one (width, a multiple of `heads * 8`) whose fine partner (hidden size of the channel mixer) has
/// a nominal value `nominal(width)`, such as four times the width.
///
/// Widths are tried in the order of how close they come with the nominal partner, so that the proportions stay as near to
/// the nominal ones as the tolerance allows; the first width with a partner within tolerance wins. `fine(width)` gives
/// the range of the partner.
pub fn solve_pair(
    coarse: &Knob,
    nominal: impl Fn(usize) -> usize,
    fine: impl Fn(usize) -> Knob,
    target: f64,
    tolerance: f64,
    cost: impl Fn(usize, usize) -> f64,
) -> Result<PairSolution, BudgetError> {
    check(target, tolerance)?;
    let (first, last, step) = coarse.sizes();
    let mut order: Vec<(f64, usize)> = (first..=last)
        .map(|unit| unit * step)
        .map(|width| ((cost(width, nominal(width)) / target - 1.0).abs(), width))
        .filter(|(distance, _)| distance.is_finite())
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut best: Option<PairSolution> = None;
    let mut knobs = coarse.describe();
    let mut partner = "hidden size";
    for (_, width) in order {
        let knob = fine(width);
        partner = knob.name;
        let (low, high, unit) = knob.sizes();
        let all = (low..=high).map(|n| (n * unit, cost(width, n * unit)));
        let Some(found) = closest(all, target) else {
            continue;
        };
        let pair = PairSolution {
            coarse: width,
            fine: found.size,
            cost: found.cost,
            mismatch: found.mismatch,
        };
        if pair.mismatch.abs() <= tolerance {
            return Ok(pair);
        }
        if best.is_none_or(|best| pair.mismatch.abs() < best.mismatch.abs()) {
            best = Some(pair);
            knobs = format!("{} and {}", coarse.describe(), knob.describe());
        }
    }
    let best = best.ok_or(BudgetError::NoSize {
        knobs: knobs.clone(),
    })?;
    let hint = match (best.mismatch < 0.0, best.coarse) {
        (true, width) if width == last * step => {
            format!("raise the largest {} above {}", coarse.name, coarse.hi)
        }
        (false, width) if width == first * step => {
            format!("lower the smallest {} below {width}", coarse.name)
        }
        _ => format!(
            "widen the range of the {partner}, or use a tolerance of {}",
            needed(best.mismatch)
        ),
    };
    Err(BudgetError::OutOfTolerance {
        target,
        tolerance,
        knobs,
        best_at: format!("{}={}, {partner}={}", coarse.name, best.coarse, best.fine),
        best: best.cost,
        mismatch: best.mismatch,
        hint,
    })
}
