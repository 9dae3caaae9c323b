//! The loops of [`super::brief`] with AVX-512 and VNNI: four products and their sum in a lane at a time.

use std::arch::x86_64::*;

use super::brief::{Brief, offset};
use super::wide::halves;
use super::{Bits, LANES, Line, Panel};

/// The sums of a panel of 8 or 4 bits with 1 to 8 rows.
///
/// # Safety
/// AVX-512 (F, BW and VNNI) is there.
pub(super) unsafe fn multiply(bits: Bits, panel: Panel, rows: Brief, sums: &mut [[f32; LANES]]) {
    macro_rules! by_rows {
        ($four:literal, $($count:literal)*) => {
            match sums.len() {
                // SAFETY: as promised by the caller.
                $($count => unsafe { block::<$four, $count>(panel, rows, sums) },)*
                count => panic!("{count} rows at once"),
            }
        };
    }
    match bits {
        Bits::Four => by_rows!(true, 1 2 3 4 5 6 7 8),
        Bits::Eight => by_rows!(false, 1 2 3 4 5 6 7 8),
        Bits::Half | Bits::Brain => panic!("weights of 16 bits are no integers"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn block<const FOUR: bool, const ROWS: usize>(
    panel: Panel,
    rows: Brief,
    sums: &mut [[f32; LANES]],
) {
    let per = if FOUR { 8 } else { 4 };
    let groups = panel.lines.len().div_ceil(panel.per_group);
    assert!(sums.len() == ROWS && rows.bytes.len() == ROWS * rows.stride);
    assert!(panel.lines.len() * per <= rows.stride && groups <= rows.groups);
    let bits = if FOUR { Bits::Four } else { Bits::Eight };
    let high = offset(bits, panel.zeros.is_some());
    let mut x: [*const i8; ROWS] =
        std::array::from_fn(|row| rows.bytes[row * rows.stride..].as_ptr());
    let mut totals = [_mm512_setzero_ps(); ROWS];
    let low = _mm512_set1_epi8(15);
    let flip = _mm512_set1_epi8(i8::MIN);
    for (group, lines) in panel.lines.chunks(panel.per_group).enumerate() {
        let mut even = [_mm512_setzero_si512(); ROWS];
        let mut odd = [_mm512_setzero_si512(); ROWS];
        let four = |x: *const i8| {
            // SAFETY: callers stay within the rows, which hold `per` bytes for each line, as checked above.
            unsafe { _mm512_set1_epi32(x.cast::<i32>().read_unaligned()) }
        };
        if FOUR {
            for Line(words) in lines {
                // SAFETY: a line is 64 bytes; pointers move as far as the line is long.
                unsafe {
                    let words = _mm512_load_si512(words.as_ptr().cast());
                    let first = _mm512_and_si512(words, low);
                    let second = _mm512_and_si512(_mm512_srli_epi32::<4>(words), low);
                    for row in 0..ROWS {
                        even[row] = _mm512_dpbusd_epi32(even[row], first, four(x[row]));
                        odd[row] = _mm512_dpbusd_epi32(odd[row], second, four(x[row].add(4)));
                        x[row] = x[row].add(per);
                    }
                }
            }
        } else {
            // In pairs, so that either sum has a place of its own.
            for pair in lines.chunks(2) {
                for (Line(words), sums) in pair.iter().zip([&mut even, &mut odd]) {
                    // SAFETY: as above.
                    unsafe {
                        // The instruction wants unsigned bytes on one side.
                        let words = _mm512_load_si512(words.as_ptr().cast());
                        let words = _mm512_xor_si512(words, flip);
                        for row in 0..ROWS {
                            sums[row] = _mm512_dpbusd_epi32(sums[row], words, four(x[row]));
                            x[row] = x[row].add(per);
                        }
                    }
                }
            }
        }
        let scale = halves(panel.scales, group);
        for row in 0..ROWS {
            let (factor, sum) = (
                rows.factors[row * rows.groups + group],
                rows.sums[row * rows.groups + group],
            );
            let all = _mm512_add_epi32(even[row], odd[row]);
            let all = _mm512_cvtepi32_ps(_mm512_sub_epi32(all, _mm512_set1_epi32(high * sum)));
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(factor));
            // Rounded twice, as without these instructions.
            totals[row] = _mm512_add_ps(_mm512_mul_ps(all, scale), totals[row]);
            if let Some(zeros) = panel.zeros {
                let part = _mm512_set1_ps(factor * sum as f32);
                let part = _mm512_mul_ps(halves(zeros, group), part);
                totals[row] = _mm512_add_ps(part, totals[row]);
            }
        }
    }
    for (to, total) in sums.iter_mut().zip(totals) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), total) };
    }
}
