//! The classifier over the last block: what is read off a sequence, of one or of two, and the layers that score it.
//!
//! Two sequences (Long Range Arena's matching task, arXiv 2011.04006) go through the same blocks one by one, as rows
//! `2 i` and `2 i + 1` of a batch; only the head sees both.

use std::sync::Arc;

use anyformer_mixers::mlp::Activation;
use anyformer_mixers::{Context, Cost};
use anyformer_ops::{Builder, Init, Linear, Param, Tensor};

use crate::config::{Gives, ModelConfig, ModelError, Pair, Pool};
use crate::rows::{gather_rows, pooled};

/// Layers with an activation between them.
pub(crate) struct ClassHead {
    layers: Vec<Linear>,
    activation: Activation,
    pool: Pool,
    pair: Pair,
    /// `[1, dim]`, put before each sequence.
    class_token: Option<Param>,
}

impl ClassHead {
    /// The head of a config that gives a class; that of an exit reads the class token of the last.
    pub(crate) fn new(config: &ModelConfig, exit: bool, builder: &Builder) -> Self {
        let Gives::Class {
            classes,
            pool,
            hidden,
            pair,
        } = config.gives
        else {
            panic!("checked by the caller")
        };
        let seen = match pair {
            Pair::None => 1,
            Pair::Concat => 2,
            Pair::Nli => 4,
        };
        let mut widths = vec![seen * config.dim];
        if hidden > 0 {
            widths.push(hidden);
            if pair != Pair::None {
                widths.push((hidden / 2).max(1));
            }
        }
        widths.push(classes);
        let at = builder.at("head");
        let bias = config.head_bias;
        let layers = match widths.as_slice() {
            [input, output] => vec![Linear::new(builder, "head", *input, *output, bias)],
            _ => widths
                .windows(2)
                .enumerate()
                .map(|(index, pair)| Linear::new(&at, &index.to_string(), pair[0], pair[1], bias))
                .collect(),
        };
        let class_token = (pool == Pool::Cls && !exit)
            .then(|| builder.param_no_decay("class_token", &[1, config.dim], Init::Zeros));
        ClassHead {
            layers,
            activation: config.head_activation.unwrap_or(Activation::Relu),
            pool,
            pair,
            class_token,
        }
    }

    /// Positions that the head adds to a sequence.
    pub(crate) fn extra(&self) -> usize {
        usize::from(self.class_token.is_some())
    }

    /// What a pass costs with this head, from what the blocks cost for one sequence.
    pub(crate) fn cost(&self, blocks: Cost) -> Cost {
        let sequences = if self.pair == Pair::None { 1 } else { 2 };
        let bias = |layer: &Linear| layer.bias.as_ref().map_or(0, Param::count);
        let params = |layer: &Linear| layer.weight.count() + bias(layer);
        let own: usize = self.layers.iter().map(params).sum();
        let token = self.class_token.as_ref().map_or(0, Param::count);
        Cost {
            params: blocks.params + (own + token) as u64,
            flops: sequences * blocks.flops
                + self.layers.iter().map(|layer| layer.flops(1)).sum::<u64>(),
            state_bytes: blocks.state_bytes,
        }
    }

    /// Puts the class token, where there is one, before each sequence of `[batch, time, dim]`.
    pub(crate) fn put_class_token(&self, x: Tensor<3>, context: &mut Context) -> Tensor<3> {
        let Some(token) = &self.class_token else {
            return x;
        };
        context.grid = None;
        let [batch, time, dim] = x.dims();
        let token = token.tensor::<2>();
        let Some(offsets) = context.packed() else {
            let first = token.reshape([1, 1, dim]).expand([batch, 1, dim]);
            return Tensor::cat(vec![first, x], 1);
        };
        let mut ids = Vec::with_capacity(time + offsets.len() - 1);
        for pair in offsets.windows(2) {
            ids.push(0);
            ids.extend((pair[0]..pair[1]).map(|place| place as u32 + 1));
        }
        let moved = offsets.iter().enumerate().map(|(row, at)| at + row);
        let moved = Arc::new(moved.collect());
        let total = ids.len();
        let rows = Tensor::cat(vec![token, x.reshape([time, dim])], 0);
        context.offsets = Some(moved);
        gather_rows(rows, ids).reshape([1, total, dim])
    }

    /// What the layers see, `[sequences or pairs, features]`, from the last hidden vectors.
    pub(crate) fn features(
        &self,
        x: Tensor<3>,
        offsets: &[usize],
    ) -> Result<Tensor<2>, ModelError> {
        let rows = pooled(x, offsets, self.pool);
        if self.pair == Pair::None {
            return Ok(rows);
        }
        let [count, dim] = rows.dims();
        if count % 2 != 0 {
            return Err(ModelError::Input(format!(
                "expected pairs of sequences, one after the other, got {count} sequences"
            )));
        }
        let both = rows.reshape([count / 2, 2, dim]);
        let [u, v] = [0, 1].map(|at| both.clone().narrow(1, at, 1).reshape([count / 2, dim]));
        let seen = match self.pair {
            Pair::Nli => vec![u.clone(), v.clone(), u.clone() * v.clone(), u - v],
            _ => vec![u, v],
        };
        Ok(Tensor::cat(seen, 1))
    }

    /// Scores of `[rows, features]`.
    pub(crate) fn scores(&self, rows: Tensor<2>) -> Tensor<2> {
        let last = self.layers.len() - 1;
        let inner = self.layers[..last]
            .iter()
            .fold(rows, |x, layer| self.activation.apply(layer.forward(x)));
        self.layers[last].forward(inner)
    }
}

#[cfg(test)]
mod tests {
    use crate::{Gives, Input, Model, ModelConfig, Pair, Pool, Positions, Reads, Target};
    use anyformer_ops::{Device, meter, tensor_values};

    fn model(pool: Pool, pair: Pair, hidden: usize) -> Model {
        let config = ModelConfig {
            dim: 16,
            layers: 1,
            positions: Positions::Learned,
            max_time: 6,
            reads: Reads::Tokens { vocab: 9 },
            gives: Gives::Class {
                classes: 3,
                pool,
                hidden,
                pair,
            },
            ..ModelConfig::default()
        };
        Model::new(&config, &Device::flex(), 3).expect("a model")
    }

    /// Padding is not read, the cost is true, and a pair is one row of scores.
    #[test]
    fn class_tokens_and_pairs_go_through_packing() {
        for (pool, pair) in [
            (Pool::Cls, Pair::None),
            (Pool::Cls, Pair::Nli),
            (Pool::First, Pair::Concat),
            (Pool::Mean, Pair::Nli),
        ] {
            let model = model(pool, pair, 8);
            let run = |ids: &[u32], lengths: Option<&[usize]>| {
                let scores = model.forward(Input::Tokens { ids, batch: 2 }, lengths);
                scores.expect("fits")
            };
            let whole = run(&[1, 2, 3, 4, 5, 6], None);
            let rows = if pair == Pair::None { 2 } else { 1 };
            assert_eq!(whole.dims(), [rows, 3]);
            let padded = run(&[1, 2, 3, 0, 4, 5, 6, 7], Some(&[3, 3]));
            let other = run(&[1, 2, 3, 8, 4, 5, 6, 8], Some(&[3, 3]));
            let (whole, padded) = (tensor_values(whole), tensor_values(padded));
            assert_eq!(padded, tensor_values(other));
            for (a, b) in whole.iter().zip(&padded) {
                assert!(
                    (a - b).abs() < 1e-5,
                    "{pool:?} {pair:?}: {whole:?} {padded:?}"
                );
            }
            let ids = [1, 2, 3, 4, 5, 6];
            let (_, counted) = meter::count(|| run(&ids, None));
            let declared = model.cost(3);
            assert_eq!(counted, declared.flops * if rows == 2 { 2 } else { 1 });
            assert_eq!(model.params().count() as u64, declared.params);
        }
    }

    #[test]
    fn an_odd_number_of_documents_is_refused() {
        let model = model(Pool::Mean, Pair::Nli, 0);
        let ids = [1, 2, 3];
        let input = Input::Tokens {
            ids: &ids,
            batch: 3,
        };
        let error = model.forward(input, None).expect_err("odd").to_string();
        assert!(error.contains("pairs"), "{error}");
        let input = Input::Tokens {
            ids: &ids[..2],
            batch: 2,
        };
        assert!(model.loss(input, None, Target::Classes(&[1, 2])).is_err());
        assert!(model.loss(input, None, Target::Classes(&[1])).is_ok());
    }
}
