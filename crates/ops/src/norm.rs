//! Norms over the last dimension.
#![allow(unsafe_code)]

use anyformer_kernels::norm::{self as kernel, After, Gate, Rows};
use burn::tensor::Tensor;

use crate::activation::{both, only, output, silu, single};
use crate::adapter::{Array, Forward, Kernel, View, apply, erase, filled, on_cpu, or_zeros};

/// RMS or L2 norm; inputs `x` and, if `weighted`, the weight.
#[derive(Debug)]
struct RmsNorm {
    rows: Rows,
    weighted: bool,
}

impl RmsNorm {
    fn weight<'a>(&self, inputs: &[View<'a>]) -> Option<View<'a>> {
        self.weighted.then(|| inputs[1])
    }
}

impl Kernel for RmsNorm {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let x = inputs[0];
        let weight = self.weight(inputs).map(|weight| weight.data);
        let fill = |y: &mut [f32]| kernel::rms_norm(self.rows, x.data, weight, y);
        // SAFETY: the kernel writes every value, and reads one only after.
        let y = unsafe { filled(x.data.len(), fill) };
        output(x.shape, y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, dy) = (inputs[0], only(grads).data);
        let weight = self.weight(inputs);
        let mut dw = vec![0.0; weight.map_or(0, |weight| weight.data.len())];
        let fill = |dx: &mut [f32]| {
            let (data, dw) = (
                weight.map(|weight| weight.data),
                weight.map(|_| &mut dw[..]),
            );
            kernel::rms_norm_backward(self.rows, x.data, data, dy, dx, dw);
        };
        // SAFETY: the kernel writes every value, and reads one only after.
        let dx = unsafe { filled(x.data.len(), fill) };
        let mut all = vec![Some(Array::new(x.shape, dx))];
        all.extend(weight.map(|weight| Some(Array::new(weight.shape, dw))));
        all
    }
}

/// `x / sqrt(mean x^2 + eps) weight` over the last dimension (Zhang and Sennrich, 2019).
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f32) -> Tensor<D> {
    let dim = x.dims()[D - 1];
    assert_eq!(weight.dims()[0], dim, "rms norm: weight");
    if on_cpu(&x) {
        let kernel = RmsNorm {
            rows: Rows::mean(dim, eps),
            weighted: true,
        };
        return single(kernel, [erase(x), erase(weight)]);
    }
    let root = (x.clone() * x.clone())
        .mean_dim(D - 1)
        .add_scalar(eps)
        .sqrt();
    x / root * weight.unsqueeze()
}

/// `x / sqrt(sum x^2 + eps)` over the last dimension.
pub fn l2_normalise<const D: usize>(x: Tensor<D>, eps: f32) -> Tensor<D> {
    if on_cpu(&x) {
        let kernel = RmsNorm {
            rows: Rows::length(x.dims()[D - 1], eps),
            weighted: false,
        };
        return single(kernel, [erase(x)]);
    }
    let root = (x.clone() * x.clone())
        .sum_dim(D - 1)
        .add_scalar(eps)
        .sqrt();
    x / root
}

/// Inputs `x`, the gate and the weight.
#[derive(Debug)]
struct GatedRmsNorm {
    rows: Rows,
    gate: Gate,
}

impl Kernel for GatedRmsNorm {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (x, z, weight) = (inputs[0], inputs[1], inputs[2]);
        let mut y = vec![0.0; x.data.len()];
        let weight = Some(weight.data);
        kernel::gated_rms_norm(self.rows, self.gate, x.data, z.data, weight, &mut y);
        output(x.shape, y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, z, weight) = (inputs[0], inputs[1], inputs[2]);
        let (mut dx, mut dz) = (vec![0.0; x.data.len()], vec![0.0; x.data.len()]);
        let mut dw = vec![0.0; weight.data.len()];
        kernel::gated_rms_norm_backward(
            self.rows,
            self.gate,
            x.data,
            z.data,
            Some(weight.data),
            only(grads).data,
            &mut dx,
            &mut dz,
            Some(&mut dw),
        );
        vec![
            Some(Array::new(x.shape, dx)),
            Some(Array::new(z.shape, dz)),
            Some(Array::new(weight.shape, dw)),
        ]
    }
}

/// RMS norm with a SiLU gate of the shape of `x`: `norm(x silu(gate)) weight` when `gate_first` (Mamba-2), else
/// `norm(x) weight silu(gate)` (GLA).
///
/// `group` values are normalised together; it divides the last dimension. The weight holds one value for each of the
/// last dimension, or `group` values that all groups share.
pub fn gated_rms_norm<const D: usize>(
    x: Tensor<D>,
    gate: Tensor<D>,
    weight: Tensor<1>,
    eps: f32,
    gate_first: bool,
    group: usize,
) -> Tensor<D> {
    let shape = x.dims();
    let dim = shape[D - 1];
    let weights = weight.dims()[0];
    assert_eq!(shape, gate.dims(), "gated norm: shapes differ");
    assert!(
        group > 0 && dim.is_multiple_of(group) && (weights == dim || weights == group),
        "gated norm: groups of {group} and a weight of {weights} for a last dimension of {dim}"
    );
    if on_cpu(&x) {
        let kernel = GatedRmsNorm {
            rows: Rows::mean(group, eps),
            gate: if gate_first {
                Gate::BeforeNorm
            } else {
                Gate::AfterNorm
            },
        };
        return single(kernel, [erase(x), erase(gate), erase(weight)]);
    }
    let rows = shape[..D - 1].iter().product::<usize>();
    let split = [rows, dim / group, group];
    let gate = silu(gate).reshape(split);
    let x = x.reshape(split);
    let x = if gate_first { x * gate.clone() } else { x };
    let root = (x.clone() * x.clone()).mean_dim(2).add_scalar(eps).sqrt();
    let y = x / root * weight.reshape([1, weights / group, group]);
    let y = if gate_first { y } else { y * gate };
    y.reshape(shape)
}

/// Inputs `x`, the weight and, if `biased`, the bias.
#[derive(Debug)]
struct LayerNorm {
    rows: Rows,
    biased: bool,
}

impl Kernel for LayerNorm {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (x, weight) = (inputs[0], inputs[1]);
        let bias = self.biased.then(|| inputs[2].data);
        let fill =
            |y: &mut [f32]| kernel::layer_norm(self.rows, x.data, Some(weight.data), bias, y);
        // SAFETY: the kernel writes every value, and reads one only after.
        let y = unsafe { filled(x.data.len(), fill) };
        output(x.shape, y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, weight, dy) = (inputs[0], inputs[1], only(grads).data);
        let mut dw = vec![0.0; weight.data.len()];
        let mut db = vec![0.0; if self.biased { weight.data.len() } else { 0 }];
        let fill = |dx: &mut [f32]| {
            let (dw, db) = (Some(&mut dw[..]), self.biased.then_some(&mut db[..]));
            kernel::layer_norm_backward(self.rows, x.data, Some(weight.data), dy, dx, dw, db);
        };
        // SAFETY: the kernel writes every value, and reads one only after.
        let dx = unsafe { filled(x.data.len(), fill) };
        let mut all = vec![
            Some(Array::new(x.shape, dx)),
            Some(Array::new(weight.shape, dw)),
        ];
        if self.biased {
            all.push(Some(Array::new(inputs[2].shape, db)));
        }
        all
    }
}

/// `(x - mean) / sqrt(var + eps) weight + bias` over the last dimension, with the biased variance (Ba et al., 2016).
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f32,
) -> Tensor<D> {
    let dim = x.dims()[D - 1];
    assert_eq!(weight.dims()[0], dim, "layer norm: weight");
    if on_cpu(&x) {
        let kernel = LayerNorm {
            rows: Rows::mean(dim, eps),
            biased: bias.is_some(),
        };
        return match bias {
            Some(bias) => single(kernel, [erase(x), erase(weight), erase(bias)]),
            None => single(kernel, [erase(x), erase(weight)]),
        };
    }
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    let y = centred / variance.add_scalar(eps).sqrt() * weight.unsqueeze();
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// `x + r` and its norm; inputs `x`, `r`, the weight and, if `biased`, the bias of a layer norm.
#[derive(Debug)]
struct AddNorm {
    rows: Rows,
    biased: bool,
}

impl AddNorm {
    fn after<'a>(&self, inputs: &[View<'a>]) -> After<'a> {
        After {
            rows: self.rows,
            weight: inputs[2].data,
            bias: self.biased.then(|| inputs[3].data),
        }
    }
}

impl Kernel for AddNorm {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (x, r) = (inputs[0], inputs[1]);
        let mut y = Vec::new();
        let fill = |s: &mut [f32]| {
            let fill = |y: &mut [f32]| kernel::add_norm(self.after(inputs), x.data, r.data, s, y);
            // SAFETY: the kernel writes every value, and reads one only after.
            y = unsafe { filled(x.data.len(), fill) };
        };
        // SAFETY: as above.
        let s = unsafe { filled(x.data.len(), fill) };
        Forward {
            outputs: vec![Array::new(x.shape, s), Array::new(x.shape, y)],
            saved: vec![],
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (s, weight) = (saved[0], inputs[2]);
        let ds = grads[0].map(|grad| grad.data);
        let mut dw = vec![0.0; weight.data.len()];
        let mut db = vec![0.0; if self.biased { weight.data.len() } else { 0 }];
        let dx = match grads[1] {
            // The norm was not used.
            None => or_zeros(grads[0], s.data.len()).into_owned(),
            Some(dy) => {
                let fill = |dx: &mut [f32]| {
                    let after = self.after(inputs);
                    let db = self.biased.then_some(&mut db[..]);
                    kernel::add_norm_backward(after, s.data, ds, dy.data, dx, &mut dw, db);
                };
                // SAFETY: the kernel writes every value, and reads one only after.
                unsafe { filled(s.data.len(), fill) }
            }
        };
        let mut all = vec![
            Some(Array::new(s.shape, dx)),
            None,
            Some(Array::new(weight.shape, dw)),
        ];
        if self.biased {
            all.push(Some(Array::new(inputs[3].shape, db)));
        }
        all
    }

    fn keeps_output(&self) -> bool {
        true
    }

    fn reads_again(&self, input: usize) -> bool {
        input >= 2
    }

    fn same_gradient(&self, input: usize) -> Option<usize> {
        (input == 1).then_some(0)
    }
}

/// `x + r`, and its layer norm where there is a bias, its RMS norm where there is none: a residual sum and the norm that
/// follows it, in one pass over memory each way.
pub fn add_norm<const D: usize>(
    x: Tensor<D>,
    r: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f32,
) -> [Tensor<D>; 2] {
    assert_eq!(x.dims(), r.dims(), "residual sum: shapes differ");
    let dim = x.dims()[D - 1];
    assert_eq!(weight.dims()[0], dim, "norm: weight");
    if on_cpu(&x) {
        let kernel = AddNorm {
            rows: Rows::mean(dim, eps),
            biased: bias.is_some(),
        };
        let [x, r, weight] = [erase(x), erase(r), erase(weight)];
        let made = match bias {
            Some(bias) => apply(kernel, [x, r, weight, erase(bias)]),
            None => apply(kernel, [x, r, weight]),
        };
        let (sum, y) = both(made);
        return [sum, y];
    }
    let sum = x + r;
    let y = match bias {
        Some(_) => layer_norm(sum.clone(), weight, bias, eps),
        None => rms_norm(sum.clone(), weight, eps),
    };
    [sum, y]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    const TOL: f32 = 1e-5;

    #[test]
    fn rms_and_l2_agree_with_composed() {
        for (rows, dim) in [(1, 3), (6, 17), (2, 64)] {
            let inputs = [values(1, rows * dim), values(2, dim)];
            let y = agree("rms", TOL, &inputs, |v| {
                let x = v[0].clone().reshape([1, rows, dim]);
                rms_norm(x, v[1].clone(), 1e-5).reshape([rows * dim])
            });
            let ones = [inputs[0].clone(), vec![1.0; dim]];
            agree("rms of ones", TOL, &ones, |v| {
                rms_norm(v[0].clone().reshape([rows, dim]), v[1].clone(), 1e-5)
                    .reshape([rows * dim])
            });
            assert_eq!(y.len(), rows * dim);
            let y = agree("l2", TOL, &inputs[..1], |v| {
                l2_normalise(v[0].clone().reshape([rows, dim]), 1e-6).reshape([rows * dim])
            });
            for row in y.chunks(dim) {
                let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
                assert!((length - 1.0).abs() < 1e-3, "{length}");
            }
        }
    }

    #[test]
    fn gated_rms_norm_agrees_with_composed() {
        let (rows, dim) = (5, 24);
        for gate_first in [false, true] {
            for (group, weights) in [(24, 24), (8, 24), (8, 8), (1, 24)] {
                let inputs = [
                    values(1, rows * dim),
                    values(2, rows * dim),
                    values(3, weights),
                ];
                // A group of one value has nearly constant output: its gradient is a small difference.
                let tol = if group == 1 { 1e-3 } else { TOL };
                agree(&format!("gated {gate_first} {group}"), tol, &inputs, |v| {
                    let x = v[0].clone().reshape([1, rows, dim]);
                    let z = v[1].clone().reshape([1, rows, dim]);
                    gated_rms_norm(x, z, v[2].clone(), 1e-5, gate_first, group)
                        .reshape([rows * dim])
                });
            }
        }
    }

    #[test]
    fn layer_norm_agrees_with_composed() {
        for (rows, dim) in [(4, 9), (3, 70)] {
            let inputs = [values(1, rows * dim), values(2, dim), values(3, dim)];
            agree("layer norm", TOL, &inputs, |v| {
                let (w, b) = (v[1].clone(), Some(v[2].clone()));
                layer_norm(v[0].clone().reshape([rows, dim]), w, b, 1e-5).reshape([rows * dim])
            });
            agree("layer norm without bias", TOL, &inputs[..2], |v| {
                let x = v[0].clone().reshape([rows, dim]);
                layer_norm(x, v[1].clone(), None, 1e-5).reshape([rows * dim])
            });
        }
    }

    #[test]
    fn sum_and_norm_agree_with_composed_whichever_is_used() {
        let (rows, dim) = (6, 33);
        let inputs = [
            values(1, rows * dim),
            values(2, rows * dim),
            values(3, dim),
            values(4, dim),
        ];
        for biased in [false, true] {
            let used = &inputs[..if biased { 4 } else { 3 }];
            for which in [[true, true], [true, false], [false, true]] {
                let name = format!("sum and norm, bias {biased}, used {which:?}");
                agree(&name, TOL, used, |v| {
                    let [x, r] = [0, 1].map(|at| v[at].clone().reshape([2, rows / 2, dim]));
                    let made = add_norm(x, r, v[2].clone(), biased.then(|| v[3].clone()), 1e-5);
                    let parts = made.into_iter().zip(which).filter(|(_, used)| *used);
                    // Where the norm is not used its parameters get zeros.
                    let none = (v[2].clone().sum() + v[used.len() - 1].clone().sum()) * 0.0;
                    let parts = parts.map(|(part, _)| part.reshape([rows * dim]) + none.clone());
                    Tensor::cat(parts.collect(), 0)
                });
            }
        }
    }
}
