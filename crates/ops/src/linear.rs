//! The linear layer `y = x Wᵀ + b`.

use burn::tensor::Tensor;

use crate::meter;
use crate::param::{Builder, Init, LinearInit, Param};

/// `[.., in] -> [.., out]`, weight `[out, in]`, optional bias `[out]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`.
    pub bias: Option<Param>,
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
            weight: at.param("weight", &[output, input], weight),
            bias: bias.then(|| at.param_no_decay("bias", &[output], offset)),
        }
    }

    /// Applies the layer to the last dimension.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut shape = x.dims();
        let rows = shape[..D - 1].iter().product::<usize>();
        let (output, input) = (self.weight.shape()[0], self.weight.shape()[1]);
        meter::add(2 * (rows * input * output) as u64);
        shape[D - 1] = output;
        let y = x
            .reshape([rows, input])
            .matmul(self.weight.tensor::<2>().transpose());
        match &self.bias {
            Some(bias) => (y + bias.tensor::<1>().unsqueeze::<2>()).reshape(shape),
            None => y.reshape(shape),
        }
    }

    /// Operations of one application to `rows` rows.
    pub fn flops(&self, rows: usize) -> u64 {
        2 * (rows * self.weight.count()) as u64
    }
}
