//! Pointwise activations, gated units, and softmax over the last dimension.
#![allow(unsafe_code)]

pub use anyformer_kernels::activation::Activation;
use anyformer_kernels::glu as unit;
use anyformer_kernels::softmax as kernel;
use burn::tensor::{Tensor, activation as composed};

use crate::adapter::{Array, Erased, Forward, Kernel, View, apply, erase, filled, on_cpu};

/// Runs a kernel that has one output.
pub(crate) fn single<const N: usize, const D: usize>(
    kernel: impl Kernel,
    inputs: [Erased; N],
) -> Tensor<D> {
    match apply(kernel, inputs).pop() {
        Some(output) => output.into_tensor(),
        None => unreachable!("a kernel has an output"),
    }
}

/// The two outputs of a kernel.
pub(crate) fn both<const A: usize, const B: usize>(outputs: Vec<Erased>) -> (Tensor<A>, Tensor<B>) {
    let mut outputs = outputs.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(a), Some(b)) => (a.into_tensor(), b.into_tensor()),
        _ => unreachable!("two outputs"),
    }
}

/// One output that saves nothing.
pub(crate) fn output(shape: &[usize], data: Vec<f32>) -> Forward {
    Forward {
        outputs: vec![Array::new(shape, data)],
        saved: vec![],
    }
}

/// The gradient of the only output; it is there whenever a backward runs.
pub(crate) fn only<'a>(grads: &[Option<View<'a>>]) -> View<'a> {
    match grads {
        [Some(grad)] => *grad,
        _ => unreachable!("the only output has a gradient"),
    }
}

#[derive(Debug)]
struct Pointwise(Activation);

impl Kernel for Pointwise {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let x = inputs[0];
        // SAFETY: the kernel writes every value.
        let y = unsafe { filled(x.data.len(), |y| self.0.forward(x.data, y)) };
        output(x.shape, y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let x = inputs[0];
        let dy = only(grads).data;
        // SAFETY: the kernel writes every value.
        let dx = unsafe { filled(dy.len(), |dx| self.0.backward(x.data, dy, dx)) };
        vec![Some(Array::new(x.shape, dx))]
    }
}

/// Applies `activation` to every value.
pub fn activate<const D: usize>(x: Tensor<D>, activation: Activation) -> Tensor<D> {
    if on_cpu(&x) {
        return single(Pointwise(activation), [erase(x)]);
    }
    match activation {
        Activation::Silu => x.clone() * composed::sigmoid(x),
        Activation::Gelu => {
            let inner = x.clone() * std::f32::consts::FRAC_1_SQRT_2;
            x * 0.5 * (inner.erf() + 1.0)
        }
        Activation::GeluTanh => {
            let cubic = x.clone() * x.clone() * x.clone() * 0.044_715;
            let inner = (x.clone() + cubic) * (2.0 / std::f64::consts::PI).sqrt();
            x * 0.5 * (inner.tanh() + 1.0)
        }
        Activation::Relu => composed::relu(x),
        Activation::Sigmoid => composed::sigmoid(x),
        Activation::Softplus => composed::log_sigmoid(x.neg()).neg(),
        Activation::LogSigmoid { temperature } => composed::log_sigmoid(x) / temperature,
    }
}

/// `x sigmoid(x)`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(x, Activation::Silu)
}

/// `x Phi(x)`, with the exact normal distribution function.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(x, Activation::Gelu)
}

/// The tanh approximation of [`gelu`] that GPT-2 uses.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(x, Activation::GeluTanh)
}

/// `max(x, 0)`.
pub fn relu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(x, Activation::Relu)
}

/// `1 / (1 + e^-x)`.
pub fn sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(x, Activation::Sigmoid)
}

/// `ln(1 + e^x)`.
pub fn softplus<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(x, Activation::Softplus)
}

/// `ln sigmoid(x) / temperature`.
pub fn log_sigmoid<const D: usize>(x: Tensor<D>, temperature: f32) -> Tensor<D> {
    activate(x, Activation::LogSigmoid { temperature })
}

#[derive(Debug)]
struct GatedUnit(Activation);

impl Kernel for GatedUnit {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (a, b) = (inputs[0], inputs[1]);
        // SAFETY: the kernel writes every value.
        let y = unsafe { filled(a.data.len(), |y| self.0.gated(a.data, b.data, y)) };
        output(a.shape, y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (a, b) = (inputs[0], inputs[1]);
        let (dy, mut db) = (only(grads).data, Vec::new());
        let both = |da: &mut [f32]| {
            // SAFETY: the kernel writes every value of both.
            db = unsafe {
                filled(dy.len(), |db| {
                    self.0.gated_backward(a.data, b.data, dy, da, db)
                })
            };
        };
        // SAFETY: as above.
        let da = unsafe { filled(dy.len(), both) };
        vec![Some(Array::new(a.shape, da)), Some(Array::new(b.shape, db))]
    }
}

/// `activation(a) b`, both of the same shape.
pub fn gated<const D: usize>(a: Tensor<D>, b: Tensor<D>, activation: Activation) -> Tensor<D> {
    assert_eq!(a.dims(), b.dims(), "gated unit: shapes differ");
    if on_cpu(&a) {
        return single(GatedUnit(activation), [erase(a), erase(b)]);
    }
    activate(a, activation) * b
}

/// `silu(a) b` (Shazeer, 2020).
pub fn swiglu<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    gated(a, b, Activation::Silu)
}

/// `x silu(gate)`: an output gate.
pub fn mul_silu<const D: usize>(x: Tensor<D>, gate: Tensor<D>) -> Tensor<D> {
    gated(gate, x, Activation::Silu)
}

#[derive(Debug)]
struct Glu;

impl Kernel for Glu {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let x = inputs[0];
        let (last, mut shape) = (x.shape.len() - 1, x.shape.to_vec());
        shape[last] /= 2;
        // SAFETY: the kernel writes every value.
        let y = unsafe { filled(x.data.len() / 2, |y| unit::glu(shape[last], x.data, y)) };
        output(&shape, y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, dy) = (inputs[0], only(grads));
        let dim = dy.shape[dy.shape.len() - 1];
        let fill = |dx: &mut [f32]| unit::glu_backward(dim, x.data, dy.data, dx);
        // SAFETY: the kernel writes every value.
        let dx = unsafe { filled(x.data.len(), fill) };
        vec![Some(Array::new(x.shape, dx))]
    }
}

/// The first half of the last dimension times the sigmoid of the second (Dauphin et al., 2017).
pub fn glu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let dim = x.dims()[D - 1] / 2;
    assert!(dim > 0 && x.dims()[D - 1] == 2 * dim, "glu: an odd width");
    if on_cpu(&x) {
        return single(Glu, [erase(x)]);
    }
    x.clone().narrow(D - 1, 0, dim) * composed::sigmoid(x.narrow(D - 1, dim, dim))
}

#[derive(Debug)]
struct Softmax;

impl Kernel for Softmax {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let x = inputs[0];
        let Some(dim) = x.shape.last().filter(|_| !x.data.is_empty()) else {
            return output(x.shape, x.data.to_vec());
        };
        // SAFETY: the kernel writes every value, and reads one only after.
        let y = unsafe { filled(x.data.len(), |y| kernel::softmax(*dim, x.data, y)) };
        output(x.shape, y)
    }

    fn backward(
        &self,
        _inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (y, dy) = (saved[0], only(grads).data);
        let Some(dim) = y.shape.last().filter(|_| !y.data.is_empty()) else {
            return vec![Some(Array::new(y.shape, dy.to_vec()))];
        };
        let fill = |dx: &mut [f32]| kernel::softmax_backward(*dim, y.data, dy, dx);
        // SAFETY: the kernel writes every value.
        let dx = unsafe { filled(y.data.len(), fill) };
        vec![Some(Array::new(y.shape, dx))]
    }

    fn keeps_output(&self) -> bool {
        true
    }
}

/// Softmax over the last dimension.
pub fn softmax<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if on_cpu(&x) {
        return single(Softmax, [erase(x)]);
    }
    composed::softmax(x, D - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    const ALL: [Activation; 7] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Sigmoid,
        Activation::Softplus,
        Activation::LogSigmoid { temperature: 16.0 },
    ];

    fn spread(seed: u64, n: usize) -> Vec<f32> {
        let mut x: Vec<f32> = values(seed, n).iter().map(|v| v * 8.0).collect();
        x[0] = 0.0;
        x
    }

    #[test]
    fn activations_agree_with_composed() {
        for activation in ALL {
            agree(&format!("{activation:?}"), 3e-6, &[spread(1, 105)], |v| {
                activate(v[0].clone().reshape([3, 5, 7]), activation).reshape([105])
            });
        }
    }

    #[test]
    fn names_mean_what_they_say() {
        let pairs: [(fn(Tensor<1>) -> Tensor<1>, Activation); 6] = [
            (silu, Activation::Silu),
            (gelu, Activation::Gelu),
            (gelu_tanh, Activation::GeluTanh),
            (relu, Activation::Relu),
            (sigmoid, Activation::Sigmoid),
            (softplus, Activation::Softplus),
        ];
        let x = [spread(2, 31)];
        for (named, activation) in pairs {
            let got = agree("named", 3e-6, &x, |v| named(v[0].clone()));
            let want = agree("enum", 3e-6, &x, |v| activate(v[0].clone(), activation));
            assert_eq!(got, want);
        }
    }

    #[test]
    fn gated_units_agree_with_composed() {
        let inputs = [spread(3, 66), values(4, 66)];
        for activation in ALL {
            agree("gated", 3e-6, &inputs, |v| {
                gated(v[0].clone(), v[1].clone(), activation)
            });
        }
        let unit = agree("swiglu", 3e-6, &inputs, |v| {
            swiglu(v[0].clone(), v[1].clone())
        });
        let gate = agree("mul_silu", 3e-6, &inputs, |v| {
            mul_silu(v[1].clone(), v[0].clone())
        });
        assert_eq!(unit, gate);
    }

    #[test]
    fn units_over_halves_agree_with_composed() {
        agree("glu", 3e-6, &[spread(6, 84)], |v| {
            glu(v[0].clone().reshape([2, 3, 14])).reshape([42])
        });
    }

    #[test]
    fn softmax_agrees_with_composed() {
        let y = agree("softmax", 3e-6, &[spread(5, 4 * 33)], |v| {
            softmax(v[0].clone().reshape([2, 2, 33])).reshape([4 * 33])
        });
        for row in y.chunks(33) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }
}
