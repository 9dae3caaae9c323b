//! Pieces that several token mixers share: heads, projections, norms per head, the short convolution, packed sequences.

use std::sync::Arc;

use anyformer_ops::activation::Activation;
use anyformer_ops::conv::causal_conv1d;
use anyformer_ops::norm::rms_norm;
use anyformer_ops::{Builder, Device, Init, Int, Linear, LinearInit, Param, Tensor};

use crate::mixer::{Context, Cost, RunError, State};

/// `[batch, time, heads * head_dim]` seen as `[batch, time, heads, head_dim]`.
pub fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, time, dim] = x.dims();
    x.reshape([batch, time, heads, dim / heads])
}

/// The reverse of [`split_heads`].
pub fn join_heads(x: Tensor<4>) -> Tensor<3> {
    let [batch, time, heads, head_dim] = x.dims();
    x.reshape([batch, time, heads * head_dim])
}

/// The four projections of a multi-head mixer of width `dim`: `q_proj`, `k_proj`, `v_proj`, `o_proj`.
pub struct Projections {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
}

impl Projections {
    /// Square layers under the builder's path; `bias` on all four.
    pub fn new(builder: &Builder, dim: usize, heads: usize, bias: bool) -> Self {
        let linear = |name: &str| Linear::new(builder, name, dim, dim, bias);
        Projections {
            q_proj: linear("q_proj"),
            k_proj: linear("k_proj"),
            v_proj: linear("v_proj"),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, bias),
            heads,
        }
    }

    /// Queries, keys and values `[batch, time, heads, head_dim]` of `[batch, time, dim]`.
    pub fn split(&self, x: &Tensor<3>) -> [Tensor<4>; 3] {
        [&self.q_proj, &self.k_proj, &self.v_proj]
            .map(|linear| split_heads(linear.forward(x.clone()), self.heads))
    }

    /// Queries alone, where keys come from other tokens.
    pub fn query(&self, x: &Tensor<3>) -> Tensor<4> {
        split_heads(self.q_proj.forward(x.clone()), self.heads)
    }

    /// Keys and values alone.
    pub fn key_value(&self, x: &Tensor<3>) -> [Tensor<4>; 2] {
        [&self.k_proj, &self.v_proj]
            .map(|linear| split_heads(linear.forward(x.clone()), self.heads))
    }

    /// The output layer over the heads' results.
    pub fn join(&self, o: Tensor<4>) -> Tensor<3> {
        self.o_proj.forward(join_heads(o))
    }

    /// Parameters, and operations over `time` tokens.
    pub fn cost(&self, time: usize) -> Cost {
        linear_cost(
            &[&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj],
            time,
        )
    }
}

/// A linear layer, or two with a thin middle in its place: `W = U V` of rank at most `rank`.
pub enum Layer {
    /// `[out, in]`.
    Full(Linear),
    /// `down` `[rank, in]`, then `up` `[out, rank]`.
    Thin(Linear, Linear),
}

impl Layer {
    /// `{name}`, or `{name}.down` and `{name}.up` where `rank` is not 0; `residual` says that it writes into the residual
    /// stream.
    pub fn new(
        builder: &Builder,
        name: &str,
        [input, output]: [usize; 2],
        rank: usize,
        bias: bool,
        residual: bool,
    ) -> Self {
        let make = match residual {
            true => Linear::residual,
            false => Linear::new,
        };
        match rank {
            0 => Layer::Full(make(builder, name, input, output, bias)),
            rank => {
                let at = builder.at(name);
                let down = Linear::new(&at, "down", input, rank, false);
                Layer::Thin(down, make(&at, "up", rank, output, bias))
            }
        }
    }

    /// Applies it to the last dimension.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Layer::Full(linear) => linear.forward(x),
            Layer::Thin(down, up) => up.forward(down.forward(x)),
        }
    }

    /// The layer and then a function of every value.
    pub fn forward_then(&self, x: Tensor<3>, then: Activation) -> Tensor<3> {
        match self {
            Layer::Full(linear) => linear.forward_then(x, then),
            Layer::Thin(down, up) => up.forward_then(down.forward(x), then),
        }
    }

    /// Parameters, and operations over `time` tokens.
    pub fn cost(&self, time: usize) -> Cost {
        match self {
            Layer::Full(linear) => linear_cost(&[linear], time),
            Layer::Thin(down, up) => linear_cost(&[down, up], time),
        }
    }
}

/// Parameters of linear layers and their operations over `time` tokens.
pub fn linear_cost(layers: &[&Linear], time: usize) -> Cost {
    let bias = |layer: &&Linear| layer.bias.as_ref().map_or(0, Param::count);
    Cost {
        params: layers
            .iter()
            .map(|layer| (layer.weight.count() + bias(layer)) as u64)
            .sum(),
        flops: layers.iter().map(|layer| layer.flops(time)).sum(),
        state_bytes: 0,
    }
}

/// The forward of a mixer that cannot stream: `one` over a dense batch `[batch, time, dim]`, or over each packed sequence
/// on its own. Refuses a state in the name of `mixer`.
pub fn each_sequence(
    mixer: &'static str,
    x: Tensor<3>,
    context: &Context,
    state: Option<&State>,
    one: impl Fn(Tensor<3>) -> Result<Tensor<3>, RunError>,
) -> Result<(Tensor<3>, Option<State>), RunError> {
    if state.is_some() {
        return Err(RunError::CannotStream(mixer));
    }
    let Some(offsets) = context.packed() else {
        return Ok((one(x)?, None));
    };
    let pairs = offsets.windows(2).filter(|pair| pair[1] > pair[0]);
    let rows = pairs.map(|pair| one(x.clone().slice([0..1, pair[0]..pair[1]])));
    let y = Tensor::cat(rows.collect::<Result<Vec<_>, _>>()?, 1);
    Ok((y, None))
}

/// The forward of a recurrence that keeps all of a row's state in one tensor: `one` over a dense batch with its states
/// `[rows, ..]`, or over each packed sequence on its own; gives the outputs and the last states.
pub fn row_by_row(
    x: Tensor<3>,
    context: &Context,
    states: Option<Tensor<3>>,
    one: impl Fn(Tensor<3>, Option<Tensor<3>>) -> (Tensor<3>, Tensor<3>),
) -> (Tensor<3>, Tensor<3>) {
    let Some(offsets) = context.packed() else {
        return one(x, states);
    };
    let (mut outputs, mut ends) = (Vec::new(), Vec::new());
    for (row, pair) in offsets.windows(2).enumerate() {
        let state = states.clone().map(|states| states.narrow(0, row, 1));
        let (y, end) = one(x.clone().narrow(1, pair[0], pair[1] - pair[0]), state);
        outputs.push(y);
        ends.push(end);
    }
    (Tensor::cat(outputs, 1), Tensor::cat(ends, 0))
}

/// A tensor of places to select.
pub fn indices(values: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.map(|value| value as i64).collect();
    Tensor::from_data(values.as_slice(), device)
}

/// RMS norm over each head's features with one weight `[head_dim]` shared by all heads.
pub struct HeadNorm {
    weight: Param,
    eps: f32,
}

impl HeadNorm {
    /// `{name}.weight`, ones, without weight decay.
    pub fn new(builder: &Builder, name: &str, head_dim: usize, eps: f32) -> Self {
        HeadNorm {
            weight: builder
                .at(name)
                .param_no_decay("weight", &[head_dim], Init::Ones),
            eps,
        }
    }

    /// Applies the norm.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        rms_norm(x, self.weight.tensor::<1>(), self.eps)
    }

    /// Number of parameters.
    pub fn count(&self) -> usize {
        self.weight.count()
    }
}

/// A causal depthwise convolution over a few tokens with SiLU, no bias: weight `[channels, 1, width]`, the last tap on
/// the current token.
pub struct ShortConv {
    weight: Param,
}

impl ShortConv {
    /// `{name}.weight`.
    pub fn new(builder: &Builder, name: &str, channels: usize, width: usize) -> Self {
        let init = match builder.linear_init() {
            LinearInit::FanIn => Init::FanIn(width),
            LinearInit::Normal(deviation) => Init::Normal(deviation),
        };
        ShortConv {
            weight: builder
                .at(name)
                .param("weight", &[channels, 1, width], init),
        }
    }

    /// `[batch, time, channels]`, the last inputs `[sequences, channels, width - 1]` before it (zeros when absent);
    /// gives the output and the last inputs after it.
    pub fn forward(
        &self,
        x: Tensor<3>,
        initial: Option<Tensor<3>>,
        offsets: Option<Arc<Vec<usize>>>,
    ) -> (Tensor<3>, Tensor<3>) {
        let [channels, _, width] = self.weight.tensor::<3>().dims();
        let weight = self.weight.tensor::<3>().reshape([channels, width]);
        causal_conv1d(x, weight, None, true, initial, offsets)
    }

    /// Parameters, operations over `time` tokens, and bytes of the last inputs.
    pub fn cost(&self, time: usize) -> Cost {
        let (channels, width) = (self.weight.shape()[0], self.weight.shape()[2]);
        Cost {
            params: self.weight.count() as u64,
            flops: 2 * (time * self.weight.count()) as u64,
            state_bytes: 4 * (channels * (width - 1)) as u64,
        }
    }
}
