//! Products of 8 bits on both sides.

use super::{LANES, Level, Packed, ROWS, each_block, portable};

/// Each row of `x [m, stride]` in -127..=127 with the scale of the row: the nearest number, ties to even.
pub(super) fn rounded(x: &[f32], stride: usize) -> (Vec<i8>, Vec<f32>) {
    let mut bytes = Vec::with_capacity(x.len());
    let mut scales = Vec::with_capacity(x.len() / stride);
    for row in x.chunks_exact(stride) {
        let largest = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        // A row of zeros stays one; what is no number becomes one of the range.
        let up = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        bytes.extend(row.iter().map(|value| (value * up).round_ties_even() as i8));
        scales.push(largest / 127.0);
    }
    (bytes, scales)
}

/// `x Wᵀ + bias` for prepared `x [m, stride]`, both sides of 8 bits.
pub(super) fn multiply(
    level: Level,
    x: &[f32],
    stride: usize,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (bytes, factors) = rounded(x, stride);
    let (m, groups) = (factors.len(), weight.groups());
    // What the flipped sign bit of the weights adds to the sums, of every row and group.
    let added: Vec<i32> = match level {
        Level::Portable => Vec::new(),
        Level::Avx512 => bytes
            .chunks_exact(stride)
            .flat_map(|row| row.chunks(weight.group).take(groups))
            .map(|group| 128 * group.iter().map(|byte| i32::from(*byte)).sum::<i32>())
            .collect(),
    };
    each_block(weight, m, bias, out, |panel, block, totals| {
        let bytes = &bytes[block.start * stride..block.end * stride];
        for (group, lines) in panel.lines.chunks(panel.per_group).enumerate() {
            let mut sums = [[0i32; LANES]; ROWS];
            let (sums, word) = (&mut sums[..block.len()], group * panel.per_group);
            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the level was checked to run on this machine.
                Level::Avx512 => unsafe {
                    super::wide::integers(lines, bytes, stride, word, sums);
                },
                #[cfg(not(target_arch = "x86_64"))]
                Level::Avx512 => unreachable!("levels are checked"),
                Level::Portable => portable::integers(lines, bytes, stride, word, sums),
            }
            let scales = &panel.scales[group * LANES..][..LANES];
            for ((at, total), sums) in block.clone().zip(totals.iter_mut()).zip(sums) {
                let added = added.get(at * groups + group).copied().unwrap_or(0);
                for lane in 0..LANES {
                    let scale = scales[lane].to_f32() * factors[at];
                    total[lane] += (sums[lane] - added) as f32 * scale;
                }
            }
        }
    });
}
