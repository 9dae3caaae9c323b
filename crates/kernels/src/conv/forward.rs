//! The forward pass: rows in parallel, channels in the lanes.

use rayon::prelude::*;

use super::{Conv, Rows, Segment, cut, segments, transposed, with_width};
use crate::math::sigmoid;
use crate::simd::dispatched;

/// Computes `(y, final_state)`.
pub fn forward(conv: &Conv) -> (Vec<f32>, Vec<f32>) {
    conv.check();
    let weight = transposed(conv.weight, conv.channels, conv.width);
    let rows = Rows::new(conv);
    let mut y = vec![0.0; conv.x.len()];
    let tasks = cut(&segments(conv.offsets), conv.channels, &mut y);
    tasks.into_par_iter().for_each(|(segment, y)| {
        outputs(conv, &rows, &weight, segment, y);
    });
    (y, last_inputs(conv, &rows))
}

dispatched! {
    /// The rows of a segment.
    fn outputs<'a>(
        conv: &'a Conv<'a>,
        rows: &'a Rows<'a>,
        weight: &'a [f32],
        segment: Segment,
        y: &'a mut [f32],
    ) {
        for (row, y) in (segment.from..segment.to).zip(y.chunks_exact_mut(conv.channels)) {
            with_width!(conv.width, W => {
                sums(rows.taps::<W>(segment.sequence, row), weight, conv.bias, y)
            });
            if conv.silu {
                for z in y {
                    *z *= sigmoid(*z);
                }
            }
        }
    }
}

/// `y[c] = bias[c] + sum_j weight[j, c] taps[j][c]`.
#[inline(always)]
pub(super) fn sums<const W: usize>(
    taps: [&[f32]; W],
    weight: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let channels = y.len();
    let taps = taps.map(|tap| &tap[..channels]);
    let weight: [&[f32]; W] = std::array::from_fn(|j| &weight[j * channels..][..channels]);
    match bias {
        Some(bias) => y.copy_from_slice(bias),
        None => y.fill(0.0),
    }
    for c in 0..channels {
        let mut sum = y[c];
        for j in 0..W {
            sum = weight[j][c].mul_add(taps[j][c], sum);
        }
        y[c] = sum;
    }
}

fn last_inputs(conv: &Conv, rows: &Rows) -> Vec<f32> {
    let held = conv.width - 1;
    let mut last = vec![0.0; conv.sequences() * conv.channels * held];
    if held == 0 {
        return last;
    }
    for (sequence, state) in last.chunks_exact_mut(conv.channels * held).enumerate() {
        let end = conv.offsets[sequence + 1];
        for k in 0..held {
            let row = rows.before(sequence, end, held - k);
            for c in 0..conv.channels {
                state[c * held + k] = row[c];
            }
        }
    }
    last
}
