//! The chunked form against the loop: outputs, every gradient, final state, over gates, writes, lengths and packs.

use super::naive::{Wide, beta_values, gate_values, run, widen};
use super::{Gate, Problem, Write, backward, forward};
use crate::testing::{assert_close, rand_vec};

struct Case {
    offsets: Vec<usize>,
    heads: usize,
    key_heads: usize,
    key_dim: usize,
    value_dim: usize,
    chunk_len: usize,
    decay: f32,
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

/// `sum(o * co) + sum(last * cs)` in f64.
fn loss(p: &Problem, w: &Wide, gate: Gate, write: Write, co: &[f32], cs: &[f32]) -> f64 {
    let got = run(p, w, gate, write);
    let dot = |a: &[f64], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
    dot(&got.o, co) + dot(&got.last, cs)
}

fn check(case: &Case, kind: usize, delta: bool, with_initial: bool, with_final: bool) {
    let p = Problem {
        offsets: &case.offsets,
        heads: case.heads,
        key_heads: case.key_heads,
        key_dim: case.key_dim,
        value_dim: case.value_dim,
        scale: 0.4,
        chunk_len: case.chunk_len,
    };
    let (total, h) = (p.total(), p.heads);
    let q = rand_vec(1, total * p.key_heads * p.key_dim);
    let mut k = rand_vec(2, q.len());
    for row in k.chunks_mut(p.key_dim) {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt() + 1e-6;
        row.iter_mut().for_each(|v| *v /= norm);
    }
    let v = rand_vec(3, total * h * p.value_dim);
    let decays = |count: usize| -> Vec<f32> {
        rand_vec(4, count).iter().map(|v| -case.decay * (v + 1.0)).collect()
    };
    let (scalar, vector) = (decays(total * h), decays(total * h * p.key_dim));
    let gate = [Gate::None, Gate::Scalar(&scalar), Gate::Vector(&vector)][kind];
    let beta: Vec<f32> = rand_vec(5, total * h).iter().map(|v| 0.5 + 0.5 * v).collect();
    let write = if delta { Write::Delta(&beta) } else { Write::Additive };
    let states = p.sequences() * h * p.state();
    let initial = if with_initial { rand_vec(6, states) } else { vec![0.0; states] };
    let given = with_initial.then_some(initial.as_slice());
    let co = rand_vec(7, v.len());
    let cs = if with_final { rand_vec(8, states) } else { vec![0.0; states] };
    let name = format!(
        "gate {kind} delta {delta} offsets {:?} chunk {} ", case.offsets, case.chunk_len
    );
    let wide = Wide {
        q: widen(&q),
        k: widen(&k),
        v: widen(&v),
        gate: gate_values(gate),
        beta: beta_values(write),
        initial: widen(&initial),
    };
    let want = run(&p, &wide, gate, write);
    let got = forward(&p, &q, &k, &v, gate, write, given, true);
    assert_close(&(name.clone() + "o"), &got.o, &narrow(&want.o), 2e-5);
    assert_close(&(name.clone() + "state"), &got.final_state, &narrow(&want.last), 2e-5);
    let d_final = with_final.then_some(cs.as_slice());
    let grads = backward(&p, &q, &k, &v, gate, write, &got.chunk_states, &co, d_final);
    // Central differences in f64 for a sample of the entries of every input.
    let sample = |count: usize| (0..count).step_by((count / 13).max(1)).collect::<Vec<usize>>();
    let eps = 1e-5;
    let mut against = |what: &str, grad: &[f32], pick: &dyn Fn(&mut Wide) -> &mut Vec<f64>| {
        let mut w = wide.clone();
        let places = sample(grad.len());
        let mut numeric = Vec::new();
        for &at in &places {
            let before = pick(&mut w)[at];
            pick(&mut w)[at] = before + eps;
            let plus = loss(&p, &w, gate, write, &co, &cs);
            pick(&mut w)[at] = before - eps;
            let minus = loss(&p, &w, gate, write, &co, &cs);
            pick(&mut w)[at] = before;
            numeric.push(((plus - minus) / (2.0 * eps)) as f32);
        }
        let got: Vec<f32> = places.iter().map(|at| grad[*at]).collect();
        assert_close(&(name.clone() + what), &got, &numeric, 2e-4);
    };
    against("dq", &grads.q, &|w| &mut w.q);
    against("dk", &grads.k, &|w| &mut w.k);
    against("dv", &grads.v, &|w| &mut w.v);
    if let Some(grad) = &grads.gate {
        against("d gate", grad, &|w| &mut w.gate);
    }
    if let Some(grad) = &grads.beta {
        against("d beta", grad, &|w| &mut w.beta);
    }
    against("d initial", &grads.initial, &|w| &mut w.initial);
}

fn all(case: &Case) {
    for kind in 0..3 {
        for delta in [false, true] {
            check(case, kind, delta, true, true);
        }
    }
}

#[test]
fn chunks_equal_the_loop_around_the_chunk_length() {
    for time in [1, 15, 16, 17, 33] {
        all(&Case {
            offsets: vec![0, time],
            heads: 2,
            key_heads: 2,
            key_dim: 5,
            value_dim: 3,
            chunk_len: 16,
            decay: 0.2,
        });
    }
}

#[test]
fn two_levels_equal_the_loop() {
    all(&Case {
        offsets: vec![0, 75],
        heads: 1,
        key_heads: 1,
        key_dim: 20,
        value_dim: 4,
        chunk_len: 64,
        decay: 0.3,
    });
}

#[test]
fn packs_with_an_empty_sequence_and_shared_keys_equal_the_loop() {
    all(&Case {
        offsets: vec![0, 7, 7, 8, 27],
        heads: 4,
        key_heads: 2,
        key_dim: 4,
        value_dim: 6,
        chunk_len: 8,
        decay: 0.2,
    });
}

#[test]
fn initial_state_and_final_gradient_may_be_absent() {
    let case = Case {
        offsets: vec![0, 21],
        heads: 2,
        key_heads: 1,
        key_dim: 4,
        value_dim: 4,
        chunk_len: 8,
        decay: 0.2,
    };
    check(&case, 2, true, false, false);
    check(&case, 1, false, false, true);
    check(&case, 0, true, true, false);
}

#[test]
fn strong_decay_stays_finite_and_right() {
    all(&Case {
        offsets: vec![0, 70],
        heads: 1,
        key_heads: 1,
        key_dim: 6,
        value_dim: 3,
        chunk_len: 64,
        decay: 15.0,
    });
}

#[test]
fn an_overwritten_key_returns_its_last_value() {
    // beta 1 and one-hot keys: the state is a dictionary; without erasing it sums.
    let (k, v) = ([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [1.0, 2.0, 5.0]);
    let q = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
    let p = Problem {
        offsets: &[0, 3],
        heads: 1,
        key_heads: 1,
        key_dim: 2,
        value_dim: 1,
        scale: 1.0,
        chunk_len: 64,
    };
    let delta = forward(&p, &q, &k, &v, Gate::None, Write::Delta(&[1.0; 3]), None, false);
    assert_eq!(delta.o[2], 5.0);
    let sums = forward(&p, &q, &k, &v, Gate::None, Write::Additive, None, false);
    assert_eq!(sums.o[2], 6.0);
}

fn sine(a: f64, count: usize) -> Vec<f32> {
    (0..count).map(|i| (a * (i + 1) as f64).sin() as f32).collect()
}

#[test]
fn published_vectors_of_gla_are_met() {
    let p = Problem {
        offsets: &[0, 5],
        heads: 1,
        key_heads: 1,
        key_dim: 4,
        value_dim: 3,
        scale: 0.5,
        chunk_len: 2,
    };
    let (q, k, v) = (sine(0.7, 20), sine(0.5, 20), sine(1.1, 15));
    let g: Vec<f32> = sine(0.3, 20).iter().map(|s| -(0.1 + 0.2 * (1.0 + s))).collect();
    let got = forward(&p, &q, &k, &v, Gate::Vector(&g), Write::Additive, None, true);
    assert_close("o0", &got.o[..3], &[1.0265517, 0.931_279_8, -0.18170195], 1e-5);
    assert_close("state", &got.final_state[..3], &[-0.295_800_2, -0.373_910_8, -0.04340878], 1e-5);
    let grads = backward(
        &p, &q, &k, &v, Gate::Vector(&g), Write::Additive, &got.chunk_states, &[1.0; 15], None,
    );
    assert_close("dq", &grads.q[8..12], &[-0.666_542_2, -0.318_364_93, 0.15343237, 0.623_493_5], 1e-5);
    let gate = grads.gate.expect("a gate");
    assert_close("dg", &gate[4..8], &[-0.1061995, -0.24236166, -0.21639262, -0.04003338], 1e-4);
}
