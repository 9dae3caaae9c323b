//! A convolution along the tokens beside the first block, as the larger DeBERTa models have (He et al., 2021, arXiv 2006.03654, the
//! version 2 of its repository): `norm(y + act(conv(x)))`, x what the block reads and y what it gives.

use std::sync::Arc;

use anyformer_mixers::mlp::Activation;
use anyformer_mixers::{Context, Cost};
use anyformer_ops::embedding::embedding;
use anyformer_ops::linear::linear;
use anyformer_ops::{Builder, Init, Param, Tensor};

use crate::block::Norm;
use crate::config::ModelConfig;

pub(crate) struct FirstConv {
    /// `[dim, dim, kernel]`: out, in, place.
    weight: Param,
    /// `[dim]`.
    bias: Param,
    norm: Norm,
    activation: Activation,
}

impl FirstConv {
    /// `None` where the config asks for none.
    pub(crate) fn new(config: &ModelConfig, builder: &Builder) -> Option<Self> {
        let (dim, kernel) = (config.dim, config.first_conv);
        let at = builder.at("first_conv");
        (kernel > 0).then(|| FirstConv {
            weight: at.param("weight", &[dim, dim, kernel], Init::FanIn(dim * kernel)),
            bias: at.param_no_decay("bias", &[dim], Init::Zeros),
            norm: Norm::new(config, "first_conv_norm", builder),
            activation: config.first_conv_activation,
        })
    }

    /// x and y `[batch, time, dim]` or packed; a place before or after a sequence is zero.
    pub(crate) fn forward(&self, x: Tensor<3>, y: Tensor<3>, context: &Context) -> Tensor<3> {
        let [batch, time, dim] = x.dims();
        let kernel = self.weight.shape()[2];
        let before = (kernel - 1) / 2;
        let offsets = context.sequences(batch, time);
        let mut ids = Vec::with_capacity(batch * time * kernel);
        for pair in offsets.windows(2) {
            for at in pair[0]..pair[1] {
                ids.extend(
                    (0..kernel).map(|step| match (at + step).checked_sub(before) {
                        Some(place) if (pair[0]..pair[1]).contains(&place) => place as u32 + 1,
                        _ => 0,
                    }),
                );
            }
        }
        let edge = Tensor::zeros([1, dim], &x.device());
        let table = Tensor::cat(vec![edge, x.reshape([batch * time, dim])], 0);
        let seen = embedding(table, Arc::new(ids), [batch * time, kernel]);
        let seen = seen.reshape([batch * time, kernel * dim]);
        let weight = self.weight.tensor::<3>().swap_dims(1, 2);
        let weight = weight.reshape([dim, kernel * dim]);
        let bias = Some(self.bias.tensor::<1>());
        let made = linear(seen, weight, bias, Default::default()).reshape([batch, time, dim]);
        self.norm.forward(y + self.activation.apply(made))
    }

    pub(crate) fn cost(&self, time: usize) -> Cost {
        Cost {
            params: (self.weight.count() + self.bias.count() + self.norm.count()) as u64,
            flops: 2 * (time * self.weight.count()) as u64,
            state_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{Gives, Input, Model, ModelConfig};
    use anyformer_ops::{Device, meter, tensor_values};
    use serde_json::json;

    #[test]
    fn it_reads_no_other_sequence_and_costs_what_it_says() {
        let config = json!({
            "dim": 8, "layers": 2, "mixers": [{"name": "attention", "causal": false, "heads": 2}], "first_conv": 3,
            "wiring": "post_norm", "gives": "hidden", "reads": {"tokens": {"vocab": 9}},
        });
        let config = ModelConfig::from_json(&config).expect("a config");
        assert_eq!(config.gives, Gives::Hidden);
        let model = Model::new(&config, &Device::flex(), 2).expect("built");
        let run = |ids: &[u32], lengths: Option<&[usize]>| {
            let batch = lengths.map_or(1, <[usize]>::len);
            tensor_values(
                model
                    .forward(Input::Tokens { ids, batch }, lengths)
                    .expect("runs"),
            )
        };
        let alone = [run(&[1, 2, 3], None), run(&[4], None)].concat();
        let both = run(&[1, 2, 3, 4, 7, 7], Some(&[3, 1]));
        for (a, b) in alone.iter().zip(&both) {
            assert!((a - b).abs() < 1e-5, "{alone:?} {both:?}");
        }
        // The token before and the one after, not only itself.
        assert_ne!(run(&[1, 2, 3], None)[..8], run(&[1, 2], None)[..8]);
        let (_, flops) = meter::count(|| run(&[1, 2, 3], None));
        let declared = model.cost(3);
        assert_eq!(
            (declared.flops, declared.params),
            (flops, model.params().count() as u64)
        );
    }

    #[test]
    fn a_model_that_streams_has_none() {
        let error = ModelConfig::from_json(&json!({"first_conv": 3})).expect_err("streams");
        assert!(error.to_string().contains("first_conv"), "{error}");
    }
}
