//! The engines on a GPU (or software Vulkan) against the CPU kernels: outputs and one gradient each. Run by
//! `.ci/extra`, which builds with the feature `gpu` and installs a driver.
#![cfg(feature = "gpu")]

use anyformer_ops::attention::{AttentionOptions, flash_attention};
use anyformer_ops::conv::causal_conv1d;
use anyformer_ops::recurrence::{Gate, RecurrenceOptions, Write, linear_recurrence};
use anyformer_ops::scan::{ScanInputs, selective_scan};
use anyformer_ops::{Device, Tensor, device, tensor_values};

/// Numbers in [-1, 1), the same on every device.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn tensor<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    let values = numbers(seed, shape.iter().product());
    Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
}

/// Output and gradient of the first input on both devices.
fn agree(name: &str, op: impl Fn(Tensor<4>, &Device) -> Tensor<4>) {
    let run = |device: Device| {
        let device = device.autodiff();
        let x = tensor(1, [2, 9, 2, 4], &device).require_grad();
        let y = op(x.clone(), &device);
        let weight = tensor(2, y.dims(), &device);
        let grads = (y.clone() * weight).sum().backward();
        let grad = x.grad(&grads).expect("a gradient");
        [tensor_values(y), tensor_values(grad)]
    };
    let gpu = device("gpu").expect("a Vulkan adapter");
    for (got, want) in run(gpu).iter().zip(&run(Device::flex())) {
        let scale = want
            .iter()
            .fold(1e-6f32, |most, value| most.max(value.abs()));
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() / scale < 1e-4,
                "{name}: {got} on the GPU, {want} on the CPU"
            );
        }
    }
}

#[test]
#[ignore = "needs a Vulkan driver; see .ci/extra"]
fn engines_agree_with_the_cpu() {
    agree("attention", |q, device| {
        let (k, v) = (
            tensor(3, [2, 9, 1, 4], device),
            tensor(4, [2, 9, 1, 4], device),
        );
        let options = AttentionOptions {
            causal: true,
            ..AttentionOptions::default()
        };
        flash_attention(q, k, v, &options)
    });
    agree("recurrence", |q, device| {
        let (k, v) = (
            tensor(3, [2, 9, 2, 4], device),
            tensor(4, [2, 9, 2, 3], device),
        );
        let gate = Gate::Vector(tensor(5, [2, 9, 2, 4], device).abs().neg());
        let write = Write::Delta(tensor(6, [2, 9, 2], device).abs());
        linear_recurrence(q, k, v, gate, write, None, &RecurrenceOptions::default()).0
    });
    agree("scan", |x, device| {
        let inputs = ScanInputs {
            u: x.reshape([2, 9, 8]),
            delta: tensor(3, [2, 9, 8], device),
            delta_bias: tensor(4, [8], device),
            a: tensor(5, [8, 3], device).abs().neg(),
            b: tensor(6, [2, 9, 3], device),
            c: tensor(7, [2, 9, 3], device),
            d: tensor(8, [8], device),
        };
        selective_scan(inputs, None, None).0.reshape([2, 9, 2, 4])
    });
    agree("convolution", |x, device| {
        let weight = tensor(3, [8, 4], device);
        causal_conv1d(x.reshape([2, 9, 8]), weight, None, true, None, None)
            .0
            .reshape([2, 9, 2, 4])
    });
}
