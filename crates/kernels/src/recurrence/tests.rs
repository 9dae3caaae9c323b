//! The chunked form against the loop: outputs, every gradient, final state, over gates, writes, lengths and packs.

use super::naive::{Wide, beta_values, gate_values, run, widen};
use super::whole::forward;
use super::{Gate, Problem, Write, backward};
use crate::instructions::Instructions;
use crate::testing::{Close, assert_close, assert_near, rand_vec};

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
    check_by(assert_close, case, kind, delta, [with_initial, with_final]);
}

fn check_by(
    close: Close,
    case: &Case,
    kind: usize,
    delta: bool,
    [with_initial, with_final]: [bool; 2],
) {
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
        rand_vec(4, count)
            .iter()
            .map(|v| -case.decay * (v + 1.0))
            .collect()
    };
    let (scalar, vector) = (decays(total * h), decays(total * h * p.key_dim));
    let gate = [Gate::None, Gate::Scalar(&scalar), Gate::Vector(&vector)][kind];
    let beta: Vec<f32> = rand_vec(5, total * h)
        .iter()
        .map(|v| 0.5 + 0.5 * v)
        .collect();
    let write = if delta {
        Write::Delta(&beta)
    } else {
        Write::Additive
    };
    let states = p.sequences() * h * p.state();
    let initial = if with_initial {
        rand_vec(6, states)
    } else {
        vec![0.0; states]
    };
    let given = with_initial.then_some(initial.as_slice());
    let co = rand_vec(7, v.len());
    let cs = if with_final {
        rand_vec(8, states)
    } else {
        vec![0.0; states]
    };
    let name = format!(
        "gate {kind} delta {delta} offsets {:?} chunk {} ",
        case.offsets, case.chunk_len
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
    close(&(name.clone() + "o"), &got.o, &narrow(&want.o), 2e-5);
    close(
        &(name.clone() + "state"),
        &got.final_state,
        &narrow(&want.last),
        2e-5,
    );
    let d_final = with_final.then_some(cs.as_slice());
    let grads = backward(&p, &q, &k, &v, gate, write, &got.chunk_states, &co, d_final);
    // Central differences in f64 for a sample of the entries of every input.
    let sample = |count: usize| {
        (0..count)
            .step_by((count / 13).max(1))
            .collect::<Vec<usize>>()
    };
    let eps = 1e-5;
    let against = |what: &str, grad: &[f32], pick: &dyn Fn(&mut Wide) -> &mut Vec<f64>| {
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
        close(&(name.clone() + what), &got, &numeric, 2e-4);
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

/// One, a few (token by token) and a few more tokens, each with its own state.
#[test]
fn short_sequences_equal_the_loop() {
    for offsets in [vec![0, 1], vec![0, 1, 2, 3], vec![0, 2, 5, 9, 14]] {
        all(&Case {
            offsets,
            heads: 2,
            key_heads: 1,
            key_dim: 3,
            value_dim: 35,
            chunk_len: 16,
            decay: 0.5,
        });
    }
}

#[test]
fn a_chunk_of_one_token_equals_the_loop() {
    all(&Case {
        offsets: vec![0, 6],
        heads: 1,
        key_heads: 1,
        key_dim: 3,
        value_dim: 2,
        chunk_len: 1,
        decay: 0.5,
    });
}

/// Log decays from 0 down to -30: sums over a chunk reach -1000.
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

/// A decay of zero cuts the sequence: what follows is what it would be alone, to the bit of rounding, and gradients stay
/// finite.
#[test]
fn forgetting_everything_is_exact() {
    let (time, cut) = (40, 21);
    let p = Problem {
        offsets: &[0, time],
        heads: 1,
        key_heads: 1,
        key_dim: 4,
        value_dim: 3,
        scale: 1.0,
        chunk_len: 32,
    };
    let (q, k, v) = (
        rand_vec(1, time * 4),
        rand_vec(2, time * 4),
        rand_vec(3, time * 3),
    );
    let decays = |width: usize| -> Vec<f32> {
        let mut all = vec![-0.01; time * width];
        all[cut * width..(cut + 1) * width].fill(f32::NEG_INFINITY);
        all
    };
    let (scalar, vector) = (decays(1), decays(4));
    let beta = vec![0.5; time];
    let alone = Problem {
        offsets: &[0, time - cut],
        ..p
    };
    for write in [false, true] {
        for kind in 0..2 {
            let gate = [Gate::Scalar(&scalar), Gate::Vector(&vector)][kind];
            let later = [
                Gate::Scalar(&scalar[cut..]),
                Gate::Vector(&vector[cut * 4..]),
            ][kind];
            let (write, rest) = match write {
                false => (Write::Additive, Write::Additive),
                true => (Write::Delta(&beta), Write::Delta(&beta[cut..])),
            };
            let got = forward(&p, &q, &k, &v, gate, write, None, true);
            let (q2, k2, v2) = (&q[cut * 4..], &k[cut * 4..], &v[cut * 3..]);
            let want = forward(&alone, q2, k2, v2, later, rest, None, false);
            assert_close("o", &got.o[cut * 3..], &want.o, 1e-5);
            assert_close("state", &got.final_state, &want.final_state, 1e-5);
            let states = &got.chunk_states;
            let grads = backward(&p, &q, &k, &v, gate, write, states, &v, Some(&[1.0; 12]));
            for grad in [&grads.q, &grads.k, &grads.v, &grads.initial] {
                assert!(grad.iter().all(|value| value.is_finite()));
            }
            assert!(
                grads
                    .gate
                    .is_some_and(|grad| grad.iter().all(|value| value.is_finite()))
            );
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (time, heads, dim) = (200, 4, 16);
    let p = Problem {
        offsets: &[0, time, 2 * time],
        heads,
        key_heads: 2,
        key_dim: dim,
        value_dim: dim,
        scale: 1.0,
        chunk_len: 64,
    };
    let (q, k) = (
        rand_vec(1, 2 * time * 2 * dim),
        rand_vec(2, 2 * time * 2 * dim),
    );
    let v = rand_vec(3, 2 * time * heads * dim);
    let gate: Vec<f32> = rand_vec(4, v.len()).iter().map(|v| -v.abs()).collect();
    let run = |threads: usize| {
        Instructions::best().run(threads, || {
            let gate = Gate::Vector(&gate);
            let y = forward(&p, &q, &k, &v, gate, Write::Additive, None, true);
            let states = &y.chunk_states;
            let d = backward(&p, &q, &k, &v, gate, Write::Additive, states, &v, None);
            (y.o, y.final_state, d.q, d.k, d.v, d.gate, d.initial)
        })
    };
    assert!(p.work(Write::Additive) >= crate::simd::PARALLEL_FLOPS);
    assert!(run(1) == run(3));
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        chunks_equal_the_loop_around_the_chunk_length,
        two_levels_equal_the_loop,
        packs_with_an_empty_sequence_and_shared_keys_equal_the_loop,
        short_sequences_equal_the_loop,
        a_chunk_of_one_token_equals_the_loop,
        strong_decay_stays_finite_and_right,
    ]);
}

/// A problem from bytes, against the loop.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let key_heads = bytes.number(1, 2);
    let case = Case {
        offsets: bytes.offsets(40),
        key_heads,
        heads: key_heads * bytes.number(1, 2),
        key_dim: bytes.number(1, 18),
        value_dim: bytes.number(1, 18),
        chunk_len: bytes.one_of(&[1, 2, 7, 8, 16, 64]),
        decay: bytes.one_of(&[0.1, 0.0, 1.0, 30.0]),
    };
    let kind = bytes.number(0, 2);
    let [delta, with_initial, with_final] = [(); 3].map(|()| bytes.flag());
    let given = [with_initial, with_final];
    check_by(assert_near, &case, kind, delta, given);
}
