//! What stands after the last block: scores of tokens or classes, or nothing.

use anyformer_mixers::Cost;
use anyformer_mixers::mlp::Activation;
use anyformer_ops::{Builder, Init, Linear, Param, Tensor};

use crate::block::Norm;
use crate::class_head::ClassHead;
use crate::config::{Gives, ModelConfig, ModelError, Reads};

/// `[rows, dim]` to scores.
pub(crate) enum Head {
    /// The weight of the embedding.
    Tied(Linear),
    Tokens(Linear),
    Masked {
        dense: Linear,
        activation: Activation,
        norm: Norm,
        tied: Linear,
    },
    Classes(ClassHead),
    None,
}

impl Head {
    /// `embed` is the weight of the vocabulary, where the model reads tokens.
    pub(crate) fn new(
        config: &ModelConfig,
        embed: Option<&Param>,
        builder: &Builder,
    ) -> Result<Self, ModelError> {
        let dim = config.dim;
        let tied = |embed: Param, bias: Option<Param>| Linear {
            weight: embed,
            bias,
            precision: builder.precision(),
        };
        let tokens = || match (config.reads, embed) {
            (Reads::Tokens { vocab }, Some(embed)) => Ok((vocab, embed.clone())),
            _ => Err(ModelError::Impossible("patches give a class".into())),
        };
        Ok(match config.gives {
            Gives::NextToken { tied: true } => Head::Tied(tied(tokens()?.1, None)),
            Gives::NextToken { tied: false } => {
                Head::Tokens(Linear::new(builder, "lm_head", dim, tokens()?.0, false))
            }
            Gives::Class { .. } => Head::Classes(ClassHead::new(config, builder)),
            Gives::MaskedToken => {
                let (vocab, embed) = tokens()?;
                let at = builder.at("head");
                let width = embed.shape()[1];
                Head::Masked {
                    dense: Linear::new(&at, "dense", dim, width, true),
                    activation: config.head_activation.unwrap_or(Activation::Gelu),
                    norm: Norm::sized(config, width, "norm", &at),
                    tied: tied(
                        embed,
                        Some(at.param_no_decay("bias", &[vocab], Init::Zeros)),
                    ),
                }
            }
            Gives::Hidden => Head::None,
        })
    }

    /// Scores of hidden rows `[rows, dim]`; the rows themselves where there is no head.
    pub(crate) fn scores(&self, rows: Tensor<2>) -> Tensor<2> {
        match self {
            Head::Tied(linear) | Head::Tokens(linear) => linear.forward(rows),
            Head::Classes(head) => head.scores(rows),
            Head::Masked {
                dense,
                activation,
                norm,
                tied,
            } => tied.forward(norm.forward(activation.apply(dense.forward(rows)))),
            Head::None => rows,
        }
    }

    /// What a model costs with this head, from what everything before it costs for one sequence of `time` tokens.
    pub(crate) fn cost(&self, before: Cost, time: usize) -> Cost {
        let linear = |linear: &Linear, rows: usize| {
            let bias = linear.bias.as_ref().map_or(0, Param::count);
            ((linear.weight.count() + bias) as u64, linear.flops(rows))
        };
        let (params, flops) = match self {
            Head::Tied(tied) => (0, tied.flops(time)),
            Head::Tokens(layer) => linear(layer, time),
            Head::Classes(head) => return head.cost(before),
            Head::Masked {
                dense, norm, tied, ..
            } => {
                let (params, flops) = linear(dense, time);
                let bias = tied.bias.as_ref().map_or(0, Param::count);
                let others = (norm.count() + bias) as u64;
                (params + others, flops + tied.flops(time))
            }
            Head::None => (0, 0),
        };
        before
            + Cost {
                params,
                flops,
                state_bytes: 0,
            }
    }
}
