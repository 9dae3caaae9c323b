//! Packing: stretches of an operand as panels, in the order in which a tile reads them.
//!
//! A panel holds `width` rows (of the left operand) or columns (of the right one): for each unit of the inner dimension
//! `width` words of 32 bits, an f32 or two neighbours of bf16. Rows past the edge and the second half of an odd last
//! pair are zero.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::Precision;
use crate::gemm::Matrix;
use crate::quant::{Packed, repacked};
use crate::transpose::wide::{lanes, transposed};

/// A cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u32; 16]);

/// An operand seen along its outer dimension: `outer` rows (or columns) of `inner` values.
pub struct Side<'a> {
    precision: Precision,
    /// Rows.
    pub outer: usize,
    inner: usize,
    data: &'a [f32],
    strides: (usize, usize),
    /// Contiguous rows, where neither stride of the operand is 1.
    owned: Option<Vec<f32>>,
    /// Where the values come from instead.
    brief: Option<&'a Packed>,
    /// Of a panel.
    pub width: usize,
}

impl<'a> Side<'a> {
    /// `matrix` is `[outer, inner]`; panels are `width` wide.
    pub fn new(
        precision: Precision,
        outer: usize,
        inner: usize,
        matrix: Matrix<'a>,
        width: usize,
    ) -> Self {
        let (along, across) = matrix.strides;
        let mut side = Side {
            precision,
            outer,
            inner,
            data: matrix.data,
            strides: matrix.strides,
            owned: None,
            brief: None,
            width,
        };
        if inner == 1 {
            side.strides.1 = 1;
        } else if outer == 1 {
            side.strides.0 = 1;
        }
        if side.strides.0 != 1 && side.strides.1 != 1 {
            let at = |i: usize| (0..inner).map(move |j| matrix.data[i * along + j * across]);
            side.owned = Some((0..outer).flat_map(at).collect());
            side.strides = (inner, 1);
        }
        side
    }

    /// A weight `[outer, inner]` of 16 bits or fewer, widened as it is packed; factors of inputs are left out.
    pub fn brief(precision: Precision, weight: &'a Packed, width: usize) -> Self {
        let [outer, inner] = weight.shape();
        Side {
            precision,
            outer,
            inner,
            data: &[],
            strides: (inner, 1),
            owned: None,
            brief: Some(weight),
            width,
        }
    }

    /// Stretches of the inner dimension begin at multiples of so many words.
    pub fn step(&self) -> usize {
        match self.brief {
            Some(_) => repacked::STEP,
            None => 1,
        }
    }

    /// Words of a row: its values, or pairs of them.
    pub fn units(&self) -> usize {
        match self.precision {
            Precision::F32 => self.inner,
            Precision::Bf16 => self.inner.div_ceil(2),
        }
    }

    fn values(&self) -> &[f32] {
        self.owned.as_deref().unwrap_or(self.data)
    }
}

/// Room for packed panels.
#[derive(Debug)]
pub struct Panels {
    lines: Vec<Line>,
    width: usize,
    units: usize,
}

impl Panels {
    /// Room for `outer` rows of `units` words.
    pub fn new(outer: usize, units: usize, width: usize) -> Self {
        let mut panels = EMPTY;
        panels.reserve(outer, units, width);
        panels
    }

    fn reserve(&mut self, outer: usize, units: usize, width: usize) {
        (self.width, self.units) = (width, units);
        let words = outer.div_ceil(width) * width * units;
        self.lines.clear();
        self.lines.reserve(words.div_ceil(16));
    }

    /// Where unit `unit` of panel `index` stands. The panel holds the units that [`Panels::fill`] was given last.
    pub fn panel(&self, index: usize, unit: usize) -> *const u32 {
        let at = (index * self.units + unit) * self.width;
        assert!(at < self.lines.capacity() * 16, "a panel that is not there");
        // SAFETY: within the allocation, as just checked.
        unsafe { self.lines.as_ptr().cast::<u32>().add(at) }
    }

    /// Packs rows `outer` and units `units` of `side`.
    pub fn fill(&mut self, side: &Side, outer: Range<usize>, units: Range<usize>, threads: bool) {
        let count = outer.len().div_ceil(self.width);
        self.units = units.len();
        let words = count * self.width * self.units;
        assert!(words <= self.lines.capacity() * 16, "panels do not fit");
        assert!(outer.end <= side.outer && units.end <= side.units() && self.width == side.width);
        let start = Start(self.lines.as_mut_ptr().cast());
        let work = |index: usize| {
            let first = outer.start + index * self.width;
            let rows = first..(first + self.width).min(outer.end);
            // SAFETY: the panel lies within the allocation; rows and units within the operand, both checked above; this
            // module runs only where AVX-512 (and AVX512-BF16 for bf16) was detected.
            unsafe {
                let to = start.get().add(index * self.width * self.units);
                panel(side, rows, units.clone(), to);
            }
        };
        match threads {
            true => (0..count).into_par_iter().with_min_len(4).for_each(work),
            false => (0..count).for_each(work),
        }
    }
}

impl Panels {
    /// The rows `[outer, inner]` that were packed whole, contiguous, as far as the precision kept them.
    pub fn unpack(&self, precision: Precision, [outer, inner]: [usize; 2], to: &mut [f32]) {
        assert_eq!(to.len(), outer * inner, "unpacked rows");
        assert!(
            outer.div_ceil(self.width) * self.width * self.units <= self.lines.capacity() * 16,
            "panels do not hold the rows"
        );
        for (row, values) in to.chunks_exact_mut(inner).enumerate() {
            let start = self.panel(row / self.width, 0);
            for (at, value) in values.iter_mut().enumerate() {
                let unit = match precision {
                    Precision::F32 => at,
                    Precision::Bf16 => at / 2,
                };
                // SAFETY: the word of this row and unit lies within the panels, as checked above, and `fill` has written it.
                let word = unsafe { start.add(unit * self.width + row % self.width).read() };
                *value = f32::from_bits(match (precision, at % 2) {
                    (Precision::F32, _) => word,
                    (Precision::Bf16, 0) => word << 16,
                    (Precision::Bf16, _) => word & 0xffff_0000,
                });
            }
        }
    }
}

/// The first word of the panels.
struct Start(*mut u32);
// SAFETY: each task writes a panel of its own.
unsafe impl Sync for Start {}
impl Start {
    fn get(&self) -> *mut u32 {
        self.0
    }
}

const EMPTY: Panels = Panels {
    lines: Vec::new(),
    width: 0,
    units: 0,
};

thread_local! {
    static BUFFER: RefCell<Panels> = const { RefCell::new(EMPTY) };
}

/// Lends this thread's panels, with room for `outer` rows of `units` words.
pub fn with_buffer<T>(
    outer: usize,
    units: usize,
    width: usize,
    work: impl FnOnce(&mut Panels) -> T,
) -> T {
    // Taken out while in use: a thread that waits within `work` may start another product.
    let mut panels = BUFFER.with(|held| held.replace(EMPTY));
    panels.reserve(outer, units, width);
    let result = work(&mut panels);
    BUFFER.with(|held| held.replace(panels));
    result
}

/// One panel: rows of `side` (at most its width, the rest zero), the words `units` of each.
///
/// # Safety
/// Rows and units lie within the operand; `to` has room for the panel; AVX-512 (for bf16 AVX512-BF16) is there.
pub unsafe fn panel(side: &Side, rows: Range<usize>, units: Range<usize>, to: *mut u32) {
    if let Some(weight) = side.brief {
        // SAFETY: as promised by the caller.
        unsafe { repacked::panel(side.precision, weight, rows.start, units, side.width, to) };
        return;
    }
    // SAFETY: as promised by the caller.
    unsafe {
        match (side.precision, side.strides.1 == 1) {
            (Precision::F32, true) => f32_rows(side, rows, units, to),
            (Precision::F32, false) => f32_columns(side, rows, units, to),
            (Precision::Bf16, true) => bf16_rows(side, rows, units, to),
            (Precision::Bf16, false) => bf16_columns(side, rows, units, to),
        }
    }
}

macro_rules! from_columns {
    ($name:ident, $features:literal, $load:ident, $per:literal) => {
        /// A panel of an operand whose outer dimension is contiguous: a word of each row is one load (or two).
        #[target_feature(enable = $features)]
        unsafe fn $name(side: &Side, rows: Range<usize>, units: Range<usize>, to: *mut u32) {
            let stride = side.strides.1;
            let values = side.values().as_ptr();
            let last = units.len() - 1;
            for (at, unit) in units.enumerate() {
                let more = unit * $per + 1 < side.inner;
                let mut column = 0;
                while column < side.width {
                    let read = lanes(rows.len().saturating_sub(column));
                    // What is written past a row of 12 is written over by the next one.
                    let written = if at == last {
                        lanes(side.width - column)
                    } else {
                        !0
                    };
                    // SAFETY: lanes past the rows are masked out, and past the panel; the second of a pair is read only
                    // where it exists.
                    unsafe {
                        let from = values.wrapping_add(unit * $per * stride + rows.start + column);
                        let words = $load(from, stride, read, more);
                        let to = to.add(at * side.width + column);
                        _mm512_mask_storeu_epi32(to.cast(), written, words);
                    }
                    column += 16;
                }
            }
        }
    };
}
from_columns!(f32_columns, "avx512f", load_f32, 1);
from_columns!(bf16_columns, "avx512f,avx512bw,avx512bf16", load_pair, 2);

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_f32(from: *const f32, _: usize, mask: __mmask16, _: bool) -> __m512i {
    // SAFETY: lanes outside the mask are not read.
    unsafe { _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, from)) }
}

/// 16 values and those a stride later, as pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn load_pair(from: *const f32, stride: usize, mask: __mmask16, more: bool) -> __m512i {
    // SAFETY: lanes outside the mask are not read, the second row only where it exists.
    unsafe {
        let low = _mm512_maskz_loadu_ps(mask, from);
        let high = match more {
            true => _mm512_maskz_loadu_ps(mask, from.wrapping_add(stride)),
            false => _mm512_setzero_ps(),
        };
        woven(low, high)
    }
}

/// Pairs of bf16, the first of `low` and the second of `high`: both rounded at once, then woven together.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub fn woven(low: __m512, high: __m512) -> __m512i {
    let words: [u16; 32] = std::array::from_fn(|at| (at / 2 + 16 * (at % 2)) as u16);
    // SAFETY: both types are 512 bits without invalid values, as are the words.
    unsafe {
        let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        _mm512_permutexvar_epi16(_mm512_loadu_si512(words.as_ptr().cast()), both)
    }
}

macro_rules! from_rows {
    ($name:ident, $features:literal, $load:ident, $per:literal) => {
        /// A panel of an operand whose inner dimension is contiguous: blocks of 16 x 16 words are transposed.
        #[target_feature(enable = $features)]
        unsafe fn $name(side: &Side, rows: Range<usize>, units: Range<usize>, to: *mut u32) {
            let stride = side.strides.0;
            let values = side.values().as_ptr();
            let mut first = 0;
            while first < units.len() {
                let count = (units.len() - first).min(16);
                let from = (units.start + first) * $per;
                let valid = side.inner - from;
                let mut column = 0;
                while column < side.width {
                    let mut block = [_mm512_setzero_si512(); 16];
                    let held = rows.len().saturating_sub(column).min(16);
                    for (row, line) in block.iter_mut().enumerate().take(held) {
                        // SAFETY: values past the row are masked out.
                        unsafe {
                            let at = (rows.start + column + row) * stride + from;
                            *line = $load(values.add(at), valid.min(count * $per));
                        }
                    }
                    let block = transposed(block);
                    for (unit, line) in block.iter().enumerate().take(count) {
                        // SAFETY: lanes past the panel are masked out.
                        unsafe {
                            let at = (first + unit) * side.width + column;
                            let last = first + unit + 1 == units.len();
                            let written = if last { lanes(side.width - column) } else { !0 };
                            _mm512_mask_storeu_epi32(to.add(at).cast(), written, *line);
                        }
                    }
                    column += 16;
                }
                first += 16;
            }
        }
    };
}
from_rows!(f32_rows, "avx512f", load_row, 1);
from_rows!(bf16_rows, "avx512f,avx512bf16", load_pairs, 2);

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_row(from: *const f32, count: usize) -> __m512i {
    // SAFETY: lanes past the count are not read.
    unsafe { _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(count), from)) }
}

/// Up to 32 values of a row as 16 pairs.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub unsafe fn load_pairs(from: *const f32, count: usize) -> __m512i {
    // SAFETY: lanes past the count are not read.
    unsafe {
        let low = _mm512_maskz_loadu_ps(lanes(count), from);
        let high = _mm512_maskz_loadu_ps(lanes(count.saturating_sub(16)), from.wrapping_add(16));
        std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
    }
}
