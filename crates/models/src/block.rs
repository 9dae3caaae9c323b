//! The one block: a token mixer and a channel mixer on a residual stream.

use anyformer_mixers::{
    ChannelMixer, Context, Cost, MixerSpec, RunError, State, TokenMixer, channel_mixer, token_mixer,
};
use anyformer_ops::norm::{layer_norm, rms_norm};
use anyformer_ops::{Builder, Init, Param, Tensor};

use crate::config::{ModelConfig, ModelError, NormKind, Wiring};

/// A norm over the last dimension.
pub(crate) struct Norm {
    weight: Param,
    bias: Option<Param>,
    eps: f32,
}

impl Norm {
    pub(crate) fn new(config: &ModelConfig, name: &str, builder: &Builder) -> Self {
        Self::sized(config, config.dim, name, builder)
    }

    /// Over `dim` features.
    pub(crate) fn sized(config: &ModelConfig, dim: usize, name: &str, builder: &Builder) -> Self {
        let at = builder.at(name);
        let dim = [dim];
        Norm {
            weight: at.param_no_decay("weight", &dim, Init::Ones),
            bias: (config.norm == NormKind::Layer)
                .then(|| at.param_no_decay("bias", &dim, Init::Zeros)),
            eps: config.norm_eps as f32,
        }
    }

    /// Number of parameters.
    pub(crate) fn count(&self) -> usize {
        self.weight.count() + self.bias.as_ref().map_or(0, Param::count)
    }

    pub(crate) fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = self.weight.tensor::<1>();
        match &self.bias {
            None => rms_norm(x, weight, self.eps),
            Some(bias) => layer_norm(x, weight, Some(bias.tensor::<1>()), self.eps),
        }
    }
}

struct Channel {
    norm: Norm,
    mixer: Box<dyn ChannelMixer>,
}

impl Channel {
    fn mix(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        match &context.losses {
            Some(losses) => self.mixer.forward_with_losses(x, losses),
            None => self.mixer.forward(x),
        }
    }
}

/// `[batch, time, dim]` to the same shape.
pub(crate) struct Block {
    wiring: Wiring,
    norm: Norm,
    mixer: Box<dyn TokenMixer>,
    channel: Option<Channel>,
}

impl Block {
    pub(crate) fn new(
        config: &ModelConfig,
        layer: usize,
        builder: &Builder,
    ) -> Result<Self, ModelError> {
        let spec: &MixerSpec = config.mixer(layer);
        let norm = Norm::new(config, "norm1", builder);
        let mixer =
            (token_mixer(&spec.name)?.build)(config.dim, &spec.options, &builder.at("mixer"))?;
        let channel = if config.channel.name == "none" {
            None
        } else {
            let spec = &config.channel;
            Some(Channel {
                norm: Norm::new(config, "norm2", builder),
                mixer: (channel_mixer(&spec.name)?.build)(
                    config.dim,
                    &spec.options,
                    &builder.at("channel"),
                )?,
            })
        };
        Ok(Block {
            wiring: config.wiring,
            norm,
            mixer,
            channel,
        })
    }

    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let mix = |x: Tensor<3>| match (state, context.keep_state && x.dims()[1] == 1) {
            (Some(state), true) if context.offsets.is_none() => {
                self.mixer.step(x, state).map(|(y, state)| (y, Some(state)))
            }
            _ => self.mixer.forward(x, context, state),
        };
        let (x, state) = match self.wiring {
            Wiring::PreNorm => {
                let (y, state) = mix(self.norm.forward(x.clone()))?;
                (x + y, state)
            }
            Wiring::Parallel => {
                let (y, state) = mix(self.norm.forward(x.clone()))?;
                let both = match &self.channel {
                    None => y,
                    Some(channel) => y + channel.mix(channel.norm.forward(x.clone()), context),
                };
                return Ok((x + both, state));
            }
            Wiring::PostNorm => {
                let (y, state) = mix(x.clone())?;
                (self.norm.forward(x + y), state)
            }
        };
        let x = match (&self.channel, self.wiring) {
            (None, _) => x,
            (Some(channel), Wiring::PreNorm | Wiring::Parallel) => {
                let y = channel.mix(channel.norm.forward(x.clone()), context);
                x + y
            }
            (Some(channel), Wiring::PostNorm) => {
                let y = channel.mix(x.clone(), context);
                channel.norm.forward(x + y)
            }
        };
        Ok((x, state))
    }

    /// Cost of the mixers; the norms' parameters are the model's to count.
    pub(crate) fn cost(&self, time: usize) -> Cost {
        let channel = self.channel.as_ref();
        self.mixer.cost(time) + channel.map_or(Cost::default(), |part| part.mixer.cost(time))
    }

    pub(crate) fn norm_params(&self) -> usize {
        self.norm.count() + self.channel.as_ref().map_or(0, |part| part.norm.count())
    }
}
