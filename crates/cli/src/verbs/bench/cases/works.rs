//! The works: each op on flat inputs of a size.

use std::sync::{Arc, Mutex, OnceLock};

use anyformer_kernels::adamw::AdamW;
use anyformer_ops::Tensor;
use anyformer_ops::activation::softmax;
use anyformer_ops::attention::{AttentionOptions, Plan, cached_attention, flash_attention};
use anyformer_ops::cache::{Cache, Element};
use anyformer_ops::conv::causal_conv1d;
use anyformer_ops::diagonal::diagonal_recurrence;
use anyformer_ops::dropout::{Dropout, Key};
use anyformer_ops::embedding::embedding;
use anyformer_ops::feature_attention::{FeatureMap, feature_attention};
use anyformer_ops::inverse::iterative_inverse;
use anyformer_ops::linear::{Precision, linear};
use anyformer_ops::long_conv::long_conv;
use anyformer_ops::norm::add_norm;
use anyformer_ops::profile::{self, Pass};
use anyformer_ops::recurrence::{Gate, RecurrenceOptions, Write, linear_recurrence};
use anyformer_ops::rope::{Rotations, inverse_frequencies, rope_by};
use anyformer_ops::scan::{ScanInputs, selective_scan};

use super::{Run, count};

pub(super) fn two(size: &[usize], x: &Tensor<1>) -> Tensor<2> {
    x.clone().reshape([size[0], size[1]])
}

/// `[batch, time, heads, head_dim]` of a size that starts with these.
fn four(size: &[usize], x: &Tensor<1>) -> Tensor<4> {
    x.clone().reshape([size[0], size[1], size[2], size[3]])
}

pub(super) fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let count = x.dims().iter().product::<usize>();
    x.reshape([count])
}

pub(super) fn product(size: &[usize], x: &[Tensor<1>], precision: Precision) -> Tensor<1> {
    let a = x[0].clone().reshape([size[0], size[1]]);
    let b = x[1].clone().reshape([size[2], size[1]]);
    flat(linear(a, b, None, precision))
}

pub(super) fn attention(size: &[usize], x: &[Tensor<1>], precision: Precision) -> Tensor<1> {
    let options = AttentionOptions {
        causal: true,
        precision,
        ..AttentionOptions::default()
    };
    flat(flash_attention(
        four(size, &x[0]),
        four(size, &x[1]),
        four(size, &x[2]),
        &options,
    ))
}

/// Contexts of one batch of [`decode`], in tokens.
pub(super) const CONTEXTS: [usize; 6] = [4096, 8192, 16384, 32768, 65536, 131_072];

/// One new token for each of [`CONTEXTS`] over kept keys and values: size is query heads, key heads, features. The rows of
/// the shortest context are kept once for each of its length.
pub(super) fn decode(element: Element) -> Run {
    let held: OnceLock<[Cache; 2]> = OnceLock::new();
    Box::new(move |size, x| {
        let [k, v] = held.get_or_init(|| {
            [&x[1], &x[2]].map(|rows| {
                let rows = rows.clone().reshape([1, CONTEXTS[0], size[1], size[2]]);
                let one = |context: &usize| {
                    let empty = Cache::new(element, 1, size[1], size[2]);
                    let repeats = 0..context / CONTEXTS[0];
                    repeats.fold(empty, |cache, _| {
                        cache.with_rows(rows.clone(), &[0, CONTEXTS[0]])
                    })
                };
                Cache::join(&CONTEXTS.iter().map(one).collect::<Vec<_>>())
            })
        });
        let options = AttentionOptions {
            causal: true,
            q_offsets: Some(Arc::new((0..=CONTEXTS.len()).collect())),
            ..AttentionOptions::default()
        };
        let q = x[0].clone().reshape([1, CONTEXTS.len(), size[0], size[2]]);
        flat(cached_attention(q, k, v, &options))
    })
}

/// Size is batch, time, heads, head_dim; the state of a step follows the four inputs of the engine.
fn recurrence(
    size: &[usize],
    x: &[Tensor<1>],
    gate: Gate,
    write: Write,
    state: Option<&Tensor<1>>,
) -> Tensor<1> {
    let initial = state.map(|state| state.clone().reshape([size[0], size[2], size[3], size[3]]));
    let k = four(size, &x[1]).mul_scalar((size[3] as f32).powf(-0.5));
    let (y, last) = linear_recurrence(
        four(size, &x[0]),
        k,
        four(size, &x[2]),
        gate,
        write,
        initial,
        &RecurrenceOptions::default(),
    );
    match state {
        // A step hands its state on: it must be made.
        Some(_) => flat(y) + last.slice([0..1, 0..1, 0..1, 0..1]).reshape([1]),
        None => flat(y),
    }
}

/// Values in (-1, 1) as decays of at most one.
fn decay(x: &Tensor<1>) -> Tensor<1> {
    x.clone().mul_scalar(0.05).sub_scalar(0.06)
}

fn per_head(size: &[usize], x: &Tensor<1>) -> Tensor<3> {
    x.clone().reshape([size[0], size[1], size[2]])
}

fn share(size: &[usize], x: &Tensor<1>) -> Write {
    Write::Delta(per_head(size, &x.clone().mul_scalar(0.4).add_scalar(0.5)))
}

pub(super) fn gla(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(
        size,
        x,
        Gate::Vector(four(size, &decay(&x[3]))),
        Write::Additive,
        x.get(4),
    )
}

pub(super) fn delta(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(size, x, Gate::None, share(size, &x[3]), x.get(4))
}

pub(super) fn gated_delta(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let gate = Gate::Scalar(per_head(size, &decay(&x[3])));
    recurrence(size, x, gate, share(size, &x[4]), x.get(5))
}

pub(super) fn ssd(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(
        size,
        x,
        Gate::Scalar(per_head(size, &decay(&x[3]))),
        Write::Additive,
        x.get(4),
    )
}

/// Size is batch, time, channels, state.
pub(super) fn scan(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let [batch, time, channels, state] = [size[0], size[1], size[2], size[3]];
    let wide = |x: &Tensor<1>| x.clone().reshape([batch, time, channels]);
    let shared = |x: &Tensor<1>| x.clone().reshape([batch, time, state]);
    let inputs = ScanInputs {
        u: wide(&x[0]),
        delta: wide(&x[1]),
        delta_bias: x[2].clone(),
        a: x[3].clone().reshape([channels, state]).abs().neg(),
        b: shared(&x[4]),
        c: shared(&x[5]),
        d: x[6].clone(),
    };
    let initial = x
        .get(7)
        .map(|x| x.clone().reshape([batch, channels, state]));
    flat(selective_scan(inputs, initial, None).0)
}

/// Size is batch, time, channels, width.
pub(super) fn conv(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let input = x[0].clone().reshape([size[0], size[1], size[2]]);
    let weight = x[1].clone().reshape([size[2], size[3]]);
    flat(causal_conv1d(input, weight, None, true, None, None).0)
}

/// What a block does with its residual stream: both the sum and its norm are used.
pub(super) fn sum_and_norm(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let [a, b] = [0, 1].map(|at| two(size, &x[at]));
    let [sum, y] = add_norm(a, b, x[2].clone(), x.get(3).cloned(), 1e-5);
    flat(sum) + flat(y)
}

/// Size is rows and features.
pub(super) fn drop(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let dropout = Dropout {
        key: Key::new(1, 1),
        chance: 0.1,
    };
    let x = x[0].clone().reshape([1, size[0], size[1]]);
    flat(dropout.apply(0, x, None))
}

/// Size is batch, time, channels.
pub(super) fn long(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let input = x[0].clone().reshape([size[0], size[1], size[2]]);
    flat(long_conv(
        input,
        x[1].clone().reshape([size[2], size[1]]),
        None,
    ))
}

/// One update of a parameter of `size`, as the optimiser makes it.
pub(super) fn update() -> Run {
    let held: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());
    Box::new(move |size, x| {
        let mut arrays = held.lock().expect("no update panics");
        arrays.resize_with(4, || vec![1e-3; count(size)]);
        let [p, g, m, v] = &mut arrays[..] else {
            unreachable!("four arrays");
        };
        let rule = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 1,
            gradient_scale: 1.0,
        };
        // Seven arrays of f32: four are read, three written.
        let moved = |_: &()| [7 * 4 * count(size) as u64, 0];
        profile::span("AdamW", Pass::Update, moved, || rule.update(p, g, m, v));
        x[0].clone()
    })
}

/// Size is batch, time, heads, head_dim.
pub(super) fn rotate() -> Run {
    let held: OnceLock<Arc<Rotations>> = OnceLock::new();
    Box::new(move |size, x| {
        let rotations = held.get_or_init(|| {
            let positions: Vec<usize> = (0..size[1]).collect();
            let frequencies = inverse_frequencies(size[3], 10_000.0);
            Arc::new(Rotations::new(&positions, &frequencies))
        });
        flat(rope_by(four(size, &x[0]), rotations.clone()))
    })
}

/// Size is tokens, vocabulary, features.
pub(super) fn look_up(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let ids = (0..size[0]).map(|token| (token * 7 % size[1]) as u32);
    let table = x[0].clone().reshape([size[1], size[2]]);
    flat(embedding(table, Arc::new(ids.collect()), [1, size[0]]))
}

pub(super) fn linear_attention(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let [q, k, v] = [0, 1, 2].map(|at| four(size, &x[at]));
    flat(feature_attention(q, k, v, &FeatureMap::Elu, true, None))
}

/// Every token sees the 128 before it and behind it, and the first 16.
pub(super) fn listed_attention() -> Run {
    const SIDE: usize = 128;
    const FIRST: usize = 16;
    let held: OnceLock<Arc<Plan>> = OnceLock::new();
    Box::new(move |size, x| {
        let time = size[1];
        let plan = held.get_or_init(|| {
            Arc::new(Plan::new(
                time,
                1,
                64,
                |_, queries| {
                    let near = queries.start.saturating_sub(SIDE)..(queries.end + SIDE).min(time);
                    [0..FIRST.min(near.start), near].into()
                },
                |_, query, key| key < FIRST || query.abs_diff(key) <= SIDE,
            ))
        });
        let options = AttentionOptions {
            plans: Some(Arc::new(vec![plan.clone(); size[0]])),
            ..AttentionOptions::default()
        };
        let [q, k, v] = [0, 1, 2].map(|at| four(size, &x[at]));
        flat(flash_attention(q, k, v, &options))
    })
}

/// Size is batch, time, complex states.
pub(super) fn diagonal(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let v = x[0].clone().reshape([size[0], size[1], 2 * size[2]]);
    let lambda = x[1].clone().mul_scalar(0.7).reshape([2, size[2]]);
    flat(diagonal_recurrence(v, lambda, None, None).0)
}

/// Size is matrices, rows, steps.
pub(super) fn inverse(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let rows = x[0].clone().reshape([size[0] * size[1], size[1]]);
    let a = softmax(rows).reshape([size[0], size[1], size[1]]);
    flat(iterative_inverse(a, size[2]))
}
