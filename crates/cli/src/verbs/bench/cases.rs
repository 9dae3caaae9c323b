//! What `anyformer bench --ops` runs: the ops, their sizes and their inputs.

mod works;

use std::sync::Arc;

use anyformer_ops::Tensor;
use anyformer_ops::activation::{gelu, silu, softmax, swiglu};
use anyformer_ops::cache::Element;
use anyformer_ops::linear::Precision;
use anyformer_ops::loss::cross_entropy;
use anyformer_ops::norm::{layer_norm, rms_norm};

use works::{
    CONTEXTS, attention, conv, decode, delta, diagonal, drop, flat, gated_delta, gla, inverse,
    linear_attention, listed_attention, long, look_up, product, rotate, scan, ssd, sum_and_norm,
    two, update,
};

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
    let size = [4096, 1024];
    gradients(name, &size, vec![count(&size); inputs], Box::new(run))
}

/// An op forward and backward, as a kernel and composed.
fn gradients(name: &'static str, size: &[usize], inputs: Vec<usize>, run: Run) -> Case {
    Case {
        name,
        size: size.to_vec(),
        inputs,
        run,
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
            let inputs = vec![size[0] * size[1], size[2] * size[1]];
            all.push(gradients(name, &size, inputs, Box::new(run)));
        }
    }
    for (name, precision) in [
        ("attention", Precision::F32),
        ("attention bf16", Precision::Bf16),
    ] {
        for time in [512, 2048, 8192] {
            all.push(Case {
                name,
                size: vec![1, time, 8, 64],
                inputs: vec![time * 8 * 64; 3],
                run: Box::new(move |size, x| attention(size, x, precision)),
                forward_only: false,
                kernel_only: time > 2048,
            });
        }
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
    all.push(gradients(
        "conv",
        &[1, 4096, channels, 4],
        vec![4096 * channels, channels * 4],
        Box::new(conv),
    ));
    for (name, weights) in [("add_rms_norm", 1), ("add_layer_norm", 2)] {
        let mut case = rows(name, sum_and_norm, weights);
        case.inputs.insert(1, case.inputs[0]);
        all.push(case);
    }
    all.push(pointwise("dropout", drop, 1));
    let wide = [1, 4096, 8, 64];
    all.push(gradients("rope", &wide, vec![count(&wide)], rotate()));
    all.push(gradients(
        "embedding",
        &[8192, 32768, 512],
        vec![32768 * 512],
        Box::new(look_up),
    ));
    all.push(gradients(
        "linear_attention",
        &wide,
        vec![count(&wide); 3],
        Box::new(linear_attention),
    ));
    all.push(gradients(
        "listed attention",
        &wide,
        vec![count(&wide); 3],
        listed_attention(),
    ));
    all.push(gradients(
        "diagonal",
        &[1, 4096, 512],
        vec![4096 * 1024, 1024],
        Box::new(diagonal),
    ));
    all.push(gradients(
        "inverse",
        &[16, 64, 6],
        vec![16 * 64 * 64],
        Box::new(inverse),
    ));
    let mut adamw = pointwise("adamw", |_, x| x[0].clone(), 0);
    (adamw.inputs, adamw.run) = (vec![1], update());
    (adamw.forward_only, adamw.kernel_only) = (true, true);
    all.push(adamw);
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
