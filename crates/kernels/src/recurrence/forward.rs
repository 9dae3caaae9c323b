//! The forward pass.
#![allow(unsafe_code)]

use rayon::prelude::*;

use super::chunk::Inputs;
use super::solve::Scratch;
use super::step::{STEPS, steps};
use super::{Gate, Problem, Write};
use crate::disjoint::Disjoint;
use crate::gemm::{Matrix, lower_product, product};
use crate::simd::{PARALLEL_FLOPS, dispatched};

/// What the forward pass gives beside the final states.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[total, heads, value_dim]`.
    pub o: Vec<f32>,
    /// The state before every chunk, `[chunks, heads, key_dim, value_dim]`: what [`super::backward`] wants back. Empty
    /// unless asked for.
    pub chunk_states: Vec<f32>,
}

/// Where the heads write.
struct Targets<'a> {
    o: Disjoint<'a>,
    chunk_states: Option<Disjoint<'a>>,
}

/// Runs the recurrence. `initial` is `[sequences, heads, key_dim, value_dim]`, zero when absent; `save` keeps the states
/// at chunk borders. `final_state`, of the same shape, is overwritten; nothing in it is read before.
pub fn forward(
    problem: &Problem,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    gate: Gate,
    write: Write,
    initial: Option<&[f32]>,
    save: bool,
    final_state: &mut [f32],
) -> Output {
    problem.check(q, k, v, gate, write);
    let inputs = Inputs {
        q,
        k,
        v,
        gate,
        write,
    };
    let (heads, size) = (problem.heads, problem.state());
    let chunks = problem.chunks();
    let states = problem.sequences() * heads * size;
    assert_eq!(final_state.len(), states, "final state");
    assert!(
        initial.is_none_or(|initial| initial.len() == states),
        "initial state"
    );
    let saved = usize::from(save) * chunks[chunks.len() - 1] * heads * size;
    let (mut o, mut chunk_states) = (Vec::new(), Vec::new());
    // SAFETY: outputs and kept states are written only.
    let targets = unsafe {
        Targets {
            o: Disjoint::unwritten(&mut o, v.len()),
            chunk_states: save.then(|| Disjoint::unwritten(&mut chunk_states, saved)),
        }
    };
    let slots = problem.slots();
    let work = |scratch: &mut Option<Scratch>, (task, state): (usize, &mut [f32])| {
        let (sequence, head) = (task / heads, task % heads);
        let [from, to] = [problem.offsets[sequence], problem.offsets[sequence + 1]];
        let before = initial.map(|initial| &initial[task * size..][..size]);
        if to > from && to - from <= STEPS.min(problem.chunk_len) {
            if let Some(target) = &targets.chunk_states {
                let at = (chunks[sequence] * heads + head) * size;
                // SAFETY: this chunk of this head is this task's alone.
                let kept = unsafe { target.part(at, size) };
                begin(before, kept);
            }
            let range = [from, to];
            steps(problem, &inputs, range, head, before, state, &targets.o);
            return;
        }
        begin(before, state);
        let scratch = scratch.get_or_insert_with(|| Scratch::new(problem, &inputs, slots));
        let first = chunks[sequence];
        run_head(
            problem,
            &inputs,
            [from, to],
            head,
            first,
            state,
            &targets,
            scratch,
        );
    };
    let parallel = problem.work(write) >= PARALLEL_FLOPS;
    each_state(final_state, size, parallel, work);
    // SAFETY: every token of every head has its output, every chunk the state before it.
    unsafe {
        o.set_len(v.len());
        chunk_states.set_len(saved);
    }
    Output { o, chunk_states }
}

/// The state to begin with.
#[inline(always)]
pub(super) fn begin(before: Option<&[f32]>, state: &mut [f32]) {
    match before {
        Some(before) => state.copy_from_slice(before),
        None => state.fill(0.0),
    }
}

/// Runs `work` for each state of `size` values with its index, on the pool if `parallel`; each thread keeps its scratch
/// from state to state.
pub(super) fn each_state<S>(
    states: &mut [f32],
    size: usize,
    parallel: bool,
    work: impl Fn(&mut Option<S>, (usize, &mut [f32])) + Send + Sync,
) {
    if parallel {
        states
            .par_chunks_exact_mut(size)
            .enumerate()
            .for_each_init(|| None, work);
    } else {
        let mut scratch = None;
        states
            .chunks_exact_mut(size)
            .enumerate()
            .for_each(|task| work(&mut scratch, task));
    }
}

dispatched! {
    fn run_head<'a>(
        problem: &'a Problem<'a>,
        inputs: &'a Inputs<'a>,
        range: [usize; 2],
        head: usize,
        first: usize,
        state: &'a mut [f32],
        targets: &'a Targets<'a>,
        s: &'a mut Scratch,
    ) {
        let (heads, size) = (problem.heads, problem.state());
        let (kd, vd) = (problem.key_dim, problem.value_dim);
        let [from, to] = range;
        for (index, start) in (from..to).step_by(problem.chunk_len).enumerate() {
            let len = problem.chunk_len.min(to - start);
            if let Some(target) = &targets.chunk_states {
                let at = ((first + index) * heads + head) * size;
                // SAFETY: this chunk of this head is this task's alone.
                unsafe { target.part(at, size) }.copy_from_slice(state);
            }
            s.chunk.load(problem, inputs, head, start, len);
            s.solve(state);
            s.chunk.scaled(&s.chunk.from_start, &s.chunk.q, &mut s.a);
            let (a, b) = (Matrix::rows(&s.a, kd), Matrix::rows(state, vd));
            product([len, kd, vd], 1.0, a, b, &mut s.o, (vd, 1), false);
            let (a, b) = (Matrix::rows(&s.p, len), Matrix::rows(&s.u, vd));
            lower_product([len, vd], a, b, &mut s.o, vd, true);
            for t in 0..len {
                let at = ((start + t) * heads + head) * vd;
                // SAFETY: this token of this head is this task's alone.
                unsafe { targets.o.part(at, vd) }.copy_from_slice(&s.o[t * vd..(t + 1) * vd]);
            }
            s.advance(state);
        }
    }
}
