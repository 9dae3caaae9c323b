//! The linear layer `y = x Wᵀ + b`, and `aᵀ b` of two tall matrices.

use anyformer_kernels::gemm::Matrix;
pub use anyformer_kernels::matmul::Precision;
use anyformer_kernels::matmul::{column_sums, product};
use burn::tensor::Tensor;

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu};
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
        let mut shape = x.dims();
        let rows = shape[..D - 1].iter().product::<usize>();
        let (output, input) = (self.weight.shape()[0], self.weight.shape()[1]);
        shape[D - 1] = output;
        show(self.weight.name(), &x);
        let bias = self.bias.as_ref().map(|bias| bias.tensor::<1>());
        let x = x.reshape([rows, input]);
        let y = match self.weight.packed() {
            Some(weight) if on_cpu(&x) => {
                meter::add(self.flops(rows));
                quantised_linear(x, weight, bias, self.precision)
            }
            _ => linear(x, self.weight.tensor::<2>(), bias, self.precision),
        };
        y.reshape(shape)
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
}
