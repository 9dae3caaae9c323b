//! Quantised weights: row by row as files hold them, and in the order in which products read them.

use std::borrow::Cow;

use half::f16;
use rayon::prelude::*;

use super::{LANES, portable};

/// Bits of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// -128..=127.
    Eight,
    /// -8..=7, or 0..=15 where there are zeros.
    Four,
    /// An f16, which is the weight itself ([`Packed::of_halves`]).
    Half,
    /// A bfloat16, which is the weight itself.
    Brain,
}

impl Bits {
    /// 16, 8 or 4.
    pub fn count(self) -> usize {
        match self {
            Bits::Eight => 8,
            Bits::Four => 4,
            Bits::Half | Bits::Brain => 16,
        }
    }

    /// Weights in 32 bits.
    pub(crate) fn per_word(self) -> usize {
        32 / self.count()
    }
}

/// Quantised weights `[rows, columns]`, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Quants {
    /// Outputs of the layer.
    pub rows: usize,
    /// Inputs of the layer.
    pub columns: usize,
    /// Of a weight.
    pub bits: Bits,
    /// Neighbours in a row that share a scale: a multiple of 8, or at least a whole row. The last group may be shorter.
    pub group: usize,
    /// `rows * columns` numbers within the range of the bits.
    pub values: Vec<i8>,
    /// `[rows, groups]`.
    pub scales: Vec<f16>,
    /// `[rows, groups]`: the weight where `q` is 0, for weights with zeros.
    pub zeros: Option<Vec<f16>>,
    /// `[columns]`: what each input is multiplied by before the product.
    pub inputs: Option<Vec<f32>>,
    /// Inputs are rounded to 8 bits as well. Of weights of 8 bits without zeros.
    pub brief_inputs: bool,
}

/// Quantised weights that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pack quantised weights: {0}")]
pub struct QuantError(pub(crate) String);

impl Quants {
    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.columns.div_ceil(self.group.max(1)).max(1)
    }

    /// Whether lengths, group and values fit together.
    fn check(&self) -> Result<(), QuantError> {
        let wrong = |text: String| Err(QuantError(text));
        let (rows, columns, group) = (self.rows, self.columns, self.group);
        if group == 0 || group < columns && !group.is_multiple_of(8) {
            return wrong(format!(
                "groups of {group} columns; expected a multiple of 8"
            ));
        }
        let groups = self.groups();
        let lengths = [
            ("values", self.values.len(), rows * columns),
            ("scales", self.scales.len(), rows * groups),
            (
                "zeros",
                self.zeros.as_ref().map_or(rows * groups, Vec::len),
                rows * groups,
            ),
            (
                "factors of inputs",
                self.inputs.as_ref().map_or(columns, Vec::len),
                columns,
            ),
        ];
        for (what, got, expected) in lengths {
            if got != expected {
                return wrong(format!("expected {expected} {what}, got {got}"));
            }
        }
        let zeros = self.zeros.as_deref().unwrap_or_default();
        let mut halves = self.scales.iter().chain(zeros);
        let inputs = self.inputs.as_deref().unwrap_or_default();
        if halves.any(|value| !value.is_finite()) || inputs.iter().any(|value| !value.is_finite()) {
            return wrong("a scale or zero is not a finite number".into());
        }
        let range = match (self.bits, self.zeros.is_some()) {
            (Bits::Eight, _) => -128..=127,
            (Bits::Four, true) => 0..=15,
            (Bits::Four, false) => -8..=7,
            (Bits::Half | Bits::Brain, _) => {
                return wrong("16 bits are no numbers of steps".into());
            }
        };
        if let Some(value) = self.values.iter().find(|value| !range.contains(*value)) {
            return wrong(format!("{value} is outside of {range:?}"));
        }
        if self.brief_inputs && (self.bits != Bits::Eight || self.zeros.is_some()) {
            return wrong("inputs of 8 bits need weights of 8 bits without zeros".into());
        }
        Ok(())
    }
}

/// 16 words that are loaded at once.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; LANES]);

/// Quantised weights in the order in which products read them: panels of 16 rows; in a panel, for every 4 (or 8) columns, a
/// word of 32 bits of each row.
#[derive(Clone, Debug)]
pub struct Packed {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) bits: Bits,
    pub(super) group: usize,
    /// `[panels, units]`.
    pub(super) lines: Vec<Line>,
    /// `[panels, groups, 16]`.
    scales: Vec<f16>,
    pub(super) zeros: Option<Vec<f16>>,
    inputs: Option<Vec<f32>>,
    pub(super) brief_inputs: bool,
}

/// What a product reads of one panel.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) lines: &'a [Line],
    /// `[groups, 16]`.
    pub(crate) scales: &'a [f16],
    pub(crate) zeros: Option<&'a [f16]>,
    /// Lines of a group.
    pub(crate) per_group: usize,
}

/// Rows of activations, padded to whole words.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) values: &'a [f32],
    /// From row to row.
    pub(crate) stride: usize,
    /// Sums of each group, `[rows, groups]`, where the weight has zeros.
    pub(crate) sums: &'a [f32],
}

impl Packed {
    /// Rows of a panel: a weight that is packed in parts has a multiple of so many in all but the last.
    pub const PANEL: usize = LANES;

    /// Room for so many rows more.
    pub fn reserve(&mut self, rows: usize) {
        let panels = rows.div_ceil(LANES);
        self.lines.reserve_exact(panels * self.units());
        let halves = panels * self.groups() * LANES;
        self.scales.reserve_exact(halves);
        if let Some(zeros) = &mut self.zeros {
            zeros.reserve_exact(halves);
        }
    }

    /// Puts the rows of another weight behind these.
    ///
    /// Panics when the two are not of one kind and width, or these do not fill their last panel.
    pub fn append(&mut self, more: Packed) {
        let kind = |one: &Packed| (one.columns, one.bits, one.group, one.brief_inputs);
        assert_eq!(kind(self), kind(&more), "parts of one weight");
        assert!(self.inputs == more.inputs, "parts of one weight");
        assert!(self.rows.is_multiple_of(LANES), "whole panels");
        self.rows += more.rows;
        self.lines.extend(more.lines);
        self.scales.extend(more.scales);
        match (&mut self.zeros, more.zeros) {
            (Some(zeros), Some(more)) => zeros.extend(more),
            (None, None) => {}
            _ => panic!("parts of one weight with and without zeros"),
        }
    }

    /// Packs; refuses lengths, groups and values that do not fit together.
    pub fn new(quants: &Quants) -> Result<Self, QuantError> {
        quants.check()?;
        let (rows, columns, groups) = (quants.rows, quants.columns, quants.groups());
        let per = quants.bits.per_word();
        let units = columns.div_ceil(per);
        let panels = rows.div_ceil(LANES);
        let mut lines = vec![Line([0; LANES]); panels * units];
        let (width, mask) = match quants.bits {
            Bits::Four => (4, 0xf),
            _ => (8, 0xff),
        };
        // Without zeros, 4 bits are held as 0..=15, 8 above what they stand for.
        let above: i8 = match (quants.bits, &quants.zeros) {
            (Bits::Four, None) => 8,
            _ => 0,
        };
        let fill = |(panel, lines): (usize, &mut [Line])| {
            for lane in 0..LANES.min(rows - panel * LANES) {
                let row = &quants.values[(panel * LANES + lane) * columns..][..columns];
                for (line, values) in lines.iter_mut().zip(row.chunks(per)) {
                    for (at, value) in values.iter().enumerate() {
                        let bits = u32::from((value + above).cast_unsigned()) & mask;
                        line.0[lane] |= bits << (width * at);
                    }
                }
            }
        };
        if units > 0 {
            lines.par_chunks_mut(units).enumerate().for_each(fill);
        }
        let beside = |values: &[f16]| {
            let mut beside = vec![f16::ZERO; panels * groups * LANES];
            for (row, values) in values.chunks_exact(groups).enumerate() {
                for (group, value) in values.iter().enumerate() {
                    beside[((row / LANES) * groups + group) * LANES + row % LANES] = *value;
                }
            }
            beside
        };
        Ok(Packed {
            rows,
            columns,
            bits: quants.bits,
            group: quants.group.min(columns.max(1)),
            lines,
            scales: beside(&quants.scales),
            zeros: quants.zeros.as_deref().map(beside),
            inputs: quants.inputs.clone(),
            brief_inputs: quants.brief_inputs,
        })
    }

    /// Packs weights `[rows, columns]` of 16 bits: `bits` says of which kind.
    ///
    /// Panics when it is another, or there are not as many.
    pub fn of_halves(bits: Bits, [rows, columns]: [usize; 2], weights: &[u16]) -> Self {
        assert_eq!(bits.count(), 16, "weights of 16 bits");
        assert_eq!(weights.len(), rows * columns, "weights of 16 bits");
        let units = columns.div_ceil(2);
        let panels = rows.div_ceil(LANES);
        let mut lines = vec![Line([0; LANES]); panels * units];
        for (row, weights) in weights.chunks(columns.max(1)).enumerate() {
            let lines = &mut lines[row / LANES * units..][..units];
            for (line, pair) in lines.iter_mut().zip(weights.chunks(2)) {
                let second = pair.get(1).copied().unwrap_or(0);
                line.0[row % LANES] = u32::from(pair[0]) | u32::from(second) << 16;
            }
        }
        Packed {
            rows,
            columns,
            bits,
            group: columns.max(1),
            lines,
            scales: vec![f16::ONE; panels * LANES],
            zeros: None,
            inputs: None,
            brief_inputs: false,
        }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Bits of a weight.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// Bytes in memory: what a product of few rows reads.
    pub fn bytes(&self) -> usize {
        let halves = self.scales.len() + self.zeros.as_ref().map_or(0, Vec::len);
        let inputs = self.inputs.as_ref().map_or(0, Vec::len);
        64 * self.lines.len() + 2 * halves + 4 * inputs
    }

    pub(super) fn groups(&self) -> usize {
        self.columns.div_ceil(self.group).max(1)
    }

    fn units(&self) -> usize {
        self.columns.div_ceil(self.bits.per_word())
    }

    pub(super) fn panel(&self, panel: usize) -> Panel<'_> {
        let (units, groups) = (self.units(), self.groups());
        let of = |halves| -> &[f16] {
            let halves: &Vec<f16> = halves;
            &halves[panel * groups * LANES..][..groups * LANES]
        };
        Panel {
            lines: &self.lines[panel * units..][..units],
            scales: of(&self.scales),
            zeros: self.zeros.as_ref().map(of),
            per_group: self.group.div_ceil(self.bits.per_word()),
        }
    }

    /// The same weights row by row, where they are of 8 or 4 bits.
    pub fn quants(&self) -> Option<Quants> {
        if self.bits.count() == 16 {
            return None;
        }
        let (per, groups) = (self.bits.per_word(), self.groups());
        let signed = self.zeros.is_none();
        let value = |row: usize, column: usize| {
            let word = self.lines[row / LANES * self.units() + column / per].0[row % LANES];
            let bits = word >> (self.bits.count() * (column % per));
            match (self.bits, signed) {
                (Bits::Four, true) => (bits & 15) as i8 - 8,
                (Bits::Four, false) => (bits & 15) as i8,
                _ => (bits as u8).cast_signed(),
            }
        };
        let by_row = |halves: &Vec<f16>| {
            let of = |row: usize| {
                (0..groups)
                    .map(move |group| halves[(row / LANES * groups + group) * LANES + row % LANES])
            };
            (0..self.rows).flat_map(of).collect()
        };
        Some(Quants {
            rows: self.rows,
            columns: self.columns,
            bits: self.bits,
            group: self.group,
            values: (0..self.rows)
                .flat_map(|row| (0..self.columns).map(move |column| (row, column)))
                .map(|(row, column)| value(row, column))
                .collect(),
            scales: by_row(&self.scales),
            zeros: self.zeros.as_ref().map(by_row),
            inputs: self.inputs.clone(),
            brief_inputs: self.brief_inputs,
        })
    }

    /// The weights of some rows as f32, one row after the other. Factors of inputs are within them, so that products with
    /// them are those of [`product`].
    pub fn widened(&self, rows: impl IntoIterator<Item = usize>) -> Vec<f32> {
        let mut values = Vec::new();
        for row in rows {
            let panel = self.panel(row / LANES);
            let from = values.len();
            values.resize(from + self.columns, 0.0);
            portable::widen_row(self.bits, panel, row % LANES, &mut values[from..]);
            if let Some(inputs) = &self.inputs {
                for (value, factor) in values[from..].iter_mut().zip(inputs) {
                    *value *= factor;
                }
            }
        }
        values
    }

    /// Rows of `x` as the kernels read them: multiplied by the factors of inputs, padded with zeros to whole words.
    pub(super) fn prepared<'a>(&self, x: &'a [f32]) -> (Cow<'a, [f32]>, usize) {
        let stride = self.units() * self.bits.per_word();
        if stride == self.columns && self.inputs.is_none() {
            return (Cow::Borrowed(x), stride);
        }
        let mut values = vec![0.0; x.len() / self.columns.max(1) * stride];
        let rows = values.chunks_exact_mut(stride.max(1));
        for (to, from) in rows.zip(x.chunks_exact(self.columns.max(1))) {
            to[..self.columns].copy_from_slice(from);
            if let Some(inputs) = &self.inputs {
                for (value, factor) in to.iter_mut().zip(inputs) {
                    *value *= factor;
                }
            }
        }
        (Cow::Owned(values), stride)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::round::{Scheme, nearest};
    use super::super::{Precision, product};
    use super::*;
    use crate::testing::rand_vec;

    #[test]
    fn a_weight_packed_in_parts_is_the_weight() {
        let (n, k) = (75, 70);
        let x = rand_vec(2, 3 * k);
        let mut pairs = Vec::new();
        for (bits, group, zeros) in [
            (Bits::Eight, 0, false),
            (Bits::Four, 8, false),
            (Bits::Four, 32, true),
        ] {
            let scheme = Scheme { bits, group, zeros };
            let quants = nearest(scheme, [n, k], &rand_vec(1, n * k)).expect("fits");
            let part = |rows: Range<usize>| {
                let groups = rows.start * quants.groups()..rows.end * quants.groups();
                let halves = |values: &[f16]| values[groups.clone()].to_vec();
                Packed::new(&Quants {
                    rows: rows.len(),
                    values: quants.values[rows.start * k..rows.end * k].to_vec(),
                    scales: halves(&quants.scales),
                    zeros: quants.zeros.as_deref().map(halves),
                    ..quants.clone()
                })
                .expect("fits")
            };
            let parts = [part(0..16), part(16..64), part(64..n)];
            pairs.push((Packed::new(&quants).expect("fits"), parts));
        }
        let weights: Vec<u16> = (0..n * k).map(|at| (at * 7 % 30_000) as u16).collect();
        let part = |rows: Range<usize>| {
            Packed::of_halves(
                Bits::Half,
                [rows.len(), k],
                &weights[rows.start * k..rows.end * k],
            )
        };
        pairs.push((part(0..n), [part(0..32), part(32..48), part(48..n)]));
        for (whole, [mut joined, second, third]) in pairs {
            joined.reserve(n);
            joined.append(second);
            joined.append(third);
            assert_eq!(joined.shape(), whole.shape());
            assert_eq!(joined.bytes(), whole.bytes());
            assert_eq!(joined.quants(), whole.quants());
            let product = |weight| product(Precision::F32, &x, weight, None);
            assert_eq!(product(&joined), product(&whole));
        }
    }
}
