//! Cases whose results are known without the loop, among them vectors from an independent f64 implementation.

use super::whole::forward;
use super::{Gate, Problem, Write, backward, flops};
use crate::testing::assert_close;

#[test]
fn flops_count_two_per_multiply_add() {
    // Two tokens, three heads: a write and a read of 5 x 7 multiply-adds each, the delta rule's read on top.
    assert_eq!(flops(2, 3, 5, 7, false), 2 * 3 * 2 * (35 + 35));
    assert_eq!(flops(2, 3, 5, 7, true), 2 * 3 * 2 * (35 + 35 + 35));
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
    let delta = forward(
        &p,
        &q,
        &k,
        &v,
        Gate::None,
        Write::Delta(&[1.0; 3]),
        None,
        false,
    );
    assert_eq!(delta.o[2], 5.0);
    let sums = forward(&p, &q, &k, &v, Gate::None, Write::Additive, None, false);
    assert_eq!(sums.o[2], 6.0);
}

fn sine(a: f64, count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| (a * (i + 1) as f64).sin() as f32)
        .collect()
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
    let g: Vec<f32> = sine(0.3, 20)
        .iter()
        .map(|s| -(0.1 + 0.2 * (1.0 + s)))
        .collect();
    let got = forward(
        &p,
        &q,
        &k,
        &v,
        Gate::Vector(&g),
        Write::Additive,
        None,
        true,
    );
    assert_close(
        "o0",
        &got.o[..3],
        &[1.0265517, 0.931_279_8, -0.18170195],
        1e-5,
    );
    assert_close(
        "state",
        &got.final_state[..3],
        &[-0.295_800_2, -0.373_910_8, -0.04340878],
        1e-5,
    );
    let grads = backward(
        &p,
        &q,
        &k,
        &v,
        Gate::Vector(&g),
        Write::Additive,
        &got.chunk_states,
        &[1.0; 15],
        None,
    );
    assert_close(
        "dq",
        &grads.q[8..12],
        &[-0.666_542_2, -0.318_364_93, 0.15343237, 0.623_493_5],
        1e-5,
    );
    let gate = grads.gate.expect("a gate");
    assert_close(
        "dg",
        &gate[4..8],
        &[-0.1061995, -0.24236166, -0.21639262, -0.04003338],
        1e-4,
    );
}

#[test]
fn published_vectors_of_the_delta_rule_are_met() {
    let unit = |mut values: Vec<f32>| {
        for row in values.chunks_mut(4) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
        values
    };
    let (q, k, v) = (unit(sine(0.7, 20)), unit(sine(0.5, 20)), sine(1.1, 15));
    let beta: Vec<f32> = sine(0.9, 5).iter().map(|s| 0.5 * (1.0 + s)).collect();
    let decay: Vec<f32> = sine(0.3, 5)
        .iter()
        .map(|s| -(0.1 + 0.2 * (1.0 + s)))
        .collect();
    for chunk_len in [2, 5] {
        let p = Problem {
            offsets: &[0, 5],
            heads: 1,
            key_heads: 1,
            key_dim: 4,
            value_dim: 3,
            scale: 0.5,
            chunk_len,
        };
        let write = Write::Delta(&beta);
        let got = forward(&p, &q, &k, &v, Gate::None, write, None, false);
        assert_close(
            "o0",
            &got.o[..3],
            &[0.367_863_82, 0.333_723_2, -0.065_112_72],
            1e-5,
        );
        assert_close(
            "o4",
            &got.o[12..],
            &[0.358_104_67, 0.301_235_3, -0.084_826_33],
            1e-5,
        );
        let sums = [got.o.iter().sum::<f32>(), got.final_state.iter().sum()];
        assert_close("sums", &sums, &[0.384_510_58, -0.670_900_3], 1e-5);
        let got = forward(&p, &q, &k, &v, Gate::Scalar(&decay), write, None, false);
        assert_close(
            "gated o4",
            &got.o[12..],
            &[0.043_211_22, 0.051_762_81, 0.003_747_6],
            1e-5,
        );
        let sums = [got.o.iter().sum::<f32>(), got.final_state.iter().sum()];
        assert_close("gated sums", &sums, &[0.172_156_27, -0.527_868_8], 1e-5);
    }
}
