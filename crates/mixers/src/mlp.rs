//! The two-layer perceptron: `y = W_2 act(W_1 x + b_1) + b_2`.
//!
//! Vaswani et al., Attention Is All You Need (2017), arXiv 1706.03762; GELU as in BERT. Cost per token:
//! `4·dim·hidden` operations.

use anyformer_ops::Tensor;
use anyformer_ops::activation::{Activation as Fused, activate};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ChannelEntry, Direction, HIDDEN_DROPOUT, Knob, chance, read, resolve};
use crate::mixer::{ChannelMixer, Context, Cost};
use crate::parts::Layer;

/// The function between the two layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// The exact form, by the error function.
    #[default]
    Gelu,
    /// The approximation by tanh that GPT-2 uses.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x·sigmoid(x)`.
    Silu,
    /// The hyperbolic tangent.
    Tanh,
}

impl Activation {
    /// As the layers name it that apply it in one pass.
    fn fused(self) -> Option<Fused> {
        match self {
            Activation::Gelu => Some(Fused::Gelu),
            Activation::GeluTanh => Some(Fused::GeluTanh),
            Activation::Relu => Some(Fused::Relu),
            Activation::Silu => Some(Fused::Silu),
            Activation::Tanh => None,
        }
    }

    /// The function of every value.
    pub fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self.fused() {
            Some(fused) => activate(x, fused),
            None => x.tanh(),
        }
    }
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct MlpConfig {
    /// Inner width; 0 takes `4·dim`.
    pub hidden: usize,
    /// The function between the two layers.
    pub activation: Activation,
    /// Biases on both layers.
    pub bias: bool,
    /// Rank of both weights, each a product of two; 0: weights as they are.
    pub rank: usize,
    /// Chance with which a hidden value is zeroed in training.
    pub dropout: f64,
}

impl Default for MlpConfig {
    fn default() -> Self {
        MlpConfig {
            hidden: 0,
            activation: Activation::Gelu,
            bias: true,
            rank: 0,
            dropout: 0.0,
        }
    }
}

static CARD: Card = Card {
    name: "mlp",
    title: "MLP",
    paper: "Vaswani et al.: Attention Is All You Need (2017), arXiv 1706.03762",
    equation: "y = W_2 act(W_1 x + b_1) + b_2",
    direction: Direction::Either,
    streams: true,
    state: "constant",
    notes: "The channel mixer of GPT-2, BERT and the vision transformers.",
    knobs: &[
        Knob {
            name: "hidden",
            doc: "inner width; 0 takes 4·dim",
        },
        Knob {
            name: "activation",
            doc: "gelu (exact), gelu_tanh, relu, silu or tanh",
        },
        Knob {
            name: "bias",
            doc: "biases on both layers",
        },
        Knob {
            name: "rank",
            doc: "rank of both weights, each a product of two; 0: weights as they are",
        },
        HIDDEN_DROPOUT,
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: ChannelEntry = ChannelEntry {
    card: &CARD,
    resolve: |options| resolve::<MlpConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: MlpConfig = read(&CARD, options)?;
        let hidden = match config.hidden {
            0 => 4 * dim,
            hidden => hidden,
        };
        Ok(Box::new(Mlp {
            fc1: Layer::new(
                builder,
                "fc1",
                [dim, hidden],
                config.rank,
                config.bias,
                false,
            ),
            fc2: Layer::new(
                builder,
                "fc2",
                [hidden, dim],
                config.rank,
                config.bias,
                true,
            ),
            activation: config.activation,
            dropout: chance(&CARD, config.dropout)?,
        }))
    },
};

struct Mlp {
    fc1: Layer,
    fc2: Layer,
    activation: Activation,
    dropout: f64,
}

impl ChannelMixer for Mlp {
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let inner = match self.activation.fused() {
            Some(function) => self.fc1.forward_then(x, function),
            None => self.activation.apply(self.fc1.forward(x)),
        };
        self.fc2.forward(context.hidden(self.dropout, inner))
    }

    fn cost(&self, time: usize) -> Cost {
        self.fc1.cost(time) + self.fc2.cost(time)
    }
}
