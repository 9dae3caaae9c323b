//! What stands after the last block: scores of tokens or classes, or nothing.

use anyformer_mixers::Cost;
use anyformer_mixers::mlp::Activation;
use anyformer_ops::{Builder, Init, Linear, Param, Tensor};

use crate::block::Norm;
use crate::class_head::ClassHead;
use crate::config::{Gives, ModelConfig, ModelError, Reads};
use crate::model::Target;
use crate::rows::{gather_rows, places};

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
    /// `embed` is the weight of the vocabulary, where the model reads tokens; `exit` says that it is the head of an exit.
    pub(crate) fn new(
        config: &ModelConfig,
        embed: Option<&Param>,
        exit: bool,
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
            Gives::Class { .. } => Head::Classes(ClassHead::new(config, exit, builder)),
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

    /// Scores of every hidden row `[batch, time, dim]` or, of a classifier, of every sequence.
    pub(crate) fn all_scores(
        &self,
        x: Tensor<3>,
        offsets: &[usize],
    ) -> Result<Tensor<2>, ModelError> {
        let rows = match self {
            Head::Classes(head) => head.features(x, offsets)?,
            _ => {
                let [batch, time, dim] = x.dims();
                x.reshape([batch * time, dim])
            }
        };
        Ok(self.scores(rows))
    }

    /// Scores of the places that have a target, with their targets.
    pub(crate) fn scored(
        &self,
        x: Tensor<3>,
        offsets: &[usize],
        packed: bool,
        target: Target,
    ) -> Result<(Tensor<2>, Vec<i64>), ModelError> {
        let (rows, wanted) = match (self, target) {
            (Head::Classes(head), Target::Classes(classes)) => {
                let rows = head.features(x, offsets)?;
                if classes.len() != rows.dims()[0] {
                    return Err(ModelError::Input(format!(
                        "expected {} classes, got {}",
                        rows.dims()[0],
                        classes.len()
                    )));
                }
                (rows, classes.to_vec())
            }
            (Head::Tied(_) | Head::Tokens(_) | Head::Masked { .. }, Target::Tokens(tokens)) => {
                let places = places(tokens, offsets, packed)?;
                let [batch, time, dim] = x.dims();
                let flat = x.reshape([batch * time, dim]);
                let (ids, wanted): (Vec<u32>, Vec<i64>) = places.into_iter().unzip();
                let rows = match ids.len() == batch * time {
                    true => flat,
                    false => gather_rows(flat, ids),
                };
                (rows, wanted)
            }
            _ => {
                return Err(ModelError::Input(
                    "the targets do not fit the head: tokens for a language model, classes for a classifier".into(),
                ));
            }
        };
        let scores = self.scores(rows);
        let classes = scores.dims()[1];
        if let Some(wrong) = wanted.iter().find(|wanted| **wanted >= classes as i64) {
            return Err(ModelError::Input(format!(
                "target {wrong} is not below the {classes} scores"
            )));
        }
        Ok((scores, wanted))
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
