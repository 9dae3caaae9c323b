//! Holds an op's kernel against its composed form: the output and the gradient of every input.

use burn::tensor::{Device, Tensor, TensorData};

use crate::adapter::portable;
use crate::param::tensor_values;

/// Deterministic values in [-1, 1).
pub fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn flat(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

/// Output and gradients of `sum(weights * op(inputs))`, on flat tensors that the op reshapes.
pub fn run(inputs: &[Vec<f32>], op: impl Fn(&[Tensor<1>]) -> Tensor<1>) -> Vec<Vec<f32>> {
    let device = Device::flex().autodiff();
    let leaves: Vec<Tensor<1>> = inputs
        .iter()
        .map(|input| flat(input, &device).require_grad())
        .collect();
    let y = op(&leaves);
    let weights = flat(&values(99, y.dims()[0]), &device);
    let grads = (y.clone() * weights).sum().backward();
    let mut results = vec![tensor_values(y)];
    for leaf in &leaves {
        let grad = leaf.grad(&grads).expect("every input gets a gradient");
        results.push(tensor_values(grad));
    }
    results
}

/// Asserts `max |got - want| <= tol (1e-6 + max |want|)`.
pub fn close(name: &str, got: &[f32], want: &[f32], tol: f32) {
    assert_eq!(got.len(), want.len(), "{name}: lengths differ");
    let scale = want.iter().fold(0.0f32, |a, b| a.max(b.abs())) + 1e-6;
    for (index, (a, b)) in got.iter().zip(want).enumerate() {
        let error = (a - b).abs() / scale;
        assert!(
            error <= tol,
            "{name}[{index}]: got {a}, want {b}, off by {error:e}"
        );
    }
}

/// Runs `op` as a kernel and in its composed form; asserts that they agree, and that without tracking the output is the
/// same. Returns the kernel's output.
pub fn agree(
    name: &str,
    tol: f32,
    inputs: &[Vec<f32>],
    op: impl Fn(&[Tensor<1>]) -> Tensor<1>,
) -> Vec<f32> {
    let kernel = run(inputs, &op);
    let composed = portable(|| run(inputs, &op));
    for (index, (got, want)) in kernel.iter().zip(&composed).enumerate() {
        let what = match index {
            0 => "output".to_string(),
            _ => format!("gradient {}", index - 1),
        };
        close(&format!("{name} {what}"), got, want, tol);
    }
    let plain: Vec<Tensor<1>> = inputs.iter().map(|v| flat(v, &Device::flex())).collect();
    assert_eq!(
        tensor_values(op(&plain)),
        kernel[0],
        "{name} without tracking"
    );
    kernel[0].clone()
}
