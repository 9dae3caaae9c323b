//! Quantised weights on disk. Of the weight NAME `[out, in]` a folder then holds
//!
//! ```text
//! NAME.q      I8 [out, in], or U8 [out, (in + 1) / 2]: two weights of 4 bits, the first in the lower half of the byte
//! NAME.scale  F16 [out, groups]
//! NAME.zero   F16 [out, groups], for weights with zeros
//! NAME.input  F32 [in], where inputs are multiplied first
//! ```
//! and its `config.json` tells under "quantisation" how it was made ([`Quantisation`]). A weight is `scale q`, or `scale q +
//! zero`; 4 bits hold `q + 8` without zeros and `q` with them. The blocks of GGUF files (Q8_0, Q4_0, Q4_1) are the same
//! numbers in another order and stay as they are, too.

use std::ops::Range;

use anyformer_ops::Param;
use anyformer_ops::quantised::quant::round::Scheme;
use anyformer_ops::quantised::quant::{Bits, Packed, Quants};
use half::f16;
use serde::{Deserialize, Serialize};

use crate::encoding::Encoding;
use crate::error::{HubError, Problem};
use crate::families::names::Place;
use crate::tensors::{Data, Piece};
use crate::weights::Weights;

/// How quantised weights were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The nearest.
    Rtn,
    /// Column by column, later ones making up for the errors of earlier ones.
    Gptq,
    /// Weights of large inputs enlarged before they are rounded.
    Awq,
    /// Weights and inputs of 8 bits, outliers of the inputs moved into the weights.
    SmoothQuant,
}

impl Method {
    /// As it stands in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Method::Rtn => "rtn",
            Method::Gptq => "gptq",
            Method::Awq => "awq",
            Method::SmoothQuant => "smoothquant",
        }
    }
}

/// What `config.json` says of quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantisation {
    /// How they were found.
    pub method: Method,
    /// 8 or 4, of the weights in layers; others have 8.
    pub bits: u8,
    /// Neighbours in a row with one scale; 0 for the whole row.
    pub group: usize,
    /// With zeros (of weights of 4 bits).
    pub zeros: bool,
    /// GPTQ: columns in the order of the size of their inputs.
    pub act_order: bool,
    /// SmoothQuant: how much of the outliers moves into the weights.
    pub alpha: Option<f32>,
}

impl Quantisation {
    /// How weights in layers are rounded; or what cannot be.
    pub fn scheme(&self) -> Result<Scheme, String> {
        let bits = match self.bits {
            8 => Bits::Eight,
            4 => Bits::Four,
            other => return Err(format!("bits should be 8 or 4, is {other}")),
        };
        if !self.group.is_multiple_of(8) {
            let group = self.group;
            return Err(format!(
                "group should be a multiple of 8 (or 0 for a row), is {group}"
            ));
        }
        let smooth = self.method == Method::SmoothQuant;
        if smooth && self.bits != 8 {
            return Err("smoothquant is of 8 bits; set bits to 8, or take rtn, gptq or awq".into());
        }
        if let Some(alpha) = self.alpha
            && !(smooth && (0.0..=1.0).contains(&alpha))
        {
            return Err(format!("alpha is of smoothquant, from 0 to 1; is {alpha}"));
        }
        if self.zeros && self.bits != 4 {
            return Err("weights of 8 bits have no zeros".into());
        }
        if self.act_order && self.method != Method::Gptq {
            return Err("act-order is of gptq".into());
        }
        Ok(Scheme {
            bits,
            group: self.group,
            zeros: self.zeros,
        })
    }

    /// How weights outside of layers are rounded: the head, and with it a tied embedding.
    pub fn outer(&self) -> Scheme {
        Scheme {
            bits: Bits::Eight,
            group: self.group,
            zeros: false,
        }
    }
}

/// The tensors of a packed weight.
pub(crate) fn pieces(name: &str, quants: &Quants) -> Vec<Piece<'static>> {
    let (rows, columns, groups) = (quants.rows, quants.columns, quants.groups());
    let piece = |ending: &str, dtype, shape: &[usize], bytes| Piece {
        name: format!("{name}.{ending}"),
        dtype,
        shape: shape.to_vec(),
        data: Data::Bytes(bytes),
    };
    let halves = |values: &[f16]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    };
    let above = if quants.zeros.is_none() { 8 } else { 0 };
    let (dtype, width, values) = match quants.bits {
        Bits::Eight | Bits::Half | Bits::Brain => (
            "I8",
            columns,
            quants
                .values
                .iter()
                .map(|value| value.cast_unsigned())
                .collect(),
        ),
        Bits::Four => {
            let half = |value: &i8| (value + above).cast_unsigned();
            let pair = |pair: &[i8]| half(&pair[0]) | pair.get(1).map_or(0, half) << 4;
            let row = |row: &[i8]| row.chunks(2).map(pair).collect::<Vec<u8>>();
            let rows = quants.values.chunks(columns.max(1));
            ("U8", columns.div_ceil(2), rows.flat_map(row).collect())
        }
    };
    let mut pieces = vec![
        piece("q", dtype, &[rows, width], values),
        piece("scale", "F16", &[rows, groups], halves(&quants.scales)),
    ];
    if let Some(zeros) = &quants.zeros {
        pieces.push(piece("zero", "F16", &[rows, groups], halves(zeros)));
    }
    if let Some(inputs) = &quants.inputs {
        let bytes = inputs
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        pieces.push(piece("input", "F32", &[columns], bytes));
    }
    pieces
}

/// Whether a file holds the weight `name` quantised.
pub(crate) fn holds(weights: &Weights, name: &str) -> bool {
    weights.get(&format!("{name}.q")).is_some()
}

/// The tensors of a quantised weight, and what is wrong with them.
pub(crate) fn misfits(
    weights: &Weights,
    name: &str,
    shape: &[usize],
    how: &Quantisation,
) -> (Vec<String>, Vec<Problem>) {
    let (mut used, mut problems) = (Vec::new(), Vec::new());
    let &[rows, columns] = shape else {
        let reason = format!("is of shape {shape:?}, and only matrices are quantised");
        let name = name.to_string();
        return (used, vec![Problem::Quantised { name, reason }]);
    };
    let brief = weights
        .get(&format!("{name}.q"))
        .is_some_and(|stored| stored.encoding == Encoding::U8);
    let group = Scheme {
        group: how.group,
        ..how.outer()
    }
    .group_of(columns);
    let groups = columns.div_ceil(group).max(1);
    let (q, width) = match brief {
        true => (Encoding::U8, columns.div_ceil(2)),
        false => (Encoding::I8, columns),
    };
    let parts = [
        ("q", q, vec![rows, width], true),
        ("scale", Encoding::F16, vec![rows, groups], true),
        ("zero", Encoding::F16, vec![rows, groups], false),
        ("input", Encoding::F32, vec![columns], false),
    ];
    for (ending, encoding, expected, needed) in parts {
        let name = format!("{name}.{ending}");
        match weights.get(&name) {
            None if needed => problems.push(Problem::Missing {
                name,
                shape: expected,
            }),
            None => {}
            Some(stored) => {
                if stored.shape != expected {
                    problems.push(Problem::Shape {
                        name: name.clone(),
                        expected,
                        got: stored.shape.clone(),
                    });
                } else if stored.encoding != encoding {
                    let reason = format!("should be {encoding:?}, is {:?}", stored.encoding);
                    let name = name.clone();
                    problems.push(Problem::Quantised { name, reason });
                }
                used.push(name);
            }
        }
    }
    (used, problems)
}

/// Gives a parameter its quantised values, whose tensors fit. Values that cannot be are the answer.
pub(crate) fn fill(
    param: &Param,
    weights: &Weights,
    how: &Quantisation,
) -> Result<Option<Problem>, HubError> {
    let of = |ending: &str| weights.get(&format!("{}.{ending}", param.name()));
    let (&[rows, columns], Some(q), Some(scale)) = (param.shape(), of("q"), of("scale")) else {
        return Ok(None);
    };
    let zero = of("zero");
    let inputs = of("input").map(|input| weights.bytes(input)).transpose()?;
    let inputs: Option<Vec<f32>> = inputs.map(|bytes| {
        let of = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
        bytes.as_chunks().0.iter().map(of).collect()
    });
    let group = Scheme {
        group: how.group,
        ..how.outer()
    }
    .group_of(columns);
    let (bits, width) = match q.encoding {
        Encoding::U8 => (Bits::Four, columns.div_ceil(2)),
        _ => (Bits::Eight, columns),
    };
    let place = Place::own(param.name());
    let piece = |ours: Range<usize>| {
        let bytes = |stored, width| weights.row_bytes(stored, &place, rows, ours.clone(), width);
        let beside = |stored| Ok(halves(&bytes(stored, 2 * columns.div_ceil(group).max(1))?));
        let values = bytes(q, width)?;
        let values = match bits {
            Bits::Four => {
                let below = if zero.is_none() { 8 } else { 0 };
                let halves = |byte: &u8| [(byte & 15) as i8 - below, (byte >> 4) as i8 - below];
                let row = |row: &[u8]| {
                    let values = row.iter().flat_map(halves);
                    values.take(columns).collect::<Vec<i8>>()
                };
                values.chunks(width.max(1)).flat_map(row).collect()
            }
            _ => values.into_iter().map(u8::cast_signed).collect(),
        };
        let quants = Quants {
            rows: ours.len(),
            columns,
            bits,
            group,
            values,
            scales: beside(scale)?,
            zeros: zero.map(beside).transpose()?,
            brief_inputs: how.method == Method::SmoothQuant && inputs.is_some(),
            inputs: inputs.clone(),
        };
        Ok(packed(param, &quants))
    };
    let made = in_pieces(rows, width, piece)?;
    Ok(made.and_then(|packed| pack_as(param, packed)).err())
}

/// Bytes of a file that are packed at once: they are in memory three times meanwhile.
const PIECE: usize = 1 << 18;

/// Packs a matrix of rows of `width` bytes in a file piece by piece, so that no more than a piece is in memory beside it. `piece`
/// packs some of its rows.
pub(crate) fn in_pieces(
    rows: usize,
    width: usize,
    mut piece: impl FnMut(Range<usize>) -> Result<Result<Packed, Problem>, HubError>,
) -> Result<Result<Packed, Problem>, HubError> {
    let at_once = (PIECE / width.max(1) / Packed::PANEL).max(1) * Packed::PANEL;
    let mut whole = match piece(0..at_once.min(rows))? {
        Ok(first) => first,
        Err(problem) => return Ok(Err(problem)),
    };
    whole.reserve(rows.saturating_sub(at_once));
    for first in (at_once..rows).step_by(at_once) {
        match piece(first..rows.min(first + at_once))? {
            Ok(more) => whole.append(more),
            Err(problem) => return Ok(Err(problem)),
        }
    }
    Ok(Ok(whole))
}

fn halves(bytes: &[u8]) -> Vec<f16> {
    let of = |bytes: &[u8; 2]| f16::from_le_bytes(*bytes);
    bytes.as_chunks().0.iter().map(of).collect()
}

/// Values of a parameter, packed.
pub(crate) fn packed(param: &Param, quants: &Quants) -> Result<Packed, Problem> {
    Packed::new(quants).map_err(|error| Problem::Quantised {
        name: param.name().to_string(),
        reason: format!("failed to {error}"),
    })
}

/// Gives packed values to a parameter.
pub(crate) fn pack_as(param: &Param, packed: Packed) -> Result<(), Problem> {
    param.pack(packed).map_err(|error| Problem::Quantised {
        name: param.name().to_string(),
        reason: format!("failed to {error}"),
    })
}

/// The numbers in the blocks of rows of a GGUF tensor that can stay packed: Q8_0, Q4_0, Q4_1.
pub(crate) fn of_blocks(encoding: Encoding, [rows, columns]: [usize; 2], bytes: &[u8]) -> Quants {
    let bits = match encoding {
        Encoding::Q8_0 => Bits::Eight,
        _ => Bits::Four,
    };
    let (group, size) = encoding.block();
    let with_zeros = encoding == Encoding::Q4_1;
    let mut values = Vec::with_capacity(rows * columns);
    let (mut scales, mut zeros) = (Vec::new(), Vec::new());
    for block in bytes.chunks_exact(size) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
        scales.push(half(0));
        let numbers = if with_zeros { 4 } else { 2 };
        if with_zeros {
            zeros.push(half(2));
        }
        let numbers = &block[numbers..];
        match bits {
            Bits::Eight => values.extend(numbers.iter().map(|byte| byte.cast_signed())),
            _ => {
                let below = if with_zeros { 0 } else { 8 };
                values.extend(numbers.iter().map(|byte| (byte & 15) as i8 - below));
                values.extend(numbers.iter().map(|byte| (byte >> 4) as i8 - below));
            }
        }
    }
    Quants {
        rows,
        columns,
        bits,
        group,
        values,
        scales,
        zeros: with_zeros.then_some(zeros),
        inputs: None,
        brief_inputs: false,
    }
}
