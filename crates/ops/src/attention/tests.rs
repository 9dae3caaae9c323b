use super::*;
use crate::check::{agree, values};

fn dropout(chance: f32) -> Placed {
    let key = crate::dropout::Key::new(1, 2);
    crate::dropout::Dropout { key, chance }.at(9)
}

#[test]
fn kernel_equals_the_matrix_form() {
    let (heads, kv_heads, head_dim) = (4, 2, 6);
    let (q_offsets, k_offsets) = (vec![0, 3, 3, 12], vec![0, 7, 7, 16]);
    let (queries, keys) = (12, 16);
    let inputs = [
        values(1, queries * heads * head_dim),
        values(2, keys * kv_heads * head_dim),
        values(3, keys * kv_heads * head_dim),
    ];
    for causal in [true, false] {
        for (window, chance) in [(None, 0.0), (Some(3), 0.0), (None, 0.4)] {
            for alibi in [None, Some(Arc::new(vec![0.5, 0.25, 0.125, 0.1]))] {
                let options = AttentionOptions {
                    causal,
                    window,
                    alibi: alibi.clone(),
                    dropout: (chance > 0.0).then_some(dropout(chance)),
                    scale: None,
                    q_offsets: Some(Arc::new(q_offsets.clone())),
                    k_offsets: Some(Arc::new(k_offsets.clone())),
                    ..AttentionOptions::default()
                };
                let name =
                    format!("causal {causal} window {window:?} alibi {alibi:?} dropout {chance}");
                agree(&name, 1e-4, &inputs, |x| {
                    let keys = [1, keys, kv_heads, head_dim];
                    let o = flash_attention(
                        x[0].clone().reshape([1, queries, heads, head_dim]),
                        x[1].clone().reshape(keys),
                        x[2].clone().reshape(keys),
                        &options,
                    );
                    o.reshape([queries * heads * head_dim])
                });
            }
        }
    }
}

#[test]
fn biases_numbers_and_sums_equal_the_matrix_form() {
    let (heads, kv_heads, head_dim) = (4, 2, 6);
    let (queries, keys, distances) = (12, 16, 5);
    let inputs = [
        values(1, queries * heads * head_dim),
        values(2, keys * kv_heads * head_dim),
        values(3, keys * kv_heads * head_dim),
        values(4, heads * distances),
    ];
    let tensors = |x: &[Tensor<1>]| {
        let keys = [1, keys, kv_heads, head_dim];
        [
            x[0].clone().reshape([1, queries, heads, head_dim]),
            x[1].clone().reshape(keys),
            x[2].clone().reshape(keys),
        ]
    };
    for starts in [None, Some(Arc::new(vec![2, 0, 1]))] {
        let options = AttentionOptions {
            causal: true,
            starts,
            q_offsets: Some(Arc::new(vec![0, 3, 3, 12])),
            k_offsets: Some(Arc::new(vec![0, 7, 7, 16])),
            ids: Some([
                Arc::new((0..12).map(|at| at % 5).collect()),
                Arc::new((0..16).map(|at| at % 4).collect()),
            ]),
            ..AttentionOptions::default()
        };
        agree("biased", 1e-4, &inputs, |x| {
            let table = x[3].clone().reshape([heads, distances]);
            let o = biased_attention(tensors(x), table, 2, &options);
            o.reshape([queries * heads * head_dim])
        });
        agree("sums", 1e-4, &inputs[..3], |x| {
            let [q, k, v] = tensors(x);
            let (o, lse) = attention_with_sums(q, k, v, &options);
            let row = |lse: Tensor<3>| lse.reshape([queries * heads]);
            Tensor::cat(vec![o.reshape([queries * heads * head_dim]), row(lse)], 0)
        });
    }
}

#[test]
fn attention_over_parts_is_joined() {
    let shape = [1, 9, 2, 4];
    let inputs = [values(1, 72), values(2, 72), values(3, 72)];
    let both = crate::check::run(&inputs, |x| {
        let [q, k, v] = [0, 1, 2].map(|at| x[at].clone().reshape(shape));
        let part = |from: usize, count: usize| {
            let [k, v] = [&k, &v].map(|x| x.clone().narrow(1, from, count));
            attention_with_sums(q.clone(), k, v, &AttentionOptions::default())
        };
        joined(vec![part(0, 3), part(3, 6)]).reshape([72])
    });
    let whole = crate::check::run(&inputs, |x| {
        let [q, k, v] = [0, 1, 2].map(|at| x[at].clone().reshape(shape));
        flash_attention(q, k, v, &AttentionOptions::default()).reshape([72])
    });
    for (got, want) in both.iter().zip(&whole) {
        crate::check::close("joined", got, want, 1e-5);
    }
}

#[test]
fn listed_keys_equal_the_matrix_form() {
    let (time, heads, head_dim) = (20, 2, 4);
    let offsets = Arc::new(vec![0, 0, 3, 20]);
    let inputs = [1, 2, 3].map(|seed| values(seed, time * heads * head_dim));
    // Every other key for one head, a window for the other; the first query sees nothing.
    let sees = |head: usize, query: usize, key: usize| {
        query > 0
            && match head {
                0 => key.is_multiple_of(2),
                _ => query.abs_diff(key) <= 2,
            }
    };
    let plan = |ends: &[usize]| {
        let time = ends[1] - ends[0];
        Arc::new(Plan::new(time, heads, 8, |_, _| vec![0..time], sees))
    };
    let options = AttentionOptions {
        plans: Some(Arc::new(offsets.windows(2).map(plan).collect())),
        q_offsets: Some(offsets.clone()),
        k_offsets: Some(offsets.clone()),
        dropout: Some(dropout(0.3)),
        ..AttentionOptions::default()
    };
    agree("listed", 1e-4, &inputs, |x| {
        let shape = [1, time, heads, head_dim];
        let [q, k, v] = [0, 1, 2].map(|at: usize| x[at].clone().reshape(shape));
        flash_attention(q, k, v, &options).reshape([time * heads * head_dim])
    });
}
