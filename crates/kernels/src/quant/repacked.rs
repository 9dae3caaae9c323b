//! A packed weight as the panels that products of many rows read: widened on the way, or, where both are bfloat16, word for
//! word as it is.

use std::arch::x86_64::*;
use std::ops::Range;

use super::wide::{Brain, Code, Eight, Four, Half, halves, table};
use super::{Bits, LANES, Line, Packed};
use crate::matmul::Precision;
use crate::matmul::pack::woven;

/// Ranges of units begin at multiples of this: at a word of the weight, whatever its bits.
pub(crate) const STEP: usize = 8;

/// How a panel holds values: in words, each a unit of the inner dimension.
trait Unit {
    /// Values of a word.
    const VALUES: usize;
    /// The word of 16 outputs at place `at` of a line.
    ///
    /// # Safety
    /// AVX-512 (F and BW, for bf16 BF16) is there.
    unsafe fn word<C: Code>(line: &Scaled, at: usize) -> __m512i;
}

/// A line of a weight, and what its numbers stand for.
struct Scaled {
    words: __m512i,
    scale: __m512,
    zero: __m512,
    table: __m512,
}

impl Scaled {
    #[inline(always)]
    unsafe fn value<C: Code>(&self, at: usize) -> __m512 {
        // SAFETY: as promised to `Unit::word`.
        unsafe { _mm512_fmadd_ps(C::at(self.words, at, self.table), self.scale, self.zero) }
    }
}

struct Whole;
impl Unit for Whole {
    const VALUES: usize = 1;
    #[inline(always)]
    unsafe fn word<C: Code>(line: &Scaled, at: usize) -> __m512i {
        // SAFETY: as promised by the caller.
        unsafe { _mm512_castps_si512(line.value::<C>(at)) }
    }
}

struct Pair;
impl Unit for Pair {
    const VALUES: usize = 2;
    #[inline(always)]
    unsafe fn word<C: Code>(line: &Scaled, at: usize) -> __m512i {
        // SAFETY: as promised by the caller.
        unsafe { woven(line.value::<C>(2 * at), line.value::<C>(2 * at + 1)) }
    }
}

/// Fills a panel of `width` outputs from output `first` on, a multiple of 16, with the words `units` of each. Outputs past the
/// last are 0 or any finite number.
///
/// # Safety
/// `to` has room for the panel; AVX-512 (F and BW, for bf16 BF16) is there.
pub(crate) unsafe fn panel(
    precision: Precision,
    weight: &Packed,
    first: usize,
    units: Range<usize>,
    width: usize,
    to: *mut u32,
) {
    assert!(first.is_multiple_of(LANES) && width.is_multiple_of(LANES));
    assert!(units.start.is_multiple_of(STEP));
    for column in (0..width).step_by(LANES) {
        // SAFETY: within the panel.
        let to = unsafe { to.add(column) };
        let held = first + column < weight.rows;
        // SAFETY: as promised by the caller.
        unsafe {
            match (precision, weight.bits) {
                _ if !held => zeros(units.len(), width, to),
                (Precision::Bf16, Bits::Brain) => {
                    copied(
                        weight.panel((first + column) / LANES).lines,
                        units.clone(),
                        width,
                        to,
                    );
                }
                (Precision::F32, _) => {
                    whole(weight, (first + column) / LANES, units.clone(), width, to);
                }
                (Precision::Bf16, _) => {
                    pairs(weight, (first + column) / LANES, units.clone(), width, to);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn zeros(units: usize, width: usize, to: *mut u32) {
    for unit in 0..units {
        // SAFETY: a word of 16 outputs of the panel.
        unsafe { _mm512_storeu_si512(to.add(unit * width).cast(), _mm512_setzero_si512()) };
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn copied(lines: &[Line], units: Range<usize>, width: usize, to: *mut u32) {
    for (unit, Line(words)) in lines[units].iter().enumerate() {
        // SAFETY: a line is 64 bytes; a word of 16 outputs of the panel.
        unsafe {
            let words = _mm512_load_si512(words.as_ptr().cast());
            _mm512_storeu_si512(to.add(unit * width).cast(), words);
        }
    }
}

macro_rules! by_bits {
    ($name:ident, $unit:ty, $features:literal) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(
            weight: &Packed,
            panel: usize,
            units: Range<usize>,
            width: usize,
            to: *mut u32,
        ) {
            // SAFETY: as promised to `panel`.
            unsafe {
                match weight.bits {
                    Bits::Eight => lines::<Eight, $unit>(weight, panel, units, width, to),
                    Bits::Four => lines::<Four, $unit>(weight, panel, units, width, to),
                    Bits::Half => lines::<Half, $unit>(weight, panel, units, width, to),
                    Bits::Brain => lines::<Brain, $unit>(weight, panel, units, width, to),
                }
            }
        }
    };
}
by_bits!(whole, Whole, "avx512f,avx512bw");
by_bits!(pairs, Pair, "avx512f,avx512bw,avx512bf16");

/// Inlined into functions that have the instructions.
#[inline(always)]
unsafe fn lines<C: Code, U: Unit>(
    weight: &Packed,
    panel: usize,
    units: Range<usize>,
    width: usize,
    to: *mut u32,
) {
    let panel = weight.panel(panel);
    // Units of a line.
    let per = C::PER / U::VALUES;
    // SAFETY: AVX-512 is there, as promised to `panel`.
    let table = unsafe { table(panel) };
    let from = units.start / per;
    let some = &panel.lines[from..units.end.div_ceil(per)];
    for (at, Line(words)) in some.iter().enumerate() {
        // SAFETY: as above; a line is 64 bytes; words are written for units below the end only.
        unsafe {
            let group = (from + at) / panel.per_group;
            let line = Scaled {
                words: _mm512_load_si512(words.as_ptr().cast()),
                scale: _mm512_mul_ps(halves(panel.scales, group), _mm512_set1_ps(C::FACTOR)),
                zero: match panel.zeros {
                    Some(zeros) => halves(zeros, group),
                    None => _mm512_setzero_ps(),
                },
                table,
            };
            for unit in 0..per {
                let place = at * per + unit;
                if place < units.len() {
                    _mm512_storeu_si512(to.add(place * width).cast(), U::word::<C>(&line, unit));
                }
            }
        }
    }
}
