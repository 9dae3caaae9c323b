//! SwiGLU: `y = W_down (silu(W_gate x) ⊙ W_up x)`, three products, with biases where asked.
//!
//! Shazeer, GLU Variants Improve Transformer (2020), arXiv 2002.05202. Cost per token: `6·dim·hidden` operations.

use anyformer_ops::activation::swiglu;
use anyformer_ops::{Builder, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{
    Card, ChannelEntry, ConfigError, Direction, HIDDEN_DROPOUT, Knob, chance, read, resolve,
};
use crate::mixer::{ChannelMixer, Context, Cost};
use crate::parts::Layer;

/// Knobs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SwigluConfig {
    /// Inner width; 0 takes `8/3·dim` rounded up to a multiple of 8.
    pub hidden: usize,
    /// Biases on all three layers.
    pub bias: bool,
    /// Rank of the three weights, each a product of two; 0: weights as they are.
    pub rank: usize,
    /// Chance with which a hidden value is zeroed in training.
    pub dropout: f64,
}

impl SwigluConfig {
    fn hidden(&self, dim: usize) -> usize {
        match self.hidden {
            0 => (dim * 8 / 3).next_multiple_of(8),
            hidden => hidden,
        }
    }
}

static CARD: Card = Card {
    name: "swiglu",
    title: "SwiGLU",
    paper: "Shazeer: GLU Variants Improve Transformer (2020), arXiv 2002.05202",
    equation: "y = W_down (silu(W_gate x) * W_up x)",
    direction: Direction::Either,
    streams: true,
    state: "constant",
    notes: "The channel mixer of Llama-like models.",
    knobs: &[
        Knob {
            name: "hidden",
            doc: "inner width; 0 takes 8/3·dim rounded up to a multiple of 8",
        },
        Knob {
            name: "bias",
            doc: "biases on all three layers",
        },
        Knob {
            name: "rank",
            doc: "rank of the three weights, each a product of two; 0: weights as they are",
        },
        HIDDEN_DROPOUT,
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: ChannelEntry = ChannelEntry {
    card: &CARD,
    resolve: |options| resolve::<SwigluConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: SwigluConfig = read(&CARD, options)?;
        Ok(Box::new(Swiglu::new(dim, &config, builder)?))
    },
};

struct Swiglu {
    gate: Layer,
    up: Layer,
    down: Layer,
    dropout: f64,
}

impl Swiglu {
    fn new(dim: usize, config: &SwigluConfig, builder: &Builder) -> Result<Self, ConfigError> {
        let (hidden, bias) = (config.hidden(dim), config.bias);
        Ok(Swiglu {
            gate: Layer::new(
                builder,
                "gate_proj",
                [dim, hidden],
                config.rank,
                bias,
                false,
            ),
            up: Layer::new(builder, "up_proj", [dim, hidden], config.rank, bias, false),
            down: Layer::new(builder, "down_proj", [hidden, dim], config.rank, bias, true),
            dropout: chance(&CARD, config.dropout)?,
        })
    }
}

impl ChannelMixer for Swiglu {
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let inner = swiglu(self.gate.forward(x.clone()), self.up.forward(x));
        self.down.forward(context.hidden(self.dropout, inner))
    }

    fn cost(&self, time: usize) -> Cost {
        self.gate.cost(time) + self.up.cost(time) + self.down.cost(time)
    }
}
