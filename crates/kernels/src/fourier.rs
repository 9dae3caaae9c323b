//! Fourier transforms of real values by the `realfft` crate, and the real part of one over both dimensions of a sequence.
//!
//! `y[t][d] = sum_se x[s][e] cos(2 pi (t s / time + d e / dim))` (FNet, Lee-Thorp et al., 2022, arXiv 2105.03824) is `Re(F_time(F_dim(x)))`.
//! Over time first: channels are real, so half of the spectrum is enough. Its real and imaginary parts are again rows of real
//! values, with spectra R and I over the features: `y[t][d] = Re R[d] - Im I[d]`, and `y[t][dim - d]` has the plus sign. The other
//! half of the tokens is `y[time - t][dim - d] = y[t][d]`. The map is symmetric: it is its own gradient.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

use crate::disjoint::Disjoint;
use crate::transpose::transpose;

/// The transforms of one size.
#[derive(Clone)]
pub(crate) struct Plan {
    /// Values.
    pub(crate) size: usize,
    there: Arc<dyn RealToComplex<f32>>,
    back: Arc<dyn ComplexToReal<f32>>,
}

impl Plan {
    /// What a transform there and back has to be multiplied with.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / self.size as f32
    }
}

/// Most sizes that are kept.
const KEPT: usize = 256;

static PLANS: Mutex<BTreeMap<usize, Plan>> = Mutex::new(BTreeMap::new());

/// The transforms of a size, made once.
pub(crate) fn plan(size: usize) -> Plan {
    let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        let mut planner = RealFftPlanner::new();
        Plan {
            size,
            there: planner.plan_fft_forward(size),
            back: planner.plan_fft_inverse(size),
        }
    };
    if plans.len() >= KEPT && !plans.contains_key(&size) {
        plans.clear();
    }
    plans.entry(size).or_insert_with(make).clone()
}

/// Buffers of the transforms of one task.
pub(crate) struct Work {
    pub(crate) plan: Plan,
    /// Of the last transform.
    pub(crate) spectrum: Vec<Complex<f32>>,
    /// As much room again.
    pub(crate) other: Vec<Complex<f32>>,
    scratch: Vec<Complex<f32>>,
}

impl Work {
    /// Room for transforms of this plan.
    pub(crate) fn new(plan: &Plan) -> Self {
        let scratch = plan
            .there
            .get_scratch_len()
            .max(plan.back.get_scratch_len());
        let none = Complex::new(0.0, 0.0);
        Work {
            plan: plan.clone(),
            spectrum: vec![none; plan.size / 2 + 1],
            other: vec![none; plan.size / 2 + 1],
            scratch: vec![none; scratch],
        }
    }

    /// From `row` to `spectrum`; `row` is used up.
    pub(crate) fn transform(&mut self, row: &mut [f32]) {
        let (spectrum, scratch) = (&mut self.spectrum, &mut self.scratch);
        let done = self.plan.there.process_with_scratch(row, spectrum, scratch);
        assert!(done.is_ok(), "a transform of {}: {done:?}", self.plan.size);
    }

    /// From `spectrum`, which is used up, to `row`.
    pub(crate) fn back(&mut self, row: &mut [f32]) {
        // Those two are real, but for rounding.
        let last = self.spectrum.len() - 1;
        self.spectrum[0].im = 0.0;
        self.spectrum[last].im = 0.0;
        let (spectrum, scratch) = (&mut self.spectrum, &mut self.scratch);
        let done = self.plan.back.process_with_scratch(spectrum, row, scratch);
        assert!(done.is_ok(), "a transform of {}: {done:?}", self.plan.size);
    }
}

/// Channels that one task transforms over time.
const WIDTH: usize = 16;
/// Tokens that one task transforms over the features.
const TOKENS: usize = 64;

/// `Re(F_time(F_dim(x)))` of every sequence: `x [batch, time, dim]`, all in one slice.
///
/// Panics when `x` has another size.
pub fn real_part(x: &[f32], [batch, time, dim]: [usize; 3]) -> Vec<f32> {
    assert_eq!(
        x.len(),
        batch * time * dim,
        "a transform of {batch} x {time} x {dim}"
    );
    let mut y = vec![0.0; x.len()];
    if !x.is_empty() {
        let sequences = x.par_chunks(time * dim).zip(y.par_chunks_mut(time * dim));
        sequences.for_each(|(x, y)| sequence(x, [time, dim], y));
    }
    y
}

/// Operations over a sequence, a transform of n values counted as `2.5 n log2 n`.
pub fn flops(time: usize, dim: usize) -> u64 {
    let of = |count: usize, size: usize| 2.5 * (count * size) as f64 * (size as f64).log2();
    (of(dim, time) + of(2 * (time / 2 + 1), dim)) as u64
}

/// Half of the spectrum over time of up to [`WIDTH`] channels: real and imaginary parts, `[half, width]` each.
fn over_time(x: &[f32], [time, dim]: [usize; 2], first: usize, plan: &Plan) -> [Vec<f32>; 2] {
    let (width, half) = (WIDTH.min(dim - first), time / 2 + 1);
    let mut rows = vec![0.0; width * time];
    transpose([time, width], 1.0, &x[first..], dim, &mut rows, time);
    let mut parts = [vec![0.0; width * half], vec![0.0; width * half]];
    let mut work = Work::new(plan);
    for (channel, row) in rows.chunks_exact_mut(time).enumerate() {
        work.transform(row);
        let own = channel * half..(channel + 1) * half;
        let [re, im] = &mut parts;
        let to = re[own.clone()].iter_mut().zip(&mut im[own]);
        for ((re, im), value) in to.zip(&work.spectrum) {
            (*re, *im) = (value.re, value.im);
        }
    }
    parts.map(|part| {
        let mut turned = vec![0.0; width * half];
        transpose([width, half], 1.0, &part, half, &mut turned, width);
        turned
    })
}

fn sequence(x: &[f32], [time, dim]: [usize; 2], y: &mut [f32]) {
    let (half, across) = (time / 2 + 1, plan(dim));
    let along = plan(time);
    let firsts: Vec<usize> = (0..dim).step_by(WIDTH).collect();
    let blocks: Vec<[Vec<f32>; 2]> = firsts
        .into_par_iter()
        .with_max_len(1)
        .map(|first| over_time(x, [time, dim], first, &along))
        .collect();
    let out = Disjoint::new(y);
    let some: Vec<usize> = (0..half).step_by(TOKENS).collect();
    some.into_par_iter().with_max_len(1).for_each(|from| {
        let mut work = Work::new(&across);
        let mut row = vec![0.0; dim];
        for t in from..(from + TOKENS).min(half) {
            let mut gather = |part: usize| {
                for (block, row) in blocks.iter().zip(row.chunks_mut(WIDTH)) {
                    row.copy_from_slice(&block[part][t * row.len()..][..row.len()]);
                }
                work.transform(&mut row);
                std::mem::swap(&mut work.spectrum, &mut work.other);
            };
            gather(1);
            gather(0);
            // The spectrum of the real parts, and that of the imaginary ones.
            let (re, im) = (&work.other, &work.spectrum);
            // SAFETY: row t is of this task, and so is its mirror image, which no other t has.
            let to = unsafe { out.part(t * dim, dim) };
            for (d, (re, im)) in re.iter().zip(im).enumerate() {
                to[d] = re.re - im.im;
                to[(dim - d) % dim] = re.re + im.im;
            }
            // The sum at 0 has no mirror image, nor has that in the middle.
            to[0] = re[0].re - im[0].im;
            if t > 0 && time - t >= half {
                // SAFETY: as above.
                let mirror = unsafe { out.part((time - t) * dim, dim) };
                mirror[0] = to[0];
                let reversed = to[1..].iter().rev();
                mirror[1..]
                    .iter_mut()
                    .zip(reversed)
                    .for_each(|(a, b)| *a = *b);
            }
        }
    });
}

#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

#[cfg(any(test, fuzzing))]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    fn naive(x: &[f32], [time, dim]: [usize; 2]) -> Vec<f32> {
        let turn = std::f64::consts::TAU;
        let mut y = Vec::new();
        for (t, d) in (0..time * dim).map(|at| (at / dim, at % dim)) {
            let sum = (0..time * dim).map(|at| {
                let (s, e) = (at / dim, at % dim);
                let angle = turn
                    * ((t * s % time) as f64 / time as f64 + (d * e % dim) as f64 / dim as f64);
                x[at] as f64 * angle.cos()
            });
            y.push(sum.sum::<f64>() as f32);
        }
        y
    }

    fn check(sizes: [usize; 3]) {
        let [batch, time, dim] = sizes;
        let x = rand_vec(1, batch * time * dim);
        let got = real_part(&x, sizes);
        for (x, got) in x.chunks(time * dim).zip(got.chunks(time * dim)) {
            let want = naive(x, [time, dim]);
            assert_close(&format!("{time} x {dim}"), got, &want, 2e-5);
        }
    }

    #[test]
    fn every_size_equals_the_sum() {
        for [time, dim] in [
            [1, 1],
            [1, 6],
            [7, 1],
            [2, 2],
            [5, 3],
            [8, 16],
            [13, 17],
            [150, 8],
            [129, 20],
        ] {
            check([2, time, dim]);
        }
        assert!(real_part(&[], [0, 4, 4]).is_empty());
    }

    /// A problem from bytes, against the sum.
    pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
        check([
            bytes.number(1, 3),
            bytes.length(70).max(1),
            bytes.number(1, 35),
        ]);
    }
}
