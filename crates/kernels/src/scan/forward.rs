//! The forward pass.

use std::ops::Range;

use rayon::prelude::*;

use super::{CHUNK, LANES, Lanes, Scan, Task, flops, step};
use crate::disjoint::Disjoint;
use crate::math::{exp, softplus};
use crate::simd::{PARALLEL_FLOPS, dispatched};

/// What [`forward`] gives.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[total, channels]`.
    pub y: Vec<f32>,
    /// States at the start of every chunk, in the layout of [`super::backward`]; empty unless asked for.
    pub saved: Vec<f32>,
}

/// Computes the outputs, with what the backward pass needs where `save` is set. `last`, the final states `[sequences,
/// channels, state]`, is overwritten; nothing in it is read before.
pub fn forward(scan: &Scan, save: bool, last: &mut [f32]) -> Output {
    scan.check();
    let (blocks, state) = (scan.blocks(), scan.state);
    let tasks = scan.tasks();
    let brief = |task: &Task| !save && step::fits(scan.state, task.rows.len());
    let a = match tasks.iter().all(brief) {
        true => vec![],
        false => scan.blocked(scan.a),
    };
    let before = scan.chunks_before();
    let chunks = if save { before[scan.sequences()] } else { 0 };
    let mut y = vec![0.0; scan.u.len()];
    let mut saved = vec![0.0; chunks * blocks * state * LANES];
    let (shared_y, shared_saved) = (Disjoint::new(&mut y), Disjoint::new(&mut saved));
    let size = scan.channels * state;
    assert_eq!(last.len(), scan.sequences() * size, "scan last");
    let shared_last = Disjoint::new(last);
    let work = |task: &Task| {
        let from = task.blocks.start * LANES;
        let channels = (task.blocks.end * LANES).min(scan.channels) - from;
        let at = task.sequence * size + from * state;
        if brief(task) {
            write_last(&shared_last, at, channels * state, |last| {
                step::steps(scan, task, last, |block, row, y: &Lanes| {
                    let at = row * scan.channels + block * LANES;
                    write(&shared_y, at, &y[..scan.width(block)]);
                });
            });
            return;
        }
        let mut h = task.initial(scan);
        let mut steps = vec![[[0.0; LANES]; 2]; CHUNK.min(task.rows.len())];
        for (chunk, from) in task.rows.clone().step_by(CHUNK).enumerate() {
            let rows = from..task.rows.end.min(from + CHUNK);
            for (h, block) in h.chunks_exact_mut(state).zip(task.blocks.clone()) {
                if save {
                    let at = ((before[task.sequence] + chunk) * blocks + block) * state * LANES;
                    write(&shared_saved, at, h.as_flattened());
                }
                let a = &a[block * state..][..state];
                walk(scan, rows.clone(), block, a, h, &mut steps, &shared_y);
            }
        }
        write_last(&shared_last, at, channels * state, |last| {
            scan.unblock(&h, task.blocks.start, last)
        });
    };
    match flops(scan.total(), scan.channels, state) < PARALLEL_FLOPS {
        true => tasks.iter().for_each(work),
        false => tasks.par_iter().for_each(work),
    }
    Output { y, saved }
}

dispatched! {
    /// One chunk of one block.
    fn walk<'a>(
        scan: &'a Scan<'a>,
        rows: Range<usize>,
        block: usize,
        a: &'a [Lanes],
        h: &'a mut [Lanes],
        steps: &'a mut [[Lanes; 2]],
        shared_y: &'a Disjoint<'a>,
    ) {
        discretise(scan, rows.clone(), block, steps);
        let d = scan.lanes(scan.d, 0, block);
        for (row, [step, input]) in rows.zip(steps) {
            let out = advance(scan, row, a, step, input, h);
            let u = scan.lanes(scan.u, row, block);
            let mut y = [0.0; LANES];
            for l in 0..LANES {
                y[l] = d[l].mul_add(u[l], out[l]);
            }
            let at = row * scan.channels + block * LANES;
            write(shared_y, at, &y[..scan.width(block)]);
        }
    }
}

/// Writes one task's own part of an array.
#[allow(unsafe_code)]
#[inline(always)]
pub(super) fn write(shared: &Disjoint, at: usize, values: &[f32]) {
    // SAFETY: tasks own different (sequence, channel block) pairs, and every position written belongs to one pair; the
    // part is gone when this returns.
    unsafe { shared.part(at, values.len()) }.copy_from_slice(values);
}

/// Lets a task write its own channels of the final states.
#[allow(unsafe_code)]
fn write_last(shared: &Disjoint, at: usize, count: usize, fill: impl FnOnce(&mut [f32])) {
    // SAFETY: as of [`write`]: the channels of a task lie together and are its own; the part is gone when this returns.
    fill(unsafe { shared.part(at, count) });
}

/// Fills `[Delta, Delta u]` for the rows of a block.
#[inline(always)]
pub(super) fn discretise(scan: &Scan, rows: Range<usize>, block: usize, steps: &mut [[Lanes; 2]]) {
    let bias = scan.lanes(scan.delta_bias, 0, block);
    for (row, [step, input]) in rows.zip(steps) {
        let (delta, u) = (
            scan.lanes(scan.delta, row, block),
            scan.lanes(scan.u, row, block),
        );
        for l in 0..LANES {
            step[l] = softplus(delta[l] + bias[l]);
            input[l] = step[l] * u[l];
        }
    }
}

/// One step: updates `h`, returns `sum_n c[n] h[n]`.
#[inline(always)]
fn advance(
    scan: &Scan,
    row: usize,
    a: &[Lanes],
    step: &Lanes,
    input: &Lanes,
    h: &mut [Lanes],
) -> Lanes {
    let state = h.len();
    let b = &scan.b[row * state..][..state];
    let c = &scan.c[row * state..][..state];
    let mut out = [0.0; LANES];
    for (((h, a), b), c) in h.iter_mut().zip(a).zip(b).zip(c) {
        for l in 0..LANES {
            let decay = exp(step[l] * a[l]);
            h[l] = decay.mul_add(h[l], input[l] * b);
            out[l] = c.mul_add(h[l], out[l]);
        }
    }
    out
}

/// As [`advance`], keeping the decays and the new state, without the output.
#[inline(always)]
pub(super) fn advance_and_keep(
    scan: &Scan,
    row: usize,
    a: &[Lanes],
    step: &Lanes,
    input: &Lanes,
    before: &[Lanes],
    after: &mut [Lanes],
    decays: &mut [Lanes],
) {
    let state = a.len();
    let b = &scan.b[row * state..][..state];
    for n in 0..state {
        let (before, after, decays) = (&before[n], &mut after[n], &mut decays[n]);
        for l in 0..LANES {
            decays[l] = exp(step[l] * a[n][l]);
            after[l] = decays[l].mul_add(before[l], input[l] * b[n]);
        }
    }
}

impl Task {
    /// Rows of each chunk, in order.
    pub(super) fn chunks(&self) -> Vec<Range<usize>> {
        let end = self.rows.end;
        self.rows
            .clone()
            .step_by(CHUNK)
            .map(|from| from..end.min(from + CHUNK))
            .collect()
    }
}
