//! Brain floats: the upper half of an f32.

use crate::simd::dispatched;

/// Values as they are held.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Held<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}

impl Held<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Held::F32(values) => values.len(),
            Held::Bf16(values) => values.len(),
        }
    }
}

/// `value` rounded to the nearest bf16, ties to even, NaN kept.
#[inline(always)]
pub fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    match value.is_nan() {
        true => ((bits >> 16) | 0x40) as u16,
        false => rounded as u16,
    }
}

/// The same number as f32.
#[inline(always)]
pub fn to_f32(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

dispatched! {
    /// All values of `from` as f32.
    pub fn widen<'a>(from: &'a [u16], to: &'a mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = to_f32(*from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_the_nearest_and_ties_to_even() {
        for (value, want) in [
            (1.0, 1.0),
            (1.0 + 1.0 / 256.0, 1.0),
            (1.0 + 3.0 / 256.0, 1.015_625),
            (1.004, 1.007_812_5),
            (-0.0, -0.0),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
        ] {
            let got = to_f32(round(value));
            assert!(
                got == want && got.is_sign_negative() == want.is_sign_negative(),
                "{value}: {got}"
            );
        }
        assert!(
            to_f32(round(f32::NAN)).is_nan() && to_f32(round(f32::from_bits(0x7f80_0001))).is_nan()
        );
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let mut wide = vec![0.0; all.len()];
        widen(&all, &mut wide);
        assert!(
            all.iter()
                .zip(&wide)
                .all(|(half, wide)| wide.is_nan() || round(*wide) == *half)
        );
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[rounds_to_the_nearest_and_ties_to_even]);
    }
}
