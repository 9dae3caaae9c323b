//! The backward pass: chunks in reverse from the states at their borders, everything inside computed again.
#![allow(unsafe_code)]

use rayon::prelude::*;

use super::chunk::Inputs;
use super::chunk_backward::{Local, gates, one_chunk};
use super::forward::each_state;
use super::solve::Scratch;
use super::{Gate, Problem, Write};
use crate::disjoint::Disjoint;
use crate::simd::{PARALLEL_FLOPS, dispatched};

/// Gradients of every input.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[total, key_heads, key_dim]`.
    pub q: Vec<f32>,
    /// `[total, key_heads, key_dim]`.
    pub k: Vec<f32>,
    /// `[total, heads, value_dim]`.
    pub v: Vec<f32>,
    /// As the gate; `None` without one.
    pub gate: Option<Vec<f32>>,
    /// `[total, heads]`; `None` without the delta rule.
    pub beta: Option<Vec<f32>>,
    /// `[sequences, heads, key_dim, value_dim]`.
    pub initial: Vec<f32>,
}

/// Where a head writes its gradients.
struct Targets<'a> {
    q: Disjoint<'a>,
    k: Disjoint<'a>,
    v: Disjoint<'a>,
    gate: Disjoint<'a>,
    beta: Disjoint<'a>,
}

/// Gradients for `d_o [total, heads, value_dim]` and, where given, for the final state. `chunk_states` is what the
/// forward pass saved (the initial state is in it).
pub fn backward(
    problem: &Problem,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    gate: Gate,
    write: Write,
    chunk_states: &[f32],
    d_o: &[f32],
    d_final: Option<&[f32]>,
) -> Gradients {
    problem.check(q, k, v, gate, write);
    let inputs = Inputs {
        q,
        k,
        v,
        gate,
        write,
    };
    let (heads, size, total) = (problem.heads, problem.state(), problem.total());
    let chunks = problem.chunks();
    let saved = chunks[chunks.len() - 1] * heads * size;
    assert_eq!(chunk_states.len(), saved, "saved states");
    assert_eq!(d_o.len(), v.len(), "gradient of the output");
    let states = problem.sequences() * heads * size;
    let mut initial = match d_final {
        Some(d_final) => {
            assert_eq!(d_final.len(), states, "gradient of the final state");
            d_final.to_vec()
        }
        None => vec![0.0; states],
    };
    // Every head writes its own query and key gradients; those of a group are summed after.
    let [mut dq, mut dk, mut dv, mut d_gate, mut d_beta] = [const { Vec::new() }; 5];
    let keys = total * heads * problem.key_dim;
    let gates = match gate {
        Gate::None => 0,
        Gate::Scalar(gate) | Gate::Vector(gate) => gate.len(),
    };
    let betas = match write {
        Write::Additive => 0,
        Write::Delta(beta) => beta.len(),
    };
    // SAFETY: a gradient is written before it is read.
    let targets = unsafe {
        Targets {
            q: Disjoint::unwritten(&mut dq, keys),
            k: Disjoint::unwritten(&mut dk, keys),
            v: Disjoint::unwritten(&mut dv, v.len()),
            gate: Disjoint::unwritten(&mut d_gate, gates),
            beta: Disjoint::unwritten(&mut d_beta, betas),
        }
    };
    let slots = problem.slots();
    let work = |scratch: &mut Option<(Scratch, Local)>, (task, d_state): (usize, &mut [f32])| {
        let (sequence, head) = (task / heads, task % heads);
        let range = [problem.offsets[sequence], problem.offsets[sequence + 1]];
        let (s, l) = scratch.get_or_insert_with(|| {
            let scratch = Scratch::new(problem, &inputs, slots);
            (scratch, Local::new(problem, &inputs, slots))
        });
        let saved = Saved {
            chunk_states,
            first: chunks[sequence],
            d_o,
        };
        run_head(
            problem, &inputs, range, head, saved, d_state, &targets, s, l,
        );
    };
    let parallel = problem.work(write) >= PARALLEL_FLOPS / 2;
    each_state(&mut initial, size, parallel, work);
    // SAFETY: every token of every head has its gradients.
    unsafe {
        dq.set_len(keys);
        dk.set_len(keys);
        dv.set_len(v.len());
        d_gate.set_len(gates);
        d_beta.set_len(betas);
    }
    let group = heads / problem.key_heads;
    Gradients {
        q: sum_groups(dq, group, problem.key_dim),
        k: sum_groups(dk, group, problem.key_dim),
        v: dv,
        gate: (!matches!(gate, Gate::None)).then_some(d_gate),
        beta: matches!(write, Write::Delta(_)).then_some(d_beta),
        initial,
    }
}

/// Sums neighbouring rows of `width` values in groups of `group`.
fn sum_groups(values: Vec<f32>, group: usize, width: usize) -> Vec<f32> {
    if group == 1 {
        return values;
    }
    let mut sums = vec![0.0; values.len() / group];
    sums.par_chunks_exact_mut(width)
        .zip(values.par_chunks_exact(group * width))
        .with_min_len(64)
        .for_each(|(sum, rows)| {
            for row in rows.chunks_exact(width) {
                for (sum, value) in sum.iter_mut().zip(row) {
                    *sum += value;
                }
            }
        });
    sums
}

/// What a head reads besides the inputs.
#[derive(Clone, Copy)]
struct Saved<'a> {
    chunk_states: &'a [f32],
    /// Index of the sequence's first chunk.
    first: usize,
    d_o: &'a [f32],
}

dispatched! {
    fn run_head<'a>(
        problem: &'a Problem<'a>,
        inputs: &'a Inputs<'a>,
        range: [usize; 2],
        head: usize,
        saved: Saved<'a>,
        d_state: &'a mut [f32],
        targets: &'a Targets<'a>,
        s: &'a mut Scratch,
        l: &'a mut Local,
    ) {
        let (heads, size) = (problem.heads, problem.state());
        let (kd, vd, slots) = (problem.key_dim, problem.value_dim, problem.chunk_len);
        let [from, to] = range;
        for index in (0..(to - from).div_ceil(slots)).rev() {
            let start = from + index * slots;
            let len = slots.min(to - start);
            let at = ((saved.first + index) * heads + head) * size;
            let state = &saved.chunk_states[at..at + size];
            s.chunk.load(problem, inputs, head, start, len);
            s.solve(state);
            for t in 0..len {
                let row = ((start + t) * heads + head) * vd;
                l.d_o[t * vd..(t + 1) * vd].copy_from_slice(&saved.d_o[row..row + vd]);
            }
            one_chunk(s, l, state, d_state);
            for t in 0..len {
                let one = (start + t) * heads + head;
                let row = t * kd..(t + 1) * kd;
                // SAFETY: this token of this head is this task's alone, in each of the gradients.
                let (dq, dk, dv) = unsafe {
                    let (q, k) = (targets.q.part(one * kd, kd), targets.k.part(one * kd, kd));
                    (q, k, targets.v.part(one * vd, vd))
                };
                for (to, from) in dq.iter_mut().zip(&l.dq[row.clone()]) {
                    *to = from * problem.scale;
                }
                for ((to, a), b) in dk.iter_mut().zip(&l.dk_row[row.clone()]).zip(&l.dk_column[row]) {
                    *to = a + b;
                }
                dv.copy_from_slice(&l.du[t * vd..(t + 1) * vd]);
                if s.chunk.delta {
                    // SAFETY: as above.
                    let d_beta = unsafe { targets.beta.part(one, 1) };
                    d_beta[0] = l.d_beta[t];
                }
            }
            gates(&s.chunk, l, heads, head, start, &targets.gate);
        }
    }
}
