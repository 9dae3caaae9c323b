//! How the values of a tensor are written in a file, and how they become f32.
//!
//! The block formats are those of GGUF: a few bytes hold the scale (and for some the minimum) of 32 or 256 neighbours.

use half::{bf16, f16};
use safetensors::Dtype;

/// The encodings that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    F32,
    F16,
    BF16,
    /// Numbers of a quantised weight.
    I8,
    /// Pairs of numbers of a quantised weight.
    U8,
    /// 32 values: an f16 scale and as many i8.
    Q8_0,
    /// 32 values: an f16 scale and as many unsigned halves of bytes, 8 below zero.
    Q4_0,
    /// 32 values: an f16 scale, an f16 minimum, halves of bytes.
    Q4_1,
    /// 256 values: f16 scales of scales and minima, 8 of each in 6 bits, halves of bytes.
    Q4K,
    /// 256 values: lower halves, upper 2 bits, 16 i8 scales, an f16 scale of the scales.
    Q6K,
}

impl Encoding {
    pub(crate) fn of_safetensors(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Encoding::F32),
            Dtype::F16 => Some(Encoding::F16),
            Dtype::BF16 => Some(Encoding::BF16),
            Dtype::I8 => Some(Encoding::I8),
            Dtype::U8 => Some(Encoding::U8),
            _ => None,
        }
    }

    pub(crate) fn of_gguf(number: u32) -> Option<Self> {
        match number {
            0 => Some(Encoding::F32),
            1 => Some(Encoding::F16),
            2 => Some(Encoding::Q4_0),
            3 => Some(Encoding::Q4_1),
            8 => Some(Encoding::Q8_0),
            12 => Some(Encoding::Q4K),
            14 => Some(Encoding::Q6K),
            30 => Some(Encoding::BF16),
            _ => None,
        }
    }

    /// Values and bytes of the smallest piece that can be read alone.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Encoding::F32 => (1, 4),
            Encoding::F16 | Encoding::BF16 => (1, 2),
            Encoding::I8 | Encoding::U8 => (1, 1),
            Encoding::Q8_0 => (32, 34),
            Encoding::Q4_0 => (32, 18),
            Encoding::Q4_1 => (32, 20),
            Encoding::Q4K => (256, 144),
            Encoding::Q6K => (256, 210),
        }
    }

    /// Bytes of so many values, if they are whole blocks and can be counted.
    pub(crate) fn bytes(self, values: usize) -> Option<usize> {
        let (block, bytes) = self.block();
        match values.is_multiple_of(block) {
            true => (values / block).checked_mul(bytes),
            false => None,
        }
    }

    /// True of numbers that are no values by themselves.
    pub(crate) fn is_part(self) -> bool {
        matches!(self, Encoding::I8 | Encoding::U8)
    }

    /// Reads whole blocks of `bytes` into `values`, which must be as many.
    pub(crate) fn decode(self, bytes: &[u8], values: &mut [f32]) {
        let (count, size) = self.block();
        let blocks = bytes.chunks_exact(size).zip(values.chunks_exact_mut(count));
        match self {
            Encoding::F32 => {
                for (bytes, value) in blocks {
                    value[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
            Encoding::F16 => blocks.for_each(|(bytes, value)| value[0] = half(bytes, 0)),
            Encoding::BF16 => blocks.for_each(|(bytes, value)| {
                value[0] = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }),
            Encoding::I8 => {
                blocks.for_each(|(bytes, value)| value[0] = f32::from(bytes[0].cast_signed()));
            }
            Encoding::U8 => blocks.for_each(|(bytes, value)| value[0] = f32::from(bytes[0])),
            Encoding::Q8_0 => blocks.for_each(|(bytes, values)| {
                let scale = half(bytes, 0);
                for (value, byte) in values.iter_mut().zip(&bytes[2..]) {
                    *value = scale * f32::from(byte.cast_signed());
                }
            }),
            Encoding::Q4_0 => blocks.for_each(|(bytes, values)| {
                let scale = half(bytes, 0);
                halves(&bytes[2..], values, |q| scale * (q - 8.0));
            }),
            Encoding::Q4_1 => blocks.for_each(|(bytes, values)| {
                let (scale, low) = (half(bytes, 0), half(bytes, 2));
                halves(&bytes[4..], values, |q| scale * q + low);
            }),
            Encoding::Q4K => blocks.for_each(|(bytes, values)| q4k(bytes, values)),
            Encoding::Q6K => blocks.for_each(|(bytes, values)| q6k(bytes, values)),
        }
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The lower halves of the bytes give the first values, the upper halves the rest.
fn halves(bytes: &[u8], values: &mut [f32], value: impl Fn(f32) -> f32) {
    let (low, high) = values.split_at_mut(bytes.len());
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = value(f32::from(byte & 15));
        *high = value(f32::from(byte >> 4));
    }
}

fn q4k(bytes: &[u8], values: &mut [f32]) {
    let (scale, low) = (half(bytes, 0), half(bytes, 2));
    let (packed, quants) = bytes[4..].split_at(12);
    // Six bits each: the last four of either kind keep their upper two bits with the first four.
    let pair = |at: usize| match at < 4 {
        true => (packed[at] & 63, packed[at + 4] & 63),
        false => (
            packed[at + 4] & 15 | packed[at - 4] >> 6 << 4,
            packed[at + 4] >> 4 | packed[at] >> 6 << 4,
        ),
    };
    let parts = quants.chunks_exact(32).zip(values.chunks_exact_mut(64));
    for (part, (bytes, values)) in parts.enumerate() {
        let of = |at: usize| {
            let (factor, minimum) = pair(at);
            (scale * f32::from(factor), low * f32::from(minimum))
        };
        let (first, second) = (of(2 * part), of(2 * part + 1));
        for (at, byte) in bytes.iter().enumerate() {
            values[at] = first.0 * f32::from(byte & 15) - first.1;
            values[at + 32] = second.0 * f32::from(byte >> 4) - second.1;
        }
    }
}

fn q6k(bytes: &[u8], values: &mut [f32]) {
    let (lower, rest) = bytes.split_at(128);
    let (upper, rest) = rest.split_at(64);
    let scale = half(rest, 16);
    for (part, values) in values.chunks_exact_mut(128).enumerate() {
        let (lower, upper) = (&lower[64 * part..], &upper[32 * part..]);
        for (at, value) in values.iter_mut().enumerate() {
            let (quarter, within) = (at / 32, at % 32);
            let byte = lower[within + 32 * (quarter % 2)];
            let low = if quarter < 2 { byte & 15 } else { byte >> 4 };
            let high = upper[within] >> (2 * quarter) & 3;
            let factor = rest[8 * part + at / 16].cast_signed();
            *value = scale * f32::from(factor) * (f32::from(low | high << 4) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two blocks of made-up bytes; what the Python package gguf 0.19.0 (`quants.dequantize`) gives for them: the first two
    /// values, one behind the middle, the last, and the sum of every value times its place.
    #[test]
    fn blocks_give_the_values_of_the_reference() {
        let cases: &[(Encoding, &[usize], [f64; 5])] = &[
            (
                Encoding::Q8_0,
                &[0],
                [-5.6875, -1.125, 0.0, -6.2890625, -606.4140625],
            ),
            (
                Encoding::Q4_0,
                &[0],
                [-0.1875, 0.375, -0.0546875, -0.21875, -122.34375],
            ),
            (
                Encoding::Q4_1,
                &[0, 2],
                [0.78125, 0.34375, 0.02734375, 0.35546875, 849.0546875],
            ),
            (
                Encoding::Q4K,
                &[0, 2],
                [
                    25.09375,
                    17.59375,
                    -0.19140625,
                    20.86328125,
                    1788964.1328125,
                ],
            ),
            (
                Encoding::Q6K,
                &[208],
                [47.125, 6.5, 3.0625, 4.8671875, -385215.140625],
            ),
        ];
        for (encoding, scales, want) in cases {
            let (count, size) = encoding.block();
            let mut bytes: Vec<u8> = (0..2 * size)
                .map(|at| ((at * 73 + 19) % 251) as u8)
                .collect();
            for block in 0..2 {
                for (number, at) in scales.iter().enumerate() {
                    bytes[block * size + at] = 0;
                    bytes[block * size + at + 1] = (0x2c - 4 * number - block) as u8;
                }
            }
            let mut values = vec![0.0; 2 * count];
            encoding.decode(&bytes, &mut values);
            let places = values.iter().zip(1..);
            let sum: f64 = places
                .map(|(value, at)| f64::from(*value) * f64::from(at))
                .sum();
            let of = |at: usize| f64::from(values[at]);
            let got = [of(0), of(1), of(count + 5), of(2 * count - 1), sum];
            assert_eq!(got, *want, "{encoding:?}");
        }
    }
}
