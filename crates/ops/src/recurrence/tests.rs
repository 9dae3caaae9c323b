//! The kernel against the loop over tensor ops.

use super::*;
use crate::check::{agree, close, values};

/// Every gate and write, keys shared by heads, packed sequences: kernel and loop agree in the output, the final state
/// and every gradient.
#[test]
fn kernel_equals_the_loop() {
    let (total, heads, key_heads, key_dim, value_dim) = (23, 4, 2, 3, 5);
    let offsets = Arc::new(vec![0, 9, 9, 23]);
    let states = 3 * heads * key_dim * value_dim;
    let positive = |seed, n| {
        values(seed, n)
            .iter()
            .map(|v| v.abs())
            .collect::<Vec<f32>>()
    };
    let negative = |seed, n| {
        values(seed, n)
            .iter()
            .map(|v| -v.abs())
            .collect::<Vec<f32>>()
    };
    for gate in 0..3 {
        for delta in [false, true] {
            let gates = [1, total * heads, total * heads * key_dim][gate];
            let inputs = [
                values(1, total * key_heads * key_dim),
                values(2, total * key_heads * key_dim),
                values(3, total * heads * value_dim),
                values(4, states),
                negative(5, gates),
                positive(6, total * heads),
            ];
            let used: Vec<Vec<f32>> = match (gate, delta) {
                (0, false) => inputs[..4].to_vec(),
                (0, true) => [&inputs[..4], &inputs[5..]].concat(),
                (_, false) => inputs[..5].to_vec(),
                (_, true) => inputs.to_vec(),
            };
            agree(&format!("gate {gate} delta {delta}"), 1e-4, &used, |x| {
                let keys = [1, total, key_heads, key_dim];
                let last = x[x.len() - 1].clone();
                let options = RecurrenceOptions {
                    scale: 0.7,
                    chunk_len: 8,
                    offsets: Some(offsets.clone()),
                    normaliser: false,
                };
                let (o, state) = linear_recurrence(
                    x[0].clone().reshape(keys),
                    x[1].clone().reshape(keys),
                    x[2].clone().reshape([1, total, heads, value_dim]),
                    match gate {
                        0 => Gate::None,
                        1 => Gate::Scalar(x[4].clone().reshape([1, total, heads])),
                        _ => Gate::Vector(x[4].clone().reshape([1, total, heads, key_dim])),
                    },
                    match delta {
                        false => Write::Additive,
                        true => Write::Delta(last.reshape([1, total, heads])),
                    },
                    Some(x[3].clone().reshape([3, heads, key_dim, value_dim])),
                    &options,
                );
                let o = o.reshape([total * heads * value_dim]);
                Tensor::cat(vec![o, state.reshape([states])], 0)
            });
        }
    }
}

/// A dense batch without initial state, of which only the output is used, with and without the normaliser.
#[test]
fn dense_batches_and_the_normaliser_equal_the_loop() {
    let [batch, time, heads, dim] = [2, 11, 2, 3];
    let positive = |seed| {
        values(seed, batch * time * heads * dim)
            .iter()
            .map(|v| v.abs())
            .collect()
    };
    let inputs: [Vec<f32>; 3] = [
        positive(1),
        positive(2),
        values(3, batch * time * heads * dim),
    ];
    for normaliser in [false, true] {
        agree(&format!("normaliser {normaliser}"), 1e-4, &inputs, |x| {
            let part = |i: usize| x[i].clone().reshape([batch, time, heads, dim]);
            let options = RecurrenceOptions {
                chunk_len: 4,
                normaliser,
                ..RecurrenceOptions::default()
            };
            let (q, k, v) = (part(0), part(1), part(2));
            let (o, state) =
                linear_recurrence(q, k, v, Gate::None, Write::Additive, None, &options);
            let columns = dim + usize::from(normaliser);
            assert_eq!(state.dims(), [batch, heads, dim, columns]);
            o.reshape([batch * time * heads * dim])
        });
    }
}

/// A pass over the whole equals a pass over its parts that hands the state on.
#[test]
fn the_state_carries_on() {
    let device = burn::tensor::Device::flex();
    let [time, cut, heads, dim] = [13, 9, 2, 4];
    let tensor = |seed| {
        let all = values(seed, time * heads * dim);
        Tensor::<1>::from_data(all.as_slice(), &device).reshape([1, time, heads, dim])
    };
    let (q, k, v, g) = (tensor(1), tensor(2), tensor(3), tensor(4).abs().neg());
    let beta = tensor(5).abs().narrow(3, 0, 1).reshape([1, time, heads]);
    let pass = |from: usize, len: usize, initial: Option<Tensor<4>>| {
        let part = |x: &Tensor<4>| x.clone().narrow(1, from, len);
        let gate = Gate::Vector(part(&g));
        let write = Write::Delta(beta.clone().narrow(1, from, len));
        let options = RecurrenceOptions {
            chunk_len: 8,
            ..RecurrenceOptions::default()
        };
        linear_recurrence(part(&q), part(&k), part(&v), gate, write, initial, &options)
    };
    let (whole, last) = pass(0, time, None);
    let (first, state) = pass(0, cut, None);
    let (mut outputs, mut state) = (vec![first], state);
    for t in cut..time {
        let (o, next) = pass(t, 1, Some(state));
        outputs.push(o);
        state = next;
    }
    let parts = crate::tensor_values(Tensor::cat(outputs, 1));
    close("outputs", &parts, &crate::tensor_values(whole), 1e-5);
    close(
        "state",
        &crate::tensor_values(state),
        &crate::tensor_values(last),
        1e-5,
    );
}

/// With positive features the normalised output is a weighted mean of values.
#[test]
fn the_normaliser_makes_a_mean() {
    let device = burn::tensor::Device::flex();
    let q = Tensor::<4>::ones([1, 3, 1, 2], &device);
    let v = Tensor::<1>::from_data([3.0f32, 6.0, 0.0], &device).reshape([1, 3, 1, 1]);
    let options = RecurrenceOptions {
        normaliser: true,
        ..RecurrenceOptions::default()
    };
    let (o, state) =
        linear_recurrence(q.clone(), q, v, Gate::None, Write::Additive, None, &options);
    assert_eq!(crate::tensor_values(o), [3.0, 4.5, 3.0]);
    assert_eq!(state.dims(), [1, 1, 2, 2]);
}
