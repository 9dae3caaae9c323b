//! What `anyformer bench --ops` runs: the ops, their sizes and their inputs.

use std::sync::{Arc, OnceLock};

use anyformer_ops::Tensor;
use anyformer_ops::activation::{gelu, silu, softmax, swiglu};
use anyformer_ops::attention::{AttentionOptions, cached_attention, flash_attention};
use anyformer_ops::cache::{Cache, Element};
use anyformer_ops::conv::causal_conv1d;
use anyformer_ops::dropout::{Dropout, Key};
use anyformer_ops::linear::{Precision, linear};
use anyformer_ops::long_conv::long_conv;
use anyformer_ops::loss::cross_entropy;
use anyformer_ops::norm::{add_norm, layer_norm, rms_norm};
use anyformer_ops::recurrence::{Gate, RecurrenceOptions, Write, linear_recurrence};
use anyformer_ops::scan::{ScanInputs, selective_scan};

/// An op: of the size and the flat inputs.
pub type Run = Box<dyn Fn(&[usize], &[Tensor<1>]) -> Tensor<1>>;

/// One op at one size.
pub struct Case {
    pub name: &'static str,
    /// What the table calls the size; scripts read the numbers.
    pub size: Vec<usize>,
    /// Counts of the inputs, given to `run` flat.
    pub inputs: Vec<usize>,
    pub run: Run,
    /// Inference only: no gradients.
    pub forward_only: bool,
    /// The composed form takes too long, or too much memory.
    pub kernel_only: bool,
}

fn count(size: &[usize]) -> usize {
    size.iter().product()
}

fn pointwise(
    name: &'static str,
    run: fn(&[usize], &[Tensor<1>]) -> Tensor<1>,
    inputs: usize,
) -> Case {
    let size = vec![4096, 1024];
    Case {
        name,
        inputs: vec![count(&size); inputs],
        size,
        run: Box::new(run),
        forward_only: false,
        kernel_only: false,
    }
}

fn rows(name: &'static str, run: fn(&[usize], &[Tensor<1>]) -> Tensor<1>, weights: usize) -> Case {
    let mut case = pointwise(name, run, 1);
    case.size = vec![8192, 512];
    case.inputs = [vec![count(&case.size)], vec![512; weights]].concat();
    case
}

fn two(size: &[usize], x: &Tensor<1>) -> Tensor<2> {
    x.clone().reshape([size[0], size[1]])
}

/// `[batch, time, heads, head_dim]` of a size that starts with these.
fn four(size: &[usize], x: &Tensor<1>) -> Tensor<4> {
    x.clone().reshape([size[0], size[1], size[2], size[3]])
}

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let count = x.dims().iter().product::<usize>();
    x.reshape([count])
}

fn product(size: &[usize], x: &[Tensor<1>], precision: Precision) -> Tensor<1> {
    let a = x[0].clone().reshape([size[0], size[1]]);
    let b = x[1].clone().reshape([size[2], size[1]]);
    flat(linear(a, b, None, precision))
}

fn attention(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let options = AttentionOptions {
        causal: true,
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
const CONTEXTS: [usize; 6] = [4096, 8192, 16384, 32768, 65536, 131_072];

/// One new token for each of [`CONTEXTS`] over kept keys and values: size is query heads, key heads, features. The rows of
/// the shortest context are kept once for each of its length.
fn decode(element: Element) -> Run {
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

fn gla(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(
        size,
        x,
        Gate::Vector(four(size, &decay(&x[3]))),
        Write::Additive,
        x.get(4),
    )
}

fn delta(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(size, x, Gate::None, share(size, &x[3]), x.get(4))
}

fn gated_delta(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let gate = Gate::Scalar(per_head(size, &decay(&x[3])));
    recurrence(size, x, gate, share(size, &x[4]), x.get(5))
}

fn ssd(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    recurrence(
        size,
        x,
        Gate::Scalar(per_head(size, &decay(&x[3]))),
        Write::Additive,
        x.get(4),
    )
}

/// Size is batch, time, channels, state.
fn scan(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
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
fn conv(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let input = x[0].clone().reshape([size[0], size[1], size[2]]);
    let weight = x[1].clone().reshape([size[2], size[3]]);
    flat(causal_conv1d(input, weight, None, true, None, None).0)
}

/// What a block does with its residual stream: both the sum and its norm are used.
fn sum_and_norm(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let [a, b] = [0, 1].map(|at| two(size, &x[at]));
    let [sum, y] = add_norm(a, b, x[2].clone(), x.get(3).cloned(), 1e-5);
    flat(sum) + flat(y)
}

/// Size is rows and features.
fn drop(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let dropout = Dropout {
        key: Key::new(1, 1),
        chance: 0.1,
    };
    let x = x[0].clone().reshape([1, size[0], size[1]]);
    flat(dropout.apply(0, x, None))
}

/// Size is batch, time, channels.
fn long(size: &[usize], x: &[Tensor<1>]) -> Tensor<1> {
    let input = x[0].clone().reshape([size[0], size[1], size[2]]);
    flat(long_conv(
        input,
        x[1].clone().reshape([size[2], size[1]]),
        None,
    ))
}

/// An engine over one sequence of `time` tokens, or (`time` 1) a step of `batch` sequences from their states.
fn engine(
    name: &'static str,
    run: fn(&[usize], &[Tensor<1>]) -> Tensor<1>,
    batch: usize,
    time: usize,
) -> Case {
    let (heads, dim) = (4, 128);
    let (all, few) = (batch * time * heads * dim, batch * time * heads);
    let mut inputs = vec![all; 3];
    inputs.extend(match name.trim_end_matches(" step") {
        "gla" => vec![all],
        "gated_delta" => vec![few, few],
        _ => vec![few],
    });
    if time == 1 {
        inputs.push(batch * heads * dim * dim);
    }
    Case {
        name,
        size: vec![batch, time, heads, dim],
        inputs,
        run: Box::new(run),
        forward_only: time == 1,
        kernel_only: time > 512 || time == 1,
    }
}

fn scan_case(name: &'static str, batch: usize, time: usize) -> Case {
    let (channels, state) = (1024, 16);
    let (wide, narrow) = (batch * time * channels, batch * time * state);
    let mut inputs = vec![
        wide,
        wide,
        channels,
        channels * state,
        narrow,
        narrow,
        channels,
    ];
    if time == 1 {
        inputs.push(batch * channels * state);
    }
    Case {
        name,
        size: vec![batch, time, channels, state],
        inputs,
        run: Box::new(scan),
        forward_only: time == 1,
        kernel_only: time > 512 || time == 1,
    }
}

/// All of them.
pub fn cases() -> Vec<Case> {
    let mut all = vec![
        pointwise("gelu", |s, x| flat(gelu(two(s, &x[0]))), 1),
        pointwise("silu", |s, x| flat(silu(two(s, &x[0]))), 1),
        pointwise(
            "swiglu",
            |s, x| flat(swiglu(two(s, &x[0]), two(s, &x[1]))),
            2,
        ),
        rows(
            "rms_norm",
            |s, x| flat(rms_norm(two(s, &x[0]), x[1].clone(), 1e-5)),
            1,
        ),
        rows(
            "layer_norm",
            |s, x| {
                flat(layer_norm(
                    two(s, &x[0]),
                    x[1].clone(),
                    Some(x[2].clone()),
                    1e-5,
                ))
            },
            2,
        ),
        rows("softmax", |s, x| flat(softmax(two(s, &x[0]))), 0),
    ];
    let mut entropy = rows(
        "cross_entropy",
        |s, x| {
            let targets = (0..s[0] as i64).map(|row| row % s[1] as i64).collect();
            cross_entropy(two(s, &x[0]), Arc::new(targets)).loss
        },
        0,
    );
    (entropy.size, entropy.inputs) = (vec![2048, 8192], vec![2048 * 8192]);
    all.push(entropy);
    for size in [[1024, 1024, 1024], [4096, 256, 1024]] {
        for (name, run) in [
            (
                "matmul f32",
                (|s, x| product(s, x, Precision::F32)) as fn(&[usize], &[Tensor<1>]) -> Tensor<1>,
            ),
            ("matmul bf16", |s, x| product(s, x, Precision::Bf16)),
        ] {
            all.push(Case {
                name,
                size: size.to_vec(),
                inputs: vec![size[0] * size[1], size[2] * size[1]],
                run: Box::new(run),
                forward_only: false,
                kernel_only: false,
            });
        }
    }
    for time in [512, 2048, 8192] {
        all.push(Case {
            name: "attention",
            size: vec![1, time, 8, 64],
            inputs: vec![time * 8 * 64; 3],
            run: Box::new(attention),
            forward_only: false,
            kernel_only: time > 2048,
        });
    }
    for (name, element) in [("decode", Element::F32), ("decode bf16", Element::Bf16)] {
        all.push(Case {
            name,
            size: vec![8, 2, 64],
            inputs: vec![
                CONTEXTS.len() * 8 * 64,
                CONTEXTS[0] * 2 * 64,
                CONTEXTS[0] * 2 * 64,
            ],
            run: decode(element),
            forward_only: true,
            kernel_only: true,
        });
    }
    for time in [512, 2048, 8192, 16384] {
        all.push(engine("gla", gla, 1, time));
        all.push(engine("delta", delta, 1, time));
        all.push(engine("gated_delta", gated_delta, 1, time));
        all.push(engine("ssd", ssd, 1, time));
        all.push(scan_case("scan", 1, time));
    }
    all.push(engine("gla step", gla, 128, 1));
    all.push(engine("delta step", delta, 128, 1));
    all.push(engine("gated_delta step", gated_delta, 128, 1));
    all.push(engine("ssd step", ssd, 128, 1));
    all.push(scan_case("scan step", 512, 1));
    let channels = 1024;
    all.push(Case {
        name: "conv",
        size: vec![1, 4096, channels, 4],
        inputs: vec![4096 * channels, channels * 4],
        run: Box::new(conv),
        forward_only: false,
        kernel_only: false,
    });
    for (name, weights) in [("add_rms_norm", 1), ("add_layer_norm", 2)] {
        let mut case = rows(name, sum_and_norm, weights);
        case.inputs.insert(1, case.inputs[0]);
        all.push(case);
    }
    all.push(pointwise("dropout", drop, 1));
    for time in [32, 64, 128, 256, 1024, 4096, 16384, 65536] {
        // As many tokens at every length.
        let (batch, channels) = (65536 / time, 64);
        all.push(Case {
            name: "long_conv",
            size: vec![batch, time, channels],
            inputs: vec![batch * time * channels, channels * time],
            run: Box::new(long),
            forward_only: false,
            kernel_only: time > 256,
        });
    }
    all
}
