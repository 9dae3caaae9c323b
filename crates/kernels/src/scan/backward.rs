//! The backward pass: chunks from last to first, the states within a chunk computed again from the saved one.
//!
//! With `g[t]` the gradient of `h[t]` (`g[t] = c[t] dy[t] + decay[t+1] g[t+1]`, the final state's gradient added to the
//! last) and `p[t] = g[t] h[t-1] decay[t]`: `dc[t, n] = sum_channels dy h`, `db[t, n] = sum_channels g Delta u`,
//! `du = Delta sum_n g b + d dy`, `dDelta = sum_n p a + u sum_n g b`, `da = sum_t p Delta`.

use std::ops::Range;

use rayon::prelude::*;

use super::forward::{advance_and_keep, discretise, write};
use super::{CHUNK, LANES, Lanes, Scan, Task};
use crate::disjoint::Disjoint;
use crate::math::sigmoid;
use crate::simd::dispatched;

/// Gradients in the shapes of the arguments.
#[derive(Clone, Debug)]
pub struct Grads {
    /// `[total, channels]`.
    pub u: Vec<f32>,
    /// `[total, channels]`.
    pub delta: Vec<f32>,
    /// `[channels]`.
    pub delta_bias: Vec<f32>,
    /// `[channels, state]`.
    pub a: Vec<f32>,
    /// `[total, state]`.
    pub b: Vec<f32>,
    /// `[total, state]`.
    pub c: Vec<f32>,
    /// `[channels]`.
    pub d: Vec<f32>,
    /// `[sequences, channels, state]`, of an initial state whether there was one or not.
    pub initial: Vec<f32>,
}

/// What a task sums for itself: over its rows for channels, over its channels for rows.
struct Sums {
    /// Gradient of the state before the first row.
    initial: Vec<Lanes>,
    a: Vec<Lanes>,
    d: Vec<Lanes>,
    delta_bias: Vec<Lanes>,
    b: Vec<f32>,
    c: Vec<f32>,
}

/// Gradients from those of the output, `dy`, and of the final state, where it was used; `saved` comes from
/// [`super::forward`].
pub fn backward(scan: &Scan, saved: &[f32], dy: &[f32], dlast: Option<&[f32]>) -> Grads {
    scan.check();
    let (channels, state) = (scan.channels, scan.state);
    let before = scan.chunks_before();
    assert_eq!(
        saved.len(),
        before[scan.sequences()] * scan.blocks() * state * LANES,
        "scan saved"
    );
    assert_eq!(dy.len(), scan.u.len(), "scan dy");
    let a = scan.blocked(scan.a);
    let (mut du, mut ddelta) = (vec![0.0; dy.len()], vec![0.0; dy.len()]);
    let shared = [Disjoint::new(&mut du), Disjoint::new(&mut ddelta)];
    let tasks = scan.tasks();
    let sums: Vec<Sums> = tasks
        .par_iter()
        .map(|task| {
            let first = before[task.sequence];
            run(scan, task, &a, saved, first, dy, dlast, &shared)
        })
        .collect();
    let size = channels * state;
    let mut grads = Grads {
        u: du,
        delta: ddelta,
        delta_bias: vec![0.0; channels],
        a: vec![0.0; size],
        b: vec![0.0; scan.b.len()],
        c: vec![0.0; scan.c.len()],
        d: vec![0.0; channels],
        initial: vec![0.0; scan.sequences() * size],
    };
    let add = |sum: &mut [f32], values: &[f32]| {
        sum.iter_mut()
            .zip(values)
            .for_each(|(sum, value)| *sum += value);
    };
    for (task, sums) in tasks.iter().zip(&sums) {
        let from = task.blocks.start;
        scan.add_unblocked(&sums.a, from, &mut grads.a);
        scan.add_unblocked(
            &sums.initial,
            from,
            &mut grads.initial[task.sequence * size..][..size],
        );
        add(&mut grads.d[from * LANES..], sums.d.as_flattened());
        add(
            &mut grads.delta_bias[from * LANES..],
            sums.delta_bias.as_flattened(),
        );
        add(&mut grads.b[task.rows.start * state..], &sums.b);
        add(&mut grads.c[task.rows.start * state..], &sums.c);
    }
    grads
}

fn run(
    scan: &Scan,
    task: &Task,
    a: &[Lanes],
    saved: &[f32],
    first_chunk: usize,
    dy: &[f32],
    dlast: Option<&[f32]>,
    shared: &[Disjoint; 2],
) -> Sums {
    let (state, rows) = (scan.state, task.rows.len());
    let zeros = |count: usize| vec![[0.0; LANES]; count];
    // The gradient of the final state has the layout of an initial state.
    let mut g = task.initial(&Scan {
        initial: dlast,
        ..*scan
    });
    let (mut da, mut dd, mut dbias) = (
        zeros(g.len()),
        zeros(task.blocks.len()),
        zeros(task.blocks.len()),
    );
    let (mut db, mut dc) = (vec![0.0; rows * state], vec![0.0; rows * state]);
    let (mut h, mut decays) = (zeros((CHUNK + 1) * state), zeros(CHUNK * state));
    let (mut db_lanes, mut dc_lanes) = (zeros(CHUNK * state), zeros(CHUNK * state));
    let mut steps = vec![[[0.0; LANES]; 2]; CHUNK];
    for (chunk, range) in task.chunks().into_iter().enumerate().rev() {
        db_lanes.fill([0.0; LANES]);
        dc_lanes.fill([0.0; LANES]);
        for (index, block) in task.blocks.clone().enumerate() {
            let a = &a[block * state..][..state];
            let at = ((first_chunk + chunk) * scan.blocks() + block) * state * LANES;
            h[..state]
                .as_flattened_mut()
                .copy_from_slice(&saved[at..][..state * LANES]);
            let (g, da) = (
                &mut g[index * state..][..state],
                &mut da[index * state..][..state],
            );
            let (dd, dbias) = (&mut dd[index], &mut dbias[index]);
            let parts = Chunk {
                a,
                h: &mut h,
                decays: &mut decays,
                steps: &mut steps,
                g,
                da,
                db: &mut db_lanes,
                dc: &mut dc_lanes,
                dd,
                dbias,
            };
            walk_back(scan, range.clone(), block, dy, parts, shared);
        }
        let at = (range.start - task.rows.start) * state..(range.end - task.rows.start) * state;
        for (sum, lanes) in db[at.clone()].iter_mut().zip(&db_lanes) {
            *sum = total(lanes);
        }
        for (sum, lanes) in dc[at].iter_mut().zip(&dc_lanes) {
            *sum = total(lanes);
        }
    }
    Sums {
        initial: g,
        a: da,
        d: dd,
        delta_bias: dbias,
        b: db,
        c: dc,
    }
}

/// What the walk over one chunk of one block reads and grows.
struct Chunk<'a> {
    a: &'a [Lanes],
    h: &'a mut [Lanes],
    decays: &'a mut [Lanes],
    steps: &'a mut [[Lanes; 2]],
    g: &'a mut [Lanes],
    da: &'a mut [Lanes],
    db: &'a mut [Lanes],
    dc: &'a mut [Lanes],
    dd: &'a mut Lanes,
    dbias: &'a mut Lanes,
}

dispatched! {
    /// One chunk of one block: states forward from the saved one, then gradients back.
    fn walk_back<'a>(
        scan: &'a Scan<'a>,
        rows: Range<usize>,
        block: usize,
        dy: &'a [f32],
        parts: Chunk<'a>,
        shared: &'a [Disjoint<'a>; 2],
    ) {
        let Chunk { a, h, decays, steps, g, da, db, dc, dd, dbias } = parts;
        let state = a.len();
        discretise(scan, rows.clone(), block, steps);
        for (t, row) in rows.clone().enumerate() {
            let (before, after) = h[t * state..].split_at_mut(state);
            let [step, input] = &steps[t];
            let decays = &mut decays[t * state..][..state];
            advance_and_keep(scan, row, a, step, input, before, &mut after[..state], decays);
        }
        let (d, bias) = (scan.lanes(scan.d, 0, block), scan.lanes(scan.delta_bias, 0, block));
        for (t, row) in rows.enumerate().rev() {
            let [step, input] = &steps[t];
            let (u, dy) = (scan.lanes(scan.u, row, block), scan.lanes(dy, row, block));
            let [through_b, through_a] = retreat(
                Step {
                    b: &scan.b[row * state..][..state],
                    c: &scan.c[row * state..][..state],
                    a,
                    before: &h[t * state..][..state],
                    after: &h[(t + 1) * state..][..state],
                    decays: &decays[t * state..][..state],
                    step,
                    input,
                    dy: &dy,
                },
                g,
                da,
                &mut db[t * state..][..state],
                &mut dc[t * state..][..state],
            );
            let raw = scan.lanes(scan.delta, row, block);
            let (mut du, mut ddelta) = ([0.0; LANES], [0.0; LANES]);
            for l in 0..LANES {
                du[l] = step[l].mul_add(through_b[l], d[l] * dy[l]);
                let dstep = u[l].mul_add(through_b[l], through_a[l]);
                ddelta[l] = dstep * sigmoid(raw[l] + bias[l]);
                dd[l] = dy[l].mul_add(u[l], dd[l]);
                dbias[l] += ddelta[l];
            }
            let at = row * scan.channels + block * LANES;
            write(&shared[0], at, &du[..scan.width(block)]);
            write(&shared[1], at, &ddelta[..scan.width(block)]);
        }
    }
}

/// The sum of all lanes, in halves.
#[inline(always)]
fn total(lanes: &Lanes) -> f32 {
    let mut sums = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
}

/// The quantities of one step of one block.
struct Step<'a> {
    a: &'a [Lanes],
    b: &'a [f32],
    c: &'a [f32],
    before: &'a [Lanes],
    after: &'a [Lanes],
    decays: &'a [Lanes],
    step: &'a Lanes,
    input: &'a Lanes,
    dy: &'a Lanes,
}

/// One step back: `g` becomes the gradient of the state before it, the other sums grow; gives `sum_n g b` and
/// `sum_n p a`.
#[inline(always)]
fn retreat(
    s: Step,
    g: &mut [Lanes],
    da: &mut [Lanes],
    db: &mut [Lanes],
    dc: &mut [Lanes],
) -> [Lanes; 2] {
    let (mut through_b, mut through_a) = ([0.0; LANES], [0.0; LANES]);
    let all = g.iter_mut().zip(da).zip(db).zip(dc).enumerate();
    for (n, (((g, da), db), dc)) in all {
        let (b, c) = (s.b[n], s.c[n]);
        let (a, before, after, decays) = (&s.a[n], &s.before[n], &s.after[n], &s.decays[n]);
        // Copies, so that the compiler need not prove that the rows are different to fill the lanes.
        let (mut g_here, mut da_here, mut db_here, mut dc_here) = (*g, *da, *db, *dc);
        let (a, before, after, decays, dy) = (*a, *before, *after, *decays, *s.dy);
        let (step, input) = (*s.step, *s.input);
        for l in 0..LANES {
            let here = c.mul_add(dy[l], g_here[l]);
            dc_here[l] = dy[l].mul_add(after[l], dc_here[l]);
            db_here[l] = here.mul_add(input[l], db_here[l]);
            through_b[l] = here.mul_add(b, through_b[l]);
            g_here[l] = here * decays[l];
            let p = g_here[l] * before[l];
            through_a[l] = p.mul_add(a[l], through_a[l]);
            da_here[l] = p.mul_add(step[l], da_here[l]);
        }
        (*g, *da, *db, *dc) = (g_here, da_here, db_here, dc_here);
    }
    [through_b, through_a]
}
