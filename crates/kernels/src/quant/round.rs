//! Rounding weights to the nearest quantised ones, group by group.
//!
//! Without zeros `scale = max |w| / (2^(b-1) - 1)`; with zeros the range `min(w, 0)..max(w, 0)` is cut into `2^b - 1` steps and
//! `zero` is its beginning. Scales and zeros are rounded to f16 first, weights with what those have become.

use half::f16;
use rayon::prelude::*;

use super::{Bits, QuantError, Quants};

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Of a weight.
    pub bits: Bits,
    /// Neighbours in a row that share a scale; the whole row where it is 0 or more than that.
    pub group: usize,
    /// With a zero for each group.
    pub zeros: bool,
}

impl Scheme {
    /// The size of a group of rows of `columns`.
    pub fn group_of(self, columns: usize) -> usize {
        match self.group {
            0 => columns.max(1),
            group => group.min(columns.max(1)),
        }
    }

    /// The lowest and the highest number.
    pub(crate) fn range(self) -> (f32, f32) {
        match (self.bits, self.zeros) {
            (Bits::Four, false) => (-8.0, 7.0),
            (Bits::Four, true) => (0.0, 15.0),
            _ => (-128.0, 127.0),
        }
    }
}

/// The scale and zero of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steps {
    pub(crate) scale: f16,
    pub(crate) zero: f16,
    range: (f32, f32),
}

impl Steps {
    /// Of these weights, whose ends are multiplied by `shrink` first.
    pub(crate) fn of(scheme: Scheme, weights: &[f32], shrink: f32) -> Self {
        let low = shrink * weights.iter().fold(0.0f32, |low, w| low.min(*w));
        let high = shrink * weights.iter().fold(0.0f32, |high, w| high.max(*w));
        let (first, last) = scheme.range();
        let (scale, zero) = match scheme.zeros {
            false => (high.max(-low) / last, 0.0),
            true => {
                let scale = (high - low) / (last - first);
                (scale, low - first * scale)
            }
        };
        Steps {
            scale: f16::from_f32(scale),
            zero: f16::from_f32(zero),
            range: (first, last),
        }
    }

    /// The nearest number, and what it stands for.
    pub(crate) fn round(self, weight: f32) -> (i8, f32) {
        let (scale, zero) = (self.scale.to_f32(), self.zero.to_f32());
        let steps = if scale > 0.0 {
            (weight - zero) / scale
        } else {
            0.0
        };
        let number = steps.round_ties_even().clamp(self.range.0, self.range.1);
        (number as i8, number.mul_add(scale, zero))
    }
}

/// The nearest quantised weights to `weights [rows, columns]`. Refuses values that no f16 scale reaches.
pub fn nearest(
    scheme: Scheme,
    [rows, columns]: [usize; 2],
    weights: &[f32],
) -> Result<Quants, QuantError> {
    shrunk(scheme, [rows, columns], weights, &|_, _| 1.0)
}

/// As [`nearest`]; the ends of a group `(row, group)` are multiplied by `shrink` first and weights beyond them cut off.
pub(crate) fn shrunk(
    scheme: Scheme,
    [rows, columns]: [usize; 2],
    weights: &[f32],
    shrink: &(dyn Fn(usize, usize) -> f32 + Sync),
) -> Result<Quants, QuantError> {
    assert_eq!(weights.len(), rows * columns, "weights to be rounded");
    let group = scheme.group_of(columns);
    let groups = columns.div_ceil(group).max(1);
    let mut quants = empty(scheme, [rows, columns]);
    let mut steps = vec![Steps::of(scheme, &[], 1.0); rows * groups];
    let values = quants.values.par_chunks_mut(columns.max(1));
    let rows = values.zip(steps.par_chunks_mut(groups)).enumerate();
    rows.for_each(|(row, (values, steps))| {
        let weights = &weights[row * columns..][..columns];
        let parts = values.chunks_mut(group).zip(weights.chunks(group));
        for (at, ((values, weights), steps)) in parts.zip(steps).enumerate() {
            *steps = Steps::of(scheme, weights, shrink(row, at));
            for (value, weight) in values.iter_mut().zip(weights) {
                *value = steps.round(*weight).0;
            }
        }
    });
    fill_steps(&mut quants, &steps)?;
    Ok(quants)
}

/// Quantised weights without scales yet.
pub(crate) fn empty(scheme: Scheme, [rows, columns]: [usize; 2]) -> Quants {
    Quants {
        rows,
        columns,
        bits: scheme.bits,
        group: scheme.group_of(columns),
        values: vec![0; rows * columns],
        scales: Vec::new(),
        zeros: scheme.zeros.then(Vec::new),
        inputs: None,
        brief_inputs: false,
    }
}

/// Gives the scales and zeros of every group, row by row.
pub(crate) fn fill_steps(quants: &mut Quants, steps: &[Steps]) -> Result<(), QuantError> {
    let finite = |steps: &Steps| steps.scale.is_finite() && steps.zero.is_finite();
    if let Some(at) = steps.iter().position(|steps| !finite(steps)) {
        let row = at / quants.groups();
        let text =
            format!("the weights of row {row} are not finite or too large for a scale in f16");
        return Err(QuantError(text));
    }
    quants.scales = steps.iter().map(|steps| steps.scale).collect();
    if let Some(zeros) = &mut quants.zeros {
        *zeros = steps.iter().map(|steps| steps.zero).collect();
    }
    Ok(())
}
