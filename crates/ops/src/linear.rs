//! The linear layer `y = x Wᵀ + b`, and `aᵀ b` of two tall matrices.

use std::sync::Arc;

use anyformer_kernels::activation::Activation;
use anyformer_kernels::gemm::Matrix;
pub use anyformer_kernels::matmul::Precision;
use anyformer_kernels::matmul::{Panelled, column_sums, product};
use burn::tensor::Tensor;

use crate::activation::{activate, only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, is_tracked, on_cpu};
use crate::meter;
use crate::param::{Builder, Init, LinearInit, Param};
use crate::quantised::{quantised_linear, show};

/// Inputs: `x [rows, in]`, `weight [out, in]` and, for [`Affine`]s with a bias, `bias [out]`.
#[derive(Debug)]
struct Affine {
    precision: Precision,
    bias: bool,
}

impl Kernel for Affine {
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let once = 2 * (inputs[0].shape[0] * inputs[1].data.len()) as u64;
        [once, 2 * once]
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (x, weight) = (inputs[0], inputs[1]);
        let (rows, width, out) = (x.shape[0], x.shape[1], weight.shape[0]);
        let bias = self.bias.then(|| inputs[2].data);
        let (a, b) = (
            Matrix::rows(x.data, width),
            Matrix::rows(weight.data, width).transposed(),
        );
        output(
            &[rows, out],
            product(self.precision, [rows, width, out], a, b, bias),
        )
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, weight, dy) = (inputs[0], inputs[1], only(grads).data);
        let (rows, width, out) = (x.shape[0], x.shape[1], weight.shape[0]);
        let dy_rows = Matrix::rows(dy, out);
        let dx = product(
            self.precision,
            [rows, out, width],
            dy_rows,
            Matrix::rows(weight.data, width),
            None,
        );
        let dw = product(
            self.precision,
            [out, rows, width],
            dy_rows.transposed(),
            Matrix::rows(x.data, width),
            None,
        );
        let mut gradients = vec![
            Some(Array::new(x.shape, dx)),
            Some(Array::new(weight.shape, dw)),
        ];
        if self.bias {
            gradients.push(Some(Array::new([out], column_sums(dy, out))));
        }
        gradients
    }
}

/// `x Wᵀ + b` for `x [rows, in]`, `weight [out, in]`, `bias [out]`. On the CPU the operands of this product and of its two
/// gradients are rounded as `precision` says; on other devices they stay f32.
pub fn linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    precision: Precision,
) -> Tensor<2> {
    let (rows, count) = (x.dims()[0], weight.dims().iter().product::<usize>());
    meter::add(2 * (rows * count) as u64);
    if on_cpu(&x) {
        let bare = Affine {
            precision,
            bias: bias.is_some(),
        };
        return match bias {
            Some(bias) => single(bare, [erase(x), erase(weight), erase(bias)]),
            None => single(bare, [erase(x), erase(weight)]),
        };
    }
    let y = x.matmul(weight.transpose());
    match bias {
        Some(bias) => y + bias.unsqueeze::<2>(),
        None => y,
    }
}

/// Inputs: `a [rows, m]` and `b [rows, n]`.
#[derive(Debug)]
struct Across;

impl Kernel for Across {
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let once = 2 * (inputs[0].data.len() * inputs[1].shape[1]) as u64;
        [once, 2 * once]
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (a, b) = (inputs[0], inputs[1]);
        let (rows, m, n) = (a.shape[0], a.shape[1], b.shape[1]);
        let (left, right) = (
            Matrix::rows(a.data, m).transposed(),
            Matrix::rows(b.data, n),
        );
        output(
            &[m, n],
            product(Precision::F32, [m, rows, n], left, right, None),
        )
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (a, b, dy) = (inputs[0], inputs[1], only(grads).data);
        let (rows, m, n) = (a.shape[0], a.shape[1], b.shape[1]);
        let dy = Matrix::rows(dy, n);
        let product = |shape: [usize; 3], left: Matrix, right: Matrix| {
            product(Precision::F32, shape, left, right, None)
        };
        let da = product([rows, n, m], Matrix::rows(b.data, n), dy.transposed());
        let db = product([rows, m, n], Matrix::rows(a.data, m), dy);
        vec![Some(Array::new(a.shape, da)), Some(Array::new(b.shape, db))]
    }
}

/// `aᵀ b` for `a [rows, m]` and `b [rows, n]`: sums over rows, as of a sequence's tokens, without a copy turned over.
pub fn across_rows(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    meter::add(2 * (a.dims()[0] * a.dims()[1] * b.dims()[1]) as u64);
    match on_cpu(&b) {
        true => single(Across, [erase(a), erase(b)]),
        false => a.transpose().matmul(b),
    }
}

/// Inputs: `x [rows, in]` and, for layers with one, `bias [out]`; the weight in the order of products. Without gradients.
#[derive(Debug)]
struct PanelledAffine {
    weight: Arc<Panelled>,
    then: Option<Activation>,
}

impl Kernel for PanelledAffine {
    fn name(&self) -> &'static str {
        "Affine"
    }

    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let [out, width] = self.weight.shape();
        [2 * (inputs[0].shape[0] * out * width) as u64, 0]
    }

    fn own_bytes(&self) -> u64 {
        let bytes = match self.weight.precision() {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        };
        bytes * self.weight.shape().iter().product::<usize>() as u64
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (x, bias) = (inputs[0], inputs.get(1).map(|bias| bias.data));
        let (rows, out) = (x.shape[0], self.weight.shape()[0]);
        output(
            &[rows, out],
            self.weight.product(rows, x.data, bias, self.then),
        )
    }

    fn backward(&self, _: &[View], _: &[View], _: &[Option<View>]) -> Vec<Option<Array>> {
        panic!("a layer whose weight is held for inference is not run where gradients are tracked")
    }
}

fn panelled_linear(
    x: Tensor<2>,
    weight: Arc<Panelled>,
    bias: Option<Tensor<1>>,
    then: Option<Activation>,
) -> Tensor<2> {
    let layer = PanelledAffine { weight, then };
    match bias {
        Some(bias) => single(layer, [erase(x), erase(bias)]),
        None => single(layer, [erase(x)]),
    }
}

/// `[.., in] -> [.., out]`, weight `[out, in]`, optional bias `[out]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`.
    pub bias: Option<Param>,
    /// Of the operands of its products.
    pub precision: Precision,
}

impl Linear {
    /// `{name}.weight` and, where asked for, `{name}.bias`, filled by the builder's rule: uniform in `±1/sqrt(in)`
    /// (PyTorch's default) or normal with zero biases.
    pub fn new(builder: &Builder, name: &str, input: usize, output: usize, bias: bool) -> Self {
        Self::scaled(builder, name, [input, output], bias, 1.0)
    }

    /// As [`Linear::new`], for a layer that writes into the residual stream: the weight is multiplied by the builder's
    /// residual scale.
    pub fn residual(
        builder: &Builder,
        name: &str,
        input: usize,
        output: usize,
        bias: bool,
    ) -> Self {
        let scale = builder.residual_scale();
        Self::scaled(builder, name, [input, output], bias, scale)
    }

    fn scaled(
        builder: &Builder,
        name: &str,
        [input, output]: [usize; 2],
        bias: bool,
        scale: f32,
    ) -> Self {
        let (weight, offset) = match builder.linear_init() {
            LinearInit::FanIn => (Init::FanIn(input), Init::FanIn(input)),
            LinearInit::Normal(deviation) => (Init::Normal(deviation), Init::Zeros),
        };
        let at = builder.at(name);
        let weight = Init::Scaled(Box::new(weight), scale);
        Linear {
            weight: at.matrix("weight", &[output, input], weight),
            bias: bias.then(|| at.param_no_decay("bias", &[output], offset)),
            precision: builder.precision(),
        }
    }

    /// Applies the layer to the last dimension.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.apply(x, None)
    }

    /// The layer and then a function of every value, in one pass where no gradient is asked for and the weight is held in the order
    /// of products ([`Param::panel`]).
    pub fn forward_then<const D: usize>(&self, x: Tensor<D>, then: Activation) -> Tensor<D> {
        self.apply(x, Some(then))
    }

    fn apply<const D: usize>(&self, x: Tensor<D>, then: Option<Activation>) -> Tensor<D> {
        let mut shape = x.dims();
        let rows = shape[..D - 1].iter().product::<usize>();
        let (output, input) = (self.weight.shape()[0], self.weight.shape()[1]);
        shape[D - 1] = output;
        show(self.weight.name(), &x);
        let bias = self.bias.as_ref().map(|bias| bias.tensor::<1>());
        let x = x.reshape([rows, input]);
        if let Some(weight) = self.weight.panelled()
            && weight.precision() == self.precision
            && on_cpu(&x)
            && !is_tracked(&x)
        {
            meter::add(self.flops(rows));
            return panelled_linear(x, weight, bias, then).reshape(shape);
        }
        let y = match self.weight.packed() {
            Some(weight) if on_cpu(&x) => {
                meter::add(self.flops(rows));
                quantised_linear(x, weight, bias, self.precision, self.weight.rounds_inputs())
            }
            _ => linear(x, self.weight.tensor::<2>(), bias, self.precision),
        };
        let y = y.reshape(shape);
        match then {
            Some(then) => activate(y, then),
            None => y,
        }
    }

    /// Operations of one application to `rows` rows.
    pub fn flops(&self, rows: usize) -> u64 {
        2 * (rows * self.weight.count()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, close, run, values};
    use crate::{Device, tensor_values};

    #[test]
    fn the_kernel_agrees_with_the_composed_form() {
        for (rows, input, out) in [(1, 1, 1), (7, 5, 9), (40, 33, 70)] {
            let inputs = [
                values(1, rows * input),
                values(2, out * input),
                values(3, out),
            ];
            let op = |precision: Precision, bias: bool| {
                move |t: &[Tensor<1>]| {
                    let (x, w) = (
                        t[0].clone().reshape([rows, input]),
                        t[1].clone().reshape([out, input]),
                    );
                    linear(x, w, bias.then(|| t[2].clone()), precision).reshape([rows * out])
                }
            };
            agree("linear with bias", 1e-5, &inputs, op(Precision::F32, true));
            agree("linear", 1e-5, &inputs[..2], op(Precision::F32, false));
            // Rounded to 8 bits: near the unrounded result, and not equal to it.
            let (exact, brief) = (
                run(&inputs, op(Precision::F32, true)),
                run(&inputs, op(Precision::Bf16, true)),
            );
            for (exact, brief) in exact.iter().zip(&brief) {
                close("bf16", brief, exact, 0.02);
            }
            assert_ne!(exact[0], brief[0]);
        }
    }

    #[test]
    fn products_across_rows_agree_with_the_composed_form() {
        for (rows, m, n) in [(1, 1, 1), (9, 4, 7), (70, 33, 5)] {
            let inputs = [values(1, rows * m), values(2, rows * n)];
            agree("across rows", 1e-5, &inputs, |x| {
                let (a, b) = (
                    x[0].clone().reshape([rows, m]),
                    x[1].clone().reshape([rows, n]),
                );
                across_rows(a, b).reshape([m * n])
            });
        }
    }

    #[test]
    fn a_weight_in_the_order_of_products_is_the_same_layer() {
        let device = Device::flex();
        for (rows, input, out) in [(1, 7, 5), (70, 40, 100)] {
            let layer = Linear::new(&Builder::new(&device, 1), "layer", input, out, true);
            let x = Tensor::<1>::from_data(values(2, rows * input).as_slice(), &device);
            let x = x.reshape([rows, input]);
            let before = layer.weight.values();
            let plain = tensor_values(layer.forward(x.clone()));
            let gelu = tensor_values(layer.forward_then(x.clone(), Activation::Gelu));
            layer.weight.panel(Precision::F32);
            assert_eq!(layer.weight.values(), before);
            close(
                "plain",
                &tensor_values(layer.forward(x.clone())),
                &plain,
                1e-6,
            );
            let then = layer.forward_then(x.clone(), Activation::Gelu);
            close("with gelu", &tensor_values(then), &gelu, 1e-6);
            let portable = crate::portable(|| tensor_values(layer.forward(x)));
            close("composed", &portable, &plain, 1e-5);
            layer.weight.update(|values| values[0] += 1.0);
            assert_eq!(layer.weight.values()[0], before[0] + 1.0);
            assert!(layer.weight.panelled().is_none());
        }
    }
}
