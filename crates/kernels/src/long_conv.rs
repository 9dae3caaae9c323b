//! Causal convolutions as long as the sequences themselves: `y_t = sum_{l <= t} k_l x_{t-l}` for each channel.
//!
//! What a linear system with fixed dynamics does (state spaces, Legendre memories; Gu et al., 2022, arXiv 2111.00396, section
//! 2.4). Sequences of more than [`DIRECT`] tokens go through the Fourier transform of twice their length (Cooley and Tukey,
//! 1965; the `realfft` crate, which chooses its instructions itself), shorter ones through the sum as it stands, vectorised
//! over the channels. Time grows as `n log n`.
//!
//! `x` and `y` are `[time, channels]`, packed sequences one after the other; the kernel is `[channels, taps]`: taps past a
//! sequence's length are not used, and past the last tap the kernel is zero. A channel's values do not depend on threads.
#![allow(unsafe_code)]

use std::collections::BTreeMap;

use rayon::prelude::*;
use realfft::num_complex::Complex;

use crate::disjoint::Disjoint;
use crate::fourier::{Plan, Work, plan};
use crate::simd::dispatched;
use crate::transpose::transpose;

#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

/// The longest sequence whose sum is taken as it stands. By count of operations (64 multiply-adds for each token and channel against
/// two transforms), not by measurement yet: `anyformer bench --ops --only long_conv` has the lengths around it.
const DIRECT: usize = 64;
/// Channels that are worked on at once: a line of the cache.
const WIDTH: usize = 16;
/// Tokens that are moved between the two layouts at once.
const TILE: usize = 64;

/// Where sequences lie and how many channels and taps there are.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Cumulative lengths of the sequences, from 0.
    pub offsets: &'a [usize],
    /// Channels.
    pub channels: usize,
    /// Taps of a channel's kernel.
    pub taps: usize,
}

/// `y = k * x` within each sequence.
///
/// Panics when lengths do not fit.
pub fn forward(p: Problem, x: &[f32], kernel: &[f32]) -> Vec<f32> {
    forward_above(DIRECT, p, x, kernel)
}

/// As [`forward`], sequences of up to `direct` tokens by the sum as it stands.
fn forward_above(direct: usize, p: Problem, x: &[f32], kernel: &[f32]) -> Vec<f32> {
    p.check(&[x.len()], kernel.len());
    let mut y = vec![0.0; x.len()];
    let out = Disjoint::new(&mut y);
    let (groups, longest) = (p.groups(direct), p.longest_up_to(direct));
    p.each_block(|block| {
        let mut lines = vec![0.0; WIDTH * longest];
        let taps = block.taps(kernel, direct);
        for (start, time) in p.sequences() {
            if time <= direct {
                let lines = &mut lines[..WIDTH * time];
                direct_sum(&block.lines(x, start, time), &taps, lines, false);
                block.put(&out, start, lines);
            }
        }
        for (plan, members) in &groups {
            let mut work = Work::new(plan);
            let used = p.used(members);
            let responses = block.spectra(&mut work, kernel, used);
            let mut rows = vec![0.0; block.width * plan.size];
            for &(start, time) in members {
                block.rows(x, start, time, &mut rows, plan.size);
                for (row, response) in rows.chunks_mut(plan.size).zip(&responses) {
                    work.transform(row);
                    for (value, response) in work.spectrum.iter_mut().zip(response) {
                        *value *= response;
                    }
                    work.back(row);
                }
                block.put_rows(&out, start, time, &rows, plan.size);
            }
        }
    });
    y
}

/// Gradients of `x` and of the kernel.
pub fn backward(p: Problem, x: &[f32], kernel: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    backward_above(DIRECT, p, x, kernel, dy)
}

/// As [`backward`], sequences of up to `direct` tokens by the sum as it stands.
fn backward_above(
    direct: usize,
    p: Problem,
    x: &[f32],
    kernel: &[f32],
    dy: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    p.check(&[x.len(), dy.len()], kernel.len());
    let (mut dx, mut dkernel) = (vec![0.0; x.len()], vec![0.0; kernel.len()]);
    let (dx_out, dkernel_out) = (Disjoint::new(&mut dx), Disjoint::new(&mut dkernel));
    let (groups, longest) = (p.groups(direct), p.longest_up_to(direct));
    p.each_block(|block| {
        let mut lines = vec![0.0; WIDTH * longest];
        let taps = block.taps(kernel, direct);
        let mut dtaps = vec![0.0; taps.len()];
        // SAFETY: the rows of the kernel's gradient of this block's channels.
        let own = unsafe { dkernel_out.part(block.first * p.taps, block.width * p.taps) };
        for (start, time) in p.sequences() {
            if time <= direct {
                let (x, dy) = (block.lines(x, start, time), block.lines(dy, start, time));
                let lines = &mut lines[..WIDTH * time];
                direct_sum(&dy, &taps, lines, true);
                block.put(&dx_out, start, lines);
                direct_taps(&x, &dy, &mut dtaps);
            }
        }
        for (l, line) in dtaps.chunks_exact(WIDTH).enumerate() {
            for (c, value) in line[..block.width].iter().enumerate() {
                own[c * p.taps + l] += value;
            }
        }
        for (plan, members) in &groups {
            let mut work = Work::new(plan);
            let used = p.used(members);
            let responses = block.spectra(&mut work, kernel, used);
            let none = Complex::new(0.0, 0.0);
            let mut sums = vec![vec![none; plan.size / 2 + 1]; block.width];
            let mut rows = vec![0.0; block.width * plan.size];
            let mut gradients = vec![0.0; block.width * plan.size];
            for &(start, time) in members {
                block.rows(x, start, time, &mut rows, plan.size);
                block.rows(dy, start, time, &mut gradients, plan.size);
                let channels = rows.chunks_mut(plan.size).zip(&mut sums);
                let gradients_of = gradients.chunks_mut(plan.size).zip(&responses);
                for ((row, sum), (gradient, response)) in channels.zip(gradients_of) {
                    work.transform(row);
                    std::mem::swap(&mut work.spectrum, &mut work.other);
                    work.transform(gradient);
                    let pairs = work.spectrum.iter_mut().zip(&work.other);
                    for ((dy, x), (sum, response)) in pairs.zip(sum.iter_mut().zip(response)) {
                        *sum += *dy * x.conj();
                        *dy *= response.conj();
                    }
                    work.back(gradient);
                }
                block.put_rows(&dx_out, start, time, &gradients, plan.size);
            }
            let row = &mut rows[..plan.size];
            for (sum, own) in sums.iter().zip(own.chunks_mut(p.taps)) {
                for (value, sum) in work.spectrum.iter_mut().zip(sum) {
                    *value = sum * plan.scale();
                }
                work.back(row);
                for (own, value) in own[..used].iter_mut().zip(&*row) {
                    *own += value;
                }
            }
        }
    });
    (dx, dkernel)
}

/// Operations of the forward and of the backward pass, a transform of n values counted as `2.5 n log2 n`.
pub fn flops(p: Problem) -> [u64; 2] {
    let mut totals = [0; 2];
    for (_, time) in p.sequences() {
        let (one, both) = match time <= DIRECT {
            true => {
                let pairs = (0..time).map(|t| (t + 1).min(p.taps) as u64).sum::<u64>();
                (2 * pairs, 4 * pairs)
            }
            false => {
                let size = fast_size(time + p.taps.min(time)) as f64;
                let transform = (2.5 * size * size.log2()) as u64;
                (2 * transform, 3 * transform)
            }
        };
        totals[0] += one * p.channels as u64;
        totals[1] += both * p.channels as u64;
    }
    totals
}

impl<'a> Problem<'a> {
    fn check(&self, values: &[usize], kernel: usize) {
        let rows = self.offsets.last().copied().unwrap_or(0);
        assert!(
            self.offsets.is_sorted() && self.offsets.first().is_none_or(|first| *first == 0),
            "long convolution: cumulative lengths {:?}",
            self.offsets
        );
        for length in values {
            assert_eq!(
                *length,
                rows * self.channels,
                "long convolution: {rows} rows of {} channels",
                self.channels
            );
        }
        assert_eq!(
            kernel,
            self.channels * self.taps,
            "long convolution: a kernel of {} channels and {} taps",
            self.channels,
            self.taps
        );
    }

    /// First row and length of every sequence that is not empty.
    fn sequences(&self) -> impl Iterator<Item = (usize, usize)> + use<'a> {
        let all = self
            .offsets
            .windows(2)
            .map(|pair| (pair[0], pair[1] - pair[0]));
        all.filter(|(_, time)| *time > 0)
    }

    fn longest_up_to(&self, direct: usize) -> usize {
        let short = self.sequences().map(|(_, time)| time);
        short.filter(|time| *time <= direct).max().unwrap_or(0)
    }

    /// The sequences of more than `direct` tokens by the size of their transforms.
    fn groups(&self, direct: usize) -> Vec<(Plan, Vec<(usize, usize)>)> {
        let mut sizes: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
        for (start, time) in self.sequences().filter(|(_, time)| *time > direct) {
            let size = fast_size(time + self.taps.min(time));
            sizes.entry(size).or_default().push((start, time));
        }
        let groups = sizes.into_iter();
        groups
            .map(|(size, members)| (plan(size), members))
            .collect()
    }

    /// Taps that the longest of these sequences uses. Those after a shorter one's end do not reach its tokens: the size of its
    /// transform holds both.
    fn used(&self, members: &[(usize, usize)]) -> usize {
        let longest = members.iter().map(|(_, time)| *time).max().unwrap_or(0);
        longest.min(self.taps)
    }

    fn each_block(&self, work: impl Fn(Block) + Send + Sync) {
        if self.taps == 0 || self.sequences().next().is_none() {
            return;
        }
        let blocks = (0..self.channels).step_by(WIDTH).map(|first| Block {
            first,
            width: WIDTH.min(self.channels - first),
            channels: self.channels,
            taps: self.taps,
        });
        let blocks: Vec<Block> = blocks.collect();
        blocks.into_par_iter().with_max_len(1).for_each(work);
    }
}

/// The smallest of 2^k and 3 2^k, k at least 1, that holds `least` values: nothing that wraps around reaches a wanted value.
fn fast_size(least: usize) -> usize {
    let power = least.next_power_of_two().max(4);
    match power / 4 * 3 >= least && power >= 8 {
        true => power / 4 * 3,
        false => power,
    }
}

/// Neighbouring channels that one task works on.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    width: usize,
    channels: usize,
    taps: usize,
}

impl Block {
    /// `[time, WIDTH]` of a sequence; channels that are not there are zero.
    fn lines(&self, x: &[f32], start: usize, time: usize) -> Vec<f32> {
        let mut lines = vec![0.0; WIDTH * time];
        for (t, line) in lines.chunks_exact_mut(WIDTH).enumerate() {
            let from = (start + t) * self.channels + self.first;
            line[..self.width].copy_from_slice(&x[from..from + self.width]);
        }
        lines
    }

    /// The first `count` taps as `[taps, WIDTH]`.
    fn taps(&self, kernel: &[f32], count: usize) -> Vec<f32> {
        let count = count.min(self.taps);
        let mut lines = vec![0.0; WIDTH * count];
        let own = &kernel[self.first * self.taps..][..self.width * self.taps];
        transpose([self.width, count], 1.0, own, self.taps, &mut lines, WIDTH);
        lines
    }

    /// Writes lines back.
    fn put(&self, out: &Disjoint, start: usize, lines: &[f32]) {
        for (t, line) in lines.chunks_exact(WIDTH).enumerate() {
            // SAFETY: this block's channels of one token; no other task writes them.
            let to = unsafe { out.part((start + t) * self.channels + self.first, self.width) };
            to.copy_from_slice(&line[..self.width]);
        }
    }

    /// `[width, size]` of a sequence, zero after its end.
    fn rows(&self, x: &[f32], start: usize, time: usize, rows: &mut [f32], size: usize) {
        let from = &x[start * self.channels + self.first..];
        transpose([time, self.width], 1.0, from, self.channels, rows, size);
        for row in rows.chunks_exact_mut(size) {
            row[time..].fill(0.0);
        }
    }

    /// Writes rows back.
    fn put_rows(&self, out: &Disjoint, start: usize, time: usize, rows: &[f32], size: usize) {
        let mut tile = [0.0; TILE * WIDTH];
        for at in (0..time).step_by(TILE) {
            let count = TILE.min(time - at);
            transpose(
                [self.width, count],
                1.0,
                &rows[at..],
                size,
                &mut tile,
                WIDTH,
            );
            self.put(out, start + at, &tile[..count * WIDTH]);
        }
    }

    /// The spectra of the channels' first `used` taps, with the scale of the transform back.
    fn spectra(&self, work: &mut Work, kernel: &[f32], used: usize) -> Vec<Vec<Complex<f32>>> {
        let (size, scale) = (work.plan.size, work.plan.scale());
        let mut row = vec![0.0; size];
        let channels = self.first..self.first + self.width;
        let spectrum = |channel: usize| {
            let taps = &kernel[channel * self.taps..][..used];
            row[..taps.len()].copy_from_slice(taps);
            row[taps.len()..].fill(0.0);
            work.transform(&mut row);
            work.spectrum.iter().map(|value| value * scale).collect()
        };
        channels.map(spectrum).collect()
    }
}

dispatched! {
    /// `y_t = sum_l k_l x_{t-l}`, or with `back` its adjoint `y_t = sum_l k_l x_{t+l}`; all `[.., WIDTH]`.
    fn direct_sum<'a>(x: &'a [f32], taps: &'a [f32], y: &'a mut [f32], back: bool) {
        let time = x.len() / WIDTH;
        let (x, _) = x.as_chunks::<WIDTH>();
        let (taps, _) = taps.as_chunks::<WIDTH>();
        let (y, _) = y.as_chunks_mut::<WIDTH>();
        for t in 0..time {
            let reach = if back { time - t } else { t + 1 };
            let mut sum = [0.0f32; WIDTH];
            for (l, tap) in taps.iter().take(reach).enumerate() {
                let line = if back { &x[t + l] } else { &x[t - l] };
                for c in 0..WIDTH {
                    sum[c] = tap[c].mul_add(line[c], sum[c]);
                }
            }
            y[t] = sum;
        }
    }
}

dispatched! {
    /// `dk_l += sum_t dy_t x_{t-l}`.
    fn direct_taps<'a>(x: &'a [f32], dy: &'a [f32], dtaps: &'a mut [f32]) {
        let (x, _) = x.as_chunks::<WIDTH>();
        let (dy, _) = dy.as_chunks::<WIDTH>();
        let (dtaps, _) = dtaps.as_chunks_mut::<WIDTH>();
        for (l, tap) in dtaps.iter_mut().take(x.len()).enumerate() {
            let mut sum = *tap;
            for (x, dy) in x.iter().zip(&dy[l..]) {
                for c in 0..WIDTH {
                    sum[c] = x[c].mul_add(dy[c], sum[c]);
                }
            }
            *tap = sum;
        }
    }
}
