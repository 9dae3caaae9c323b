//! What stands after the last block: scores of tokens or classes, or nothing.

use anyformer_mixers::Cost;
use anyformer_ops::activation::gelu;
use anyformer_ops::{Builder, Init, Linear, Param, Tensor, meter};

use crate::block::Norm;
use crate::config::{Gives, ModelConfig, ModelError, Pool, Reads};

/// `[rows, dim]` to scores.
pub(crate) enum Head {
    Tied(Param),
    Tokens(Linear),
    Masked {
        dense: Linear,
        norm: Norm,
        embed: Param,
        bias: Param,
    },
    Classes {
        linear: Linear,
        pool: Pool,
    },
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
        let tokens = || match (config.reads, embed) {
            (Reads::Tokens { vocab }, Some(embed)) => Ok((vocab, embed.clone())),
            _ => Err(ModelError::Impossible("patches give a class".into())),
        };
        Ok(match config.gives {
            Gives::NextToken { tied: true } => Head::Tied(tokens()?.1),
            Gives::NextToken { tied: false } => {
                Head::Tokens(Linear::new(builder, "lm_head", dim, tokens()?.0, false))
            }
            Gives::Class { classes, pool } => Head::Classes {
                linear: Linear::new(builder, "head", dim, classes, true),
                pool,
            },
            Gives::MaskedToken => {
                let (vocab, embed) = tokens()?;
                let at = builder.at("head");
                Head::Masked {
                    dense: Linear::new(&at, "dense", dim, dim, true),
                    norm: Norm::new(config, "norm", &at),
                    bias: at.param_no_decay("bias", &[vocab], Init::Zeros),
                    embed,
                }
            }
            Gives::Hidden => Head::None,
        })
    }

    /// Scores of hidden rows `[rows, dim]`; the rows themselves where there is no head.
    pub(crate) fn scores(&self, rows: Tensor<2>) -> Tensor<2> {
        let tied = |rows: Tensor<2>, embed: &Param| {
            meter::add(2 * (rows.dims()[0] * embed.count()) as u64);
            rows.matmul(embed.tensor::<2>().transpose())
        };
        match self {
            Head::Tied(embed) => tied(rows, embed),
            Head::Tokens(linear) | Head::Classes { linear, .. } => linear.forward(rows),
            Head::Masked {
                dense,
                norm,
                embed,
                bias,
            } => {
                let rows = norm.forward(gelu(dense.forward(rows)));
                tied(rows, embed) + bias.tensor::<1>().unsqueeze::<2>()
            }
            Head::None => rows,
        }
    }

    /// Parameters that are the head's own, and operations over `time` tokens.
    pub(crate) fn cost(&self, time: usize) -> Cost {
        let linear = |linear: &Linear, rows: usize| {
            let bias = linear.bias.as_ref().map_or(0, Param::count);
            ((linear.weight.count() + bias) as u64, linear.flops(rows))
        };
        let tied = |embed: &Param| 2 * (time * embed.count()) as u64;
        let (params, flops) = match self {
            Head::Tied(embed) => (0, tied(embed)),
            Head::Tokens(layer) => linear(layer, time),
            Head::Classes { linear: layer, .. } => linear(layer, 1),
            Head::Masked {
                dense,
                norm,
                embed,
                bias,
            } => {
                let (params, flops) = linear(dense, time);
                let others = (norm.count() + bias.count()) as u64;
                (params + others, flops + tied(embed))
            }
            Head::None => (0, 0),
        };
        Cost {
            params,
            flops,
            state_bytes: 0,
        }
    }
}
