//! The loops without instructions of their own: the compiler makes AVX2 (or what there is) of them.

use half::f16;

use super::brief::{Brief, offset};
use super::{Bits, LANES, Panel, Rows};
use crate::simd::dispatched;

/// Weight `at` of a word as a number, before the scale.
#[inline(always)]
fn weight(bits: Bits, low: f32, word: u32, at: usize) -> f32 {
    match bits {
        Bits::Eight => f32::from((word >> (8 * at)) as u8 as i8),
        Bits::Four => ((word >> (4 * at)) & 15) as f32 + low,
        Bits::Half => f16::from_bits((word >> (16 * at)) as u16).to_f32(),
        Bits::Brain => f32::from_bits(word >> (16 * at) << 16),
    }
}

/// What 0 stands for.
#[inline(always)]
fn low(panel: Panel) -> f32 {
    if panel.zeros.is_some() { 0.0 } else { -8.0 }
}

#[inline(always)]
fn halves(values: &[f16], group: usize) -> [f32; LANES] {
    std::array::from_fn(|lane| values[group * LANES + lane].to_f32())
}

dispatched! {
    /// The sums of a panel with some rows.
    pub(super) fn multiply<'a>(
        bits: Bits,
        panel: Panel<'a>,
        rows: Rows<'a>,
        sums: &'a mut [[f32; LANES]],
    ) {
        match bits {
            Bits::Eight => rows_of::<4>(bits, panel, rows, sums),
            Bits::Four => rows_of::<8>(bits, panel, rows, sums),
            Bits::Half | Bits::Brain => rows_of::<2>(bits, panel, rows, sums),
        }
    }
}

#[inline(always)]
fn rows_of<const PER: usize>(bits: Bits, panel: Panel, rows: Rows, sums: &mut [[f32; LANES]]) {
    let groups = panel.lines.len().div_ceil(panel.per_group);
    let low = low(panel);
    for (group, lines) in panel.lines.chunks(panel.per_group).enumerate() {
        let scale = halves(panel.scales, group);
        let zero = panel.zeros.map(|zeros| halves(zeros, group));
        let first = group * panel.per_group * PER;
        for (row, total) in sums.iter_mut().enumerate() {
            let x = &rows.values[row * rows.stride + first..][..lines.len() * PER];
            let mut part = [0.0f32; LANES];
            for (line, x) in lines.iter().zip(x.as_chunks::<PER>().0) {
                for at in 0..PER {
                    for lane in 0..LANES {
                        let weight = weight(bits, low, line.0[lane], at);
                        part[lane] = weight.mul_add(x[at], part[lane]);
                    }
                }
            }
            for lane in 0..LANES {
                total[lane] = part[lane].mul_add(scale[lane], total[lane]);
            }
            if let Some(zero) = zero {
                for lane in 0..LANES {
                    total[lane] = zero[lane].mul_add(rows.sums[row * groups + group], total[lane]);
                }
            }
        }
    }
}

/// The weights of a line, column by column.
pub(super) fn widen(bits: Bits, panel: Panel, line: usize, values: &mut [[f32; LANES]; 8]) {
    let (group, low) = (line / panel.per_group, low(panel));
    let scale = halves(panel.scales, group);
    let zero = panel
        .zeros
        .map_or([0.0; LANES], |zeros| halves(zeros, group));
    for (at, to) in values[..bits.per_word()].iter_mut().enumerate() {
        for lane in 0..LANES {
            let weight = weight(bits, low, panel.lines[line].0[lane], at);
            to[lane] = weight.mul_add(scale[lane], zero[lane]);
        }
    }
}

/// The weights of one row of a panel.
pub(super) fn widen_row(bits: Bits, panel: Panel, lane: usize, values: &mut [f32]) {
    let low = low(panel);
    let lines = panel.lines.iter().zip(values.chunks_mut(bits.per_word()));
    for (line, (words, values)) in lines.enumerate() {
        let at = line / panel.per_group * LANES + lane;
        let scale = panel.scales[at].to_f32();
        let zero = panel.zeros.map_or(0.0, |zeros| zeros[at].to_f32());
        for (at, value) in values.iter_mut().enumerate() {
            *value = weight(bits, low, words.0[lane], at).mul_add(scale, zero);
        }
    }
}

dispatched! {
    /// The sums of a panel of 8 or 4 bits with some rounded rows.
    pub(super) fn brief<'a>(
        bits: Bits,
        panel: Panel<'a>,
        rows: Brief<'a>,
        sums: &'a mut [[f32; LANES]],
    ) {
        let per = bits.per_word();
        let high = offset(bits, panel.zeros.is_some());
        for (group, lines) in panel.lines.chunks(panel.per_group).enumerate() {
            let scale = halves(panel.scales, group);
            let zero = panel.zeros.map(|zeros| halves(zeros, group));
            for (row, totals) in sums.iter_mut().enumerate() {
                let first = row * rows.stride + group * panel.per_group * per;
                let x = &rows.bytes[first..][..lines.len() * per];
                let (factor, sum) = (
                    rows.factors[row * rows.groups + group],
                    rows.sums[row * rows.groups + group],
                );
                let mut part = [0i32; LANES];
                for (line, x) in lines.iter().zip(x.chunks_exact(per)) {
                    for (at, x) in x.iter().enumerate() {
                        let x = i32::from(*x);
                        for lane in 0..LANES {
                            let stored = match bits {
                                // Even columns come first.
                                Bits::Four => line.0[lane] >> (4 * (2 * (at % 4) + at / 4)) & 15,
                                _ => (line.0[lane] >> (8 * at) & 255) ^ 128,
                            };
                            part[lane] += stored as i32 * x;
                        }
                    }
                }
                for lane in 0..LANES {
                    totals[lane] += (part[lane] - high * sum) as f32 * (scale[lane] * factor);
                    if let Some(zero) = zero {
                        totals[lane] += zero[lane] * (factor * sum as f32);
                    }
                }
            }
        }
    }
}
