//! The forms of Long Range Arena's released code, against loops in f64 over the described equations.

use anyformer_mixers::{Context, Options, token_mixer};
use anyformer_ops::{Builder, Device, ParamStore, tensor_values};
use anyformer_testkit::{tolerance, uniform};
use serde_json::{Value, json};

const DIM: usize = 8;
const HEADS: usize = 2;
const WIDTH: usize = DIM / HEADS;
const TIME: usize = 12;

type Rows = Vec<Vec<f64>>;

/// The mixer's output over one sequence, its input and its weights.
fn run(name: &str, mut options: Value) -> (Vec<f32>, Rows, ParamStore) {
    options["heads"] = json!(HEADS);
    let device = Device::flex();
    let builder = Builder::new(&device, 2);
    let options: Options = options.as_object().cloned().expect("a table");
    let entry = token_mixer(name).expect("registered");
    let mixer = (entry.build)(DIM, &options, &builder).expect("builds");
    let x = uniform(5, [1, TIME, DIM], &device);
    let y = mixer.forward(x.clone(), &Context::default(), None);
    let input = tensor_values(x);
    let input = input
        .chunks(DIM)
        .map(|row| row.iter().map(|v| f64::from(*v)).collect());
    (
        tensor_values(y.expect("runs").0),
        input.collect(),
        builder.store(),
    )
}

/// `x Wᵀ`, rows of all heads.
fn project(x: &Rows, store: &ParamStore, name: &str) -> Rows {
    let weight = store
        .get(&format!("{name}.weight"))
        .expect("there")
        .values();
    let row = |x: &Vec<f64>| {
        let outputs = weight.chunks(DIM);
        outputs
            .map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
            .collect()
    };
    x.iter().map(row).collect()
}

/// The features of a head.
fn of(row: &[f64], head: usize) -> &[f64] {
    &row[head * WIDTH..(head + 1) * WIDTH]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Means of `values` by the exponentials of `logits`.
fn softmax(logits: &[f64], values: &[&[f64]]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
    let mean = |at: usize| {
        let weighted = logits
            .iter()
            .zip(values)
            .map(|(logit, value)| logit.exp() * value[at]);
        weighted.sum::<f64>() / total
    };
    (0..WIDTH).map(mean).collect()
}

fn agree(name: &str, got: &[f32], want: &Rows) {
    let want: Vec<f32> = want.iter().flatten().map(|value| *value as f32).collect();
    let close = tolerance::check(name, got, &want, 2e-5);
    assert!(close.is_ok(), "{close:?}");
}

/// ReLU features without a random matrix.
#[test]
fn performer_is_relu_linear_attention() {
    let (got, x, store) = run(
        "performer",
        json!({"kernel": "lra_compat", "causal": false}),
    );
    let phi = |row: &[f64]| -> Vec<f64> { row.iter().map(|v| v.max(0.0) + 1e-3).collect() };
    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| project(&x, &store, name));
    let token = |i: usize| -> Vec<f64> {
        let head = |h: usize| {
            let weights: Vec<f64> = k
                .iter()
                .map(|k| dot(&phi(of(&q[i], h)), &phi(of(k, h))))
                .collect();
            let total: f64 = weights.iter().sum();
            (0..WIDTH)
                .map(|at| {
                    weights
                        .iter()
                        .zip(&v)
                        .map(|(w, v)| w * of(v, h)[at])
                        .sum::<f64>()
                        / total
                })
                .collect::<Vec<f64>>()
        };
        (0..HEADS).flat_map(head).collect()
    };
    let o = (0..TIME).map(token).collect();
    agree("performer", &got, &project(&o, &store, "o_proj"));
    assert!(store.get("projection_matrix").is_none());
}

/// Blocks are strided, the second attention sees the sum of all blocks, the two are added.
#[test]
fn sinkhorn_sorts_nothing() {
    let (got, x, store) = run("sinkhorn", json!({"block": 4, "lra_compat": true}));
    let count = TIME / 4;
    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| project(&x, &store, name));
    let sum = |x: &Rows, offset: usize, h: usize| -> Vec<f64> {
        let places = offset * count..(offset + 1) * count;
        let tokens = &x[places];
        (0..WIDTH)
            .map(|at| tokens.iter().map(|row| of(row, h)[at]).sum())
            .collect()
    };
    let token = |i: usize| -> Vec<f64> {
        let head = |h: usize| {
            let scale = (WIDTH as f64).powf(-0.5);
            let q = of(&q[i], h);
            let own: Vec<usize> = (0..TIME).filter(|t| t % count == i % count).collect();
            let logits: Vec<f64> = own.iter().map(|t| scale * dot(q, of(&k[*t], h))).collect();
            let values: Vec<&[f64]> = own.iter().map(|t| of(&v[*t], h)).collect();
            let first = softmax(&logits, &values);
            let keys: Rows = (0..4).map(|offset| sum(&k, offset, h)).collect();
            let values: Rows = (0..4).map(|offset| sum(&v, offset, h)).collect();
            let logits: Vec<f64> = keys.iter().map(|k| scale * dot(q, k)).collect();
            let values: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
            let second = softmax(&logits, &values);
            first
                .iter()
                .zip(second)
                .map(|(a, b)| a + b)
                .collect::<Vec<f64>>()
        };
        (0..HEADS).flat_map(head).collect()
    };
    let o = (0..TIME).map(token).collect();
    agree("sinkhorn", &got, &project(&o, &store, "o_proj"));
}

/// One chunk: every token sees all, itself too, with long keys and scores times the root of the width.
#[test]
fn reformer_multiplies_by_the_root() {
    let options = json!({"chunk": TIME, "hashes": 1, "buckets": 10, "lra_compat": true});
    let (got, x, store) = run("reformer", options);
    let [q, v] = ["query_key", "value"].map(|name| project(&x, &store, name));
    let token = |i: usize| -> Vec<f64> {
        let head = |h: usize| {
            let root = (WIDTH as f64).sqrt();
            let logits: Vec<f64> = q
                .iter()
                .map(|k| root * dot(of(&q[i], h), of(k, h)))
                .collect();
            let values: Vec<&[f64]> = v.iter().map(|v| of(v, h)).collect();
            softmax(&logits, &values)
        };
        (0..HEADS).flat_map(head).collect()
    };
    agree("reformer", &got, &(0..TIME).map(token).collect());
    assert!(store.get("o_proj.weight").is_none());
}
