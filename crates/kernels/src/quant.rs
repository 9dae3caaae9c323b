//! Products with quantised weights: rows of f32 times a matrix `[out, in]` of 8 or 4 bits per weight.
//!
//! A weight is `scale q`, or `scale q + zero`, with one scale (and zero) for `group` neighbours of a row, both f16. Of 8
//! bits `q` is in -128..=127; of 4 bits it is -8..=7 without zeros and 0..=15 with them. [`Quants`] holds them row by row, as
//! files do; [`Packed`] in the order in which products read them.
//!
//! Weights of 16 bits (f16, bfloat16) may be packed, too: they are read as they are and take half the memory of f32.
//!
//! Three ways to multiply, see [`product`]:
//! - few rows (decoding): every quantised byte is read once and widened in registers; activations stay f32, so that the
//!   result is that of the widened weights;
//! - many rows (a prompt): blocks of the weight are widened to f32 and multiplied as [`crate::matmul`] does;
//! - 8 bits on both sides (w8a8; Xiao et al., SmoothQuant, 2022, arXiv 2211.10438): each row of activations is rounded to 8
//!   bits with a scale of its own and the sums are those of integers.
#![allow(unsafe_code)]

use std::borrow::Cow;

use half::f16;
use rayon::prelude::*;

use crate::disjoint::Disjoint;
use crate::gemm::Matrix;
use crate::matmul::{self, Precision};

pub mod gptq;
mod integer;
mod portable;
pub mod round;
pub mod search;
#[cfg(target_arch = "x86_64")]
mod wide;

/// Outputs that stand side by side in a [`Packed`] weight.
pub(crate) const LANES: usize = 16;
/// Most rows that are multiplied while a weight is widened once.
const ROWS: usize = 8;
/// Up to this many rows weights are widened in registers.
const FEW: usize = 32;
/// Values of a weight that are widened at once for many rows: 8 MiB.
const BLOCK: usize = 2 << 20;
/// Below this many bytes of weights the threads cost more than they bring.
const PARALLEL: usize = 1 << 16;

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
    rows: usize,
    columns: usize,
    pub(crate) bits: Bits,
    group: usize,
    /// `[panels, units]`.
    lines: Vec<Line>,
    /// `[panels, groups, 16]`.
    scales: Vec<f16>,
    zeros: Option<Vec<f16>>,
    inputs: Option<Vec<f32>>,
    brief_inputs: bool,
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

    fn groups(&self) -> usize {
        self.columns.div_ceil(self.group).max(1)
    }

    fn units(&self) -> usize {
        self.columns.div_ceil(self.bits.per_word())
    }

    fn panel(&self, panel: usize) -> Panel<'_> {
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
    fn prepared<'a>(&self, x: &'a [f32]) -> (Cow<'a, [f32]>, usize) {
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

/// Which code multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Our loops with AVX-512 (VNNI where inputs are of 8 bits).
    Avx512,
    /// Plain loops, compiled for AVX2 where the machine has it.
    Portable,
}

impl Level {
    /// The fastest that this machine runs.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
        {
            return Level::Avx512;
        }
        Level::Portable
    }
}

/// `x Wᵀ + bias` for `x [m, in]` and `weight [out, in]`. For many rows the widened operands are rounded as `precision` says.
///
/// Panics when lengths do not fit.
pub fn product(precision: Precision, x: &[f32], weight: &Packed, bias: Option<&[f32]>) -> Vec<f32> {
    product_at(Level::best(), precision, x, weight, bias)
}

/// As [`product`], by the code that `level` names. Panics where the machine lacks it.
pub fn product_at(
    level: Level,
    precision: Precision,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let [n, k] = weight.shape();
    assert!(
        k > 0 && x.len().is_multiple_of(k),
        "a product of {} values with a weight of {n} x {k}",
        x.len()
    );
    assert!(
        level == Level::Portable || level == Level::best(),
        "this machine lacks AVX-512"
    );
    assert!(
        bias.is_none_or(|bias| bias.len() == n),
        "the bias of a product with a weight of {n} x {k}"
    );
    let m = x.len() / k;
    let mut out = vec![0.0; m * n];
    if m == 0 || n == 0 {
        return out;
    }
    let (values, stride) = weight.prepared(x);
    if weight.brief_inputs {
        integer::multiply(level, &values, stride, weight, bias, &mut out);
    } else if m <= FEW {
        few_rows(level, &values, stride, weight, bias, &mut out);
    } else {
        many_rows(level, precision, &values, stride, weight, bias, &mut out);
    }
    out
}

/// Runs `work` for every panel, on the threads where there is enough to read.
fn each_panel(weight: &Packed, rows: usize, work: impl Fn(usize) + Sync) {
    let panels = weight.rows.div_ceil(LANES);
    if 64 * weight.lines.len() * rows.div_ceil(ROWS) < PARALLEL {
        (0..panels).for_each(work);
        return;
    }
    let tasks = 2 * rayon::current_num_threads();
    let each = panels.div_ceil(tasks);
    (0..panels.div_ceil(each))
        .into_par_iter()
        .with_max_len(1)
        .for_each(|task| (task * each..((task + 1) * each).min(panels)).for_each(&work));
}

/// Adds the bias to the sums of a panel for the rows from `first` on, and writes them.
fn give(
    out: &Disjoint,
    n: usize,
    panel: usize,
    first: usize,
    sums: &[[f32; LANES]],
    bias: Option<&[f32]>,
) {
    let columns = panel * LANES..((panel + 1) * LANES).min(n);
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: each panel writes columns of its own, and each call rows of its own.
        let to = unsafe { out.part((first + row) * n + columns.start, columns.len()) };
        to.copy_from_slice(&sums[..columns.len()]);
        if let Some(bias) = bias {
            for (to, bias) in to.iter_mut().zip(&bias[columns.clone()]) {
                *to += bias;
            }
        }
    }
}

fn few_rows(
    level: Level,
    x: &[f32],
    stride: usize,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (n, m) = (weight.rows, x.len() / stride);
    let sums: Vec<f32> = match weight.zeros {
        None => Vec::new(),
        Some(_) => x
            .chunks_exact(stride)
            .flat_map(|row| row.chunks(weight.group).take(weight.groups()))
            .map(|group| group.iter().sum())
            .collect(),
    };
    let (groups, out) = (weight.groups(), Disjoint::new(out));
    each_panel(weight, m, |index| {
        let panel = weight.panel(index);
        // As even blocks of rows as there can be.
        let block = m.div_ceil(m.div_ceil(ROWS));
        for first in (0..m).step_by(block) {
            let count = block.min(m - first);
            let rows = Rows {
                values: &x[first * stride..(first + count) * stride],
                stride,
                sums: sums
                    .get(first * groups..(first + count) * groups)
                    .unwrap_or_default(),
            };
            let mut sums = [[0.0; LANES]; ROWS];
            let sums = &mut sums[..count];
            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the level was checked to run on this machine.
                Level::Avx512 => unsafe { wide::multiply(weight.bits, panel, rows, sums) },
                #[cfg(not(target_arch = "x86_64"))]
                Level::Avx512 => unreachable!("levels are checked"),
                Level::Portable => portable::multiply(weight.bits, panel, rows, sums),
            }
            give(&out, n, index, first, sums, bias);
        }
    });
}

/// Widens blocks of outputs to `[in, outputs]` and multiplies those.
fn many_rows(
    level: Level,
    precision: Precision,
    x: &[f32],
    stride: usize,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (n, k, m) = (weight.rows, weight.columns, x.len() / stride);
    let a = Matrix {
        data: x,
        strides: (stride, 1),
    };
    let most = (BLOCK / stride / LANES).max(1) * LANES;
    let width = most.min(n.next_multiple_of(LANES));
    let mut wide = vec![0.0; stride * width];
    for first in (0..n).step_by(width) {
        let count = width.min(n - first);
        let parts = Disjoint::new(&mut wide);
        (0..count.div_ceil(LANES)).into_par_iter().for_each(|at| {
            let panel = weight.panel(first / LANES + at);
            for line in 0..panel.lines.len() {
                let mut values = [[0.0; LANES]; 8];
                match level {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the level was checked to run on this machine.
                    Level::Avx512 => unsafe {
                        wide::widen(weight.bits, panel, line, &mut values);
                    },
                    #[cfg(not(target_arch = "x86_64"))]
                    Level::Avx512 => unreachable!("levels are checked"),
                    Level::Portable => portable::widen(weight.bits, panel, line, &mut values),
                }
                let per = weight.bits.per_word();
                for (unit, values) in values[..per].iter().enumerate() {
                    // SAFETY: each panel has columns of its own.
                    let to = unsafe { parts.part((line * per + unit) * width + at * LANES, LANES) };
                    to.copy_from_slice(values);
                }
            }
        });
        let b = Matrix {
            data: &wide,
            strides: (width, 1),
        };
        let bias = bias.map(|bias| &bias[first..first + count]);
        if count == n {
            let finish = matmul::Finish { add: false, bias };
            matmul::matmul(precision, [m, k, n], a, b, out, finish);
            return;
        }
        let part = matmul::product(precision, [m, k, count], a, b, bias);
        for (to, from) in out.chunks_exact_mut(n).zip(part.chunks_exact(count)) {
            to[first..first + count].copy_from_slice(from);
        }
    }
}

#[cfg(test)]
mod tests;
