//! A depthwise convolution around each token, of any odd width, groups of channels sharing their taps (the convolution over the
//! values of Nystromformer, arXiv 2102.03902).
//!
//! `y[t, c] = sum_j weight[group of c, j] x[t - width / 2 + j, c]`; nothing crosses a sequence boundary. Shapes: x and y
//! `[total, channels]`, weight `[groups, width]`.

use rayon::prelude::*;

use super::{ROWS, Segment, cut, segments, transposed};
use crate::simd::{add_partials, dispatched};

/// The arguments.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// `[total, channels]`.
    pub x: &'a [f32],
    /// `[groups, width]`.
    pub weight: &'a [f32],
    /// Cumulative lengths of the packed sequences.
    pub offsets: &'a [usize],
    /// Channels.
    pub channels: usize,
    /// Groups; divides the channels.
    pub groups: usize,
}

impl Around<'_> {
    fn width(&self) -> usize {
        self.weight.len() / self.groups
    }

    fn check(&self) {
        assert!(
            self.groups > 0 && self.channels > 0 && self.channels.is_multiple_of(self.groups),
            "conv groups"
        );
        assert!(
            self.weight.len().is_multiple_of(self.groups) && !self.width().is_multiple_of(2),
            "conv around: {} taps for {} groups",
            self.weight.len(),
            self.groups
        );
        let total = self.offsets[self.offsets.len() - 1];
        assert_eq!(self.x.len(), total * self.channels, "conv x");
    }

    /// The taps of each channel, `[width, channels]`, in their order or from the last to the first.
    fn taps(&self, backwards: bool) -> Vec<f32> {
        let turned = transposed(self.weight, self.groups, self.width());
        let size = self.channels / self.groups;
        let rows = turned.chunks_exact(self.groups);
        let spread = |row: &[f32]| -> Vec<f32> {
            row.iter()
                .flat_map(|tap| std::iter::repeat_n(*tap, size))
                .collect()
        };
        match backwards {
            true => rows.rev().flat_map(spread).collect(),
            false => rows.flat_map(spread).collect(),
        }
    }

    /// First row of a segment's sequence, and the row after its last.
    fn ends(&self, segment: Segment) -> [usize; 2] {
        [segment.sequence, segment.sequence + 1].map(|at| self.offsets[at])
    }

    /// The convolution of `x` with `taps`.
    fn convolve(&self, x: &[f32], taps: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        let tasks = cut(&segments(self.offsets), self.channels, &mut y);
        tasks.into_par_iter().for_each(|(segment, y)| {
            rows(segment, self.ends(segment), self.channels, taps, x, y);
        });
        y
    }

    /// The outputs.
    pub fn forward(&self) -> Vec<f32> {
        self.check();
        self.convolve(self.x, &self.taps(false))
    }

    /// Gradients of x and of the weight.
    pub fn backward(&self, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        self.check();
        assert_eq!(dy.len(), self.x.len(), "conv dy");
        let dx = self.convolve(dy, &self.taps(true));
        let (width, size) = (self.width(), self.channels / self.groups);
        let all = segments(self.offsets);
        let partials: Vec<Vec<f32>> = all
            .par_chunks(all.len().div_ceil(PARTIALS).max(1))
            .map(|some| {
                let mut sums = vec![0.0; width * self.channels];
                for segment in some {
                    let ends = self.ends(*segment);
                    weights(*segment, ends, self.channels, self.x, dy, &mut sums);
                }
                sums
            })
            .collect();
        let mut sums = vec![0.0; width * self.channels];
        add_partials(&mut sums, &partials);
        let mut dweight = vec![0.0; self.weight.len()];
        for (tap, row) in sums.chunks_exact(self.channels).enumerate() {
            for (group, part) in row.chunks_exact(size).enumerate() {
                dweight[group * width + tap] = part.iter().sum();
            }
        }
        (dx, dweight)
    }
}

/// Most partial sums of the gradient of the weight.
const PARTIALS: usize = 16;

/// The taps that fall within a sequence at `row`, and where the first of them reads.
#[inline(always)]
fn inside(row: usize, width: usize, [start, end]: [usize; 2]) -> (std::ops::Range<usize>, usize) {
    let half = width / 2;
    let first = (start + half).saturating_sub(row);
    let last = width.min(end + half - row);
    (first..last, row + first - half)
}

dispatched! {
    /// The outputs of a segment.
    fn rows<'a>(
        segment: Segment,
        ends: [usize; 2],
        channels: usize,
        taps: &'a [f32],
        x: &'a [f32],
        y: &'a mut [f32],
    ) {
        let width = taps.len() / channels;
        debug_assert!(segment.to - segment.from <= ROWS);
        for (row, y) in (segment.from..segment.to).zip(y.chunks_exact_mut(channels)) {
            let (seen, from) = inside(row, width, ends);
            let taps = taps[seen.start * channels..seen.end * channels].chunks_exact(channels);
            let seen = x[from * channels..].chunks_exact(channels);
            for (taps, x) in taps.zip(seen) {
                for c in 0..channels {
                    y[c] = taps[c].mul_add(x[c], y[c]);
                }
            }
        }
    }
}

dispatched! {
    /// Adds what a segment brings to the gradients of the taps `[width, channels]`.
    fn weights<'a>(
        segment: Segment,
        ends: [usize; 2],
        channels: usize,
        x: &'a [f32],
        dy: &'a [f32],
        sums: &'a mut [f32],
    ) {
        let width = sums.len() / channels;
        for row in segment.from..segment.to {
            let (seen, from) = inside(row, width, ends);
            let dy = &dy[row * channels..][..channels];
            let sums = sums[seen.start * channels..seen.end * channels].chunks_exact_mut(channels);
            let seen = x[from * channels..].chunks_exact(channels);
            for (sums, x) in sums.zip(seen) {
                for c in 0..channels {
                    sums[c] = dy[c].mul_add(x[c], sums[c]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    #[test]
    fn outputs_and_gradients_match_the_equation() {
        for (groups, width) in [(1, 1), (2, 3), (3, 7), (6, 9)] {
            let (channels, offsets) = (6, [0, 1, 1, 6, 8]);
            let (x, weight) = (rand_vec(1, 8 * channels), rand_vec(2, groups * width));
            let dy = rand_vec(3, x.len());
            let (want, grads) = differences(&[&x, &weight], &dy, |v| {
                let mut y = vec![0.0; v[0].len()];
                for ends in offsets.windows(2) {
                    for t in ends[0]..ends[1] {
                        for c in 0..channels {
                            let group = c / (channels / groups);
                            for j in 0..width {
                                let at = t + j;
                                if at >= ends[0] + width / 2 && at < ends[1] + width / 2 {
                                    y[t * channels + c] += v[1][group * width + j]
                                        * v[0][(at - width / 2) * channels + c];
                                }
                            }
                        }
                    }
                }
                y
            });
            let around = Around {
                x: &x,
                weight: &weight,
                offsets: &offsets,
                channels,
                groups,
            };
            assert_close("y", &around.forward(), &want, 2e-6);
            let (dx, dweight) = around.backward(&dy);
            assert_close("dx", &dx, &grads[0], 2e-5);
            assert_close("dweight", &dweight, &grads[1], 2e-5);
        }
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[outputs_and_gradients_match_the_equation]);
    }
}
