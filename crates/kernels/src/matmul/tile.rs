//! The innermost loop: a tile of the output held in registers while two panels are read.

use std::arch::x86_64::*;

use super::Precision;

/// Rows of a tile.
pub const HEIGHT: usize = 12;
/// Columns of a tile: two vectors. With [`HEIGHT`], 24 of the 32 registers hold sums.
pub const WIDTH: usize = 32;

/// One tile of the output, and the panels of which it is the product.
pub struct Tile<'a> {
    /// `units` times [`HEIGHT`] words.
    pub a: *const u32,
    /// `units` times [`WIDTH`] words, at a cache line.
    pub b: *const u32,
    /// Words of the inner dimension.
    pub units: usize,
    /// The first element.
    pub out: *mut f32,
    /// From row to row of the output.
    pub stride: usize,
    /// Rows and columns that exist.
    pub size: [usize; 2],
    /// Sums onto what the output holds.
    pub keeps: bool,
    /// Added to every row, where this is the last stretch.
    pub bias: Option<&'a [f32]>,
}

impl Tile<'_> {
    /// Computes the tile.
    ///
    /// # Safety
    /// The panels hold `units` units; the output is ours for the size of the tile; the bias has as many values as the tile
    /// columns; AVX-512 (for bf16 AVX512-BF16) is there.
    pub unsafe fn multiply(&self, precision: Precision) {
        // SAFETY: as promised by the caller.
        unsafe {
            match (precision, self.size[1] > 16) {
                (Precision::F32, true) => f32_rows::<2>(self),
                (Precision::F32, false) => f32_rows::<1>(self),
                (Precision::Bf16, true) => bf16_rows::<2>(self),
                (Precision::Bf16, false) => bf16_rows::<1>(self),
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn multiply_f32(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn multiply_bf16(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both types are 512 bits without invalid values.
    unsafe {
        let [a, b] = [a, b].map(|x| std::mem::transmute::<__m512i, __m512bh>(x));
        _mm512_dpbf16_ps(sum, a, b)
    }
}

macro_rules! tile {
    ($by_rows:ident, $tile:ident, $features:literal, $multiply:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $by_rows<const VECTORS: usize>(tile: &Tile) {
            // SAFETY: as promised to `Tile::multiply`.
            unsafe {
                match tile.size[0] {
                    12 => $tile::<12, VECTORS>(tile),
                    11 => $tile::<11, VECTORS>(tile),
                    10 => $tile::<10, VECTORS>(tile),
                    9 => $tile::<9, VECTORS>(tile),
                    8 => $tile::<8, VECTORS>(tile),
                    7 => $tile::<7, VECTORS>(tile),
                    6 => $tile::<6, VECTORS>(tile),
                    5 => $tile::<5, VECTORS>(tile),
                    4 => $tile::<4, VECTORS>(tile),
                    3 => $tile::<3, VECTORS>(tile),
                    2 => $tile::<2, VECTORS>(tile),
                    _ => $tile::<1, VECTORS>(tile),
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn $tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            let (mut a, mut b) = (tile.a, tile.b);
            for _ in 0..tile.units {
                // SAFETY: the panels hold a word of each row and column for every unit.
                unsafe {
                    let right: [__m512i; VECTORS] =
                        std::array::from_fn(|v| _mm512_load_si512(b.add(16 * v).cast()));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let left = _mm512_set1_epi32(*a.add(row) as i32);
                        for (sum, right) in sums.iter_mut().zip(right) {
                            *sum = $multiply(*sum, left, right);
                        }
                    }
                    (a, b) = (a.add(HEIGHT), b.add(WIDTH));
                }
            }
            let last = tile.size[1] - 16 * (VECTORS - 1);
            for v in 0..VECTORS {
                let count = if v + 1 < VECTORS { 16 } else { last };
                let mask: __mmask16 = if count == 16 { !0 } else { (1 << count) - 1 };
                // SAFETY: lanes past the columns are masked out; the rows are ours.
                unsafe {
                    let bias = match tile.bias {
                        Some(bias) => _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(16 * v)),
                        None => _mm512_setzero_ps(),
                    };
                    for (row, sums) in sums.iter().enumerate() {
                        let to = tile.out.add(row * tile.stride + 16 * v);
                        let mut sum = _mm512_add_ps(sums[v], bias);
                        if tile.keeps {
                            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
                        }
                        _mm512_mask_storeu_ps(to, mask, sum);
                    }
                }
            }
        }
    };
}
tile!(f32_rows, f32_tile, "avx512f", multiply_f32);
tile!(bf16_rows, bf16_tile, "avx512f,avx512bf16", multiply_bf16);
