//! The one block: a token mixer and a channel mixer on a residual stream.

use std::convert::Infallible;
use std::sync::Arc;

use anyformer_mixers::{
    ChannelMixer, Context, Cost, MixerSpec, RunError, State, TokenMixer, channel_mixer, token_mixer,
};
use anyformer_ops::norm::{add_norm, layer_norm, rms_norm};
use anyformer_ops::recompute::{Function, Given, recomputed};
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

    /// `x + r` and its norm.
    fn after(&self, x: Tensor<3>, r: Tensor<3>) -> [Tensor<3>; 2] {
        let bias = self.bias.as_ref().map(Param::tensor::<1>);
        add_norm(x, r, self.weight.tensor::<1>(), bias, self.eps)
    }
}

/// The residual stream `[batch, time, dim]`: its last sum, and what was added to it since, which the norm that reads it next
/// sums up in its own pass over memory.
pub(crate) struct Stream {
    sum: Tensor<3>,
    added: Option<Tensor<3>>,
}

impl Stream {
    pub(crate) fn new(x: Tensor<3>) -> Self {
        Stream {
            sum: x,
            added: None,
        }
    }

    fn add(&mut self, y: Tensor<3>) {
        self.sum = self.sum();
        self.added = Some(y);
    }

    /// Its value.
    pub(crate) fn sum(&mut self) -> Tensor<3> {
        if let Some(added) = self.added.take() {
            self.sum = self.sum.clone() + added;
        }
        self.sum.clone()
    }

    /// Its norm.
    pub(crate) fn normed(&mut self, norm: &Norm) -> Tensor<3> {
        match self.added.take() {
            None => norm.forward(self.sum.clone()),
            Some(added) => {
                let [sum, y] = norm.after(self.sum.clone(), added);
                self.sum = sum;
                y
            }
        }
    }
}

struct Channel {
    norm: Norm,
    mixer: Arc<dyn ChannelMixer>,
    /// Parts of the tokens, one after the other; 0 and 1: all at once.
    chunks: usize,
}

impl Channel {
    fn mix(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        // Where nothing is kept, parts of a few tokens would only take longer.
        let [batch, time, _] = x.dims();
        let kept = x.device().is_autodiff();
        if self.chunks > 1 && (kept || batch * time / 64 >= self.chunks) {
            return self.chunked(x, context);
        }
        self.mixer.forward(x, context)
    }

    /// The mixer over one part of the tokens after the other, of which only the input is kept for the backward pass.
    fn chunked(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let [batch, time, dim] = x.dims();
        let tokens = batch * time;
        let size = tokens.div_ceil(self.chunks).max(1);
        let flat = x.reshape([1, tokens, dim]);
        let chunks = (0..tokens).step_by(size).enumerate().map(|(part, from)| {
            let mixer = self.mixer.clone();
            // Parts drop as if each were a layer of its own, without the losses of mixers.
            let context = Context {
                offsets: None,
                losses: None,
                ..context.at(context.layer + part * PARTS)
            };
            let function: Function<Infallible> = Arc::new(move |x| {
                let y = mixer.forward(x, &context);
                Ok(Given { y, loss: None })
            });
            let chunk = flat.clone().narrow(1, from, size.min(tokens - from));
            match recomputed(chunk, &function) {
                Ok(given) => given.y,
                Err(never) => match never {},
            }
        });
        Tensor::cat(chunks.collect(), 1).reshape([batch, time, dim])
    }
}

/// A token mixer and a channel mixer with their norms.
pub(crate) struct Block {
    wiring: Wiring,
    norm: Norm,
    mixer: Box<dyn TokenMixer>,
    channel: Option<Channel>,
}

/// More layers than a model has.
const PARTS: usize = 1 << 10;

/// The places of dropout after a layer's token and channel mixer; 0 is the embedding.
fn sites(layer: usize) -> [u32; 2] {
    [1, 2].map(|after| 2 * layer as u32 + after)
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
            let build = channel_mixer(&spec.name)?.build;
            Some(Channel {
                norm: Norm::new(config, "norm2", builder),
                mixer: build(config.dim, &spec.options, &builder.at("channel"))?.into(),
                chunks: config.ff_chunks,
            })
        };
        Ok(Block {
            wiring: config.wiring,
            norm,
            mixer,
            channel,
        })
    }

    /// The token mixer, by a step where one token is read.
    fn mix(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        match (state, context.keep_state && x.dims()[1] == 1) {
            (Some(state), true) if context.offsets.is_none() => {
                self.mixer.step(x, state).map(|(y, state)| (y, Some(state)))
            }
            _ => self.mixer.forward(x, context, state),
        }
    }

    /// What the token mixer adds to a stream as layer number `layer`, norm included.
    pub(crate) fn token_part(
        &self,
        layer: usize,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let (y, state) = self.mix(self.norm.forward(x), &context.at(layer), state)?;
        Ok((context.dropped(sites(layer)[0], y), state))
    }

    /// What the channel mixer adds to a stream as layer number `layer`, norm included; nothing where there is none.
    pub(crate) fn channel_part(
        &self,
        layer: usize,
        x: Tensor<3>,
        context: &Context,
    ) -> Option<Tensor<3>> {
        let channel = self.channel.as_ref()?;
        let y = channel.mix(channel.norm.forward(x), &context.at(layer));
        Some(context.dropped(sites(layer)[1], y))
    }

    pub(crate) fn has_channel(&self) -> bool {
        self.channel.is_some()
    }

    /// Goes on with the stream as layer number `layer`.
    pub(crate) fn forward(
        &self,
        layer: usize,
        mut stream: Stream,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Stream, Option<State>), RunError> {
        let context = &context.at(layer);
        let mix = |x: Tensor<3>| self.mix(x, context, state);
        let sites = sites(layer);
        let dropped = |after: usize, y: Tensor<3>| context.dropped(sites[after], y);
        let state = match self.wiring {
            Wiring::PreNorm => {
                let (y, state) = mix(stream.normed(&self.norm))?;
                stream.add(dropped(0, y));
                if let Some(channel) = &self.channel {
                    let y = channel.mix(stream.normed(&channel.norm), context);
                    stream.add(dropped(1, y));
                }
                state
            }
            Wiring::Parallel => {
                let (y, state) = mix(stream.normed(&self.norm))?;
                let y = dropped(0, y);
                let both = match &self.channel {
                    None => y,
                    Some(channel) => {
                        let x = stream.normed(&channel.norm);
                        y + dropped(1, channel.mix(x, context))
                    }
                };
                stream.add(both);
                state
            }
            Wiring::PostNorm => {
                let (y, state) = mix(stream.sum())?;
                stream.add(dropped(0, y));
                stream = Stream::new(stream.normed(&self.norm));
                if let Some(channel) = &self.channel {
                    let y = channel.mix(stream.sum(), context);
                    stream.add(dropped(1, y));
                    stream = Stream::new(stream.normed(&channel.norm));
                }
                state
            }
        };
        Ok((stream, state))
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
