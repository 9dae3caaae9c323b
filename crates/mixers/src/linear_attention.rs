//! Linear attention: the softmax replaced by a product of positive features.
//!
//! Katharopoulos et al., Transformers are RNNs (2020), arXiv 2006.16236, equations 16 to 20, with the feature map
//! `elu(x) + 1`. Per head `S_t = S_{t-1} + phi(k_t)^T v_t`, `z_t = z_{t-1} + phi(k_t)`,
//! `o_t = phi(q_t) S_t / (phi(q_t) . z_t)`. The normaliser is one more value column of ones in the shared recurrence. State:
//! `kv [sequences, heads, head_dim, head_dim]` and `z [sequences, heads, head_dim]`. Without `causal` the sums run over
//! the whole sequence.

use anyformer_ops::feature_attention;
use anyformer_ops::{Linear, Tensor};
use serde::{Deserialize, Serialize};

use crate::additive::{self, Additive};
use crate::card::{Card, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{join_heads, split_heads};

/// The function applied to queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMap {
    /// `elu(x) + 1`: `x + 1` above zero, `exp(x)` below.
    #[default]
    Elu,
    /// `max(x, 0)`.
    Relu,
    /// `x` itself; only without the normaliser.
    Identity,
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LinearAttentionConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// The function applied to queries and keys.
    pub feature_map: FeatureMap,
    /// Divide by the sum of the weights.
    pub normalise: bool,
    /// Look back only.
    pub causal: bool,
}

impl Default for LinearAttentionConfig {
    fn default() -> Self {
        LinearAttentionConfig {
            heads: 4,
            feature_map: FeatureMap::Elu,
            normalise: true,
            causal: true,
        }
    }
}

static CARD: Card = Card {
    name: "linear_attention",
    title: "Linear attention",
    paper: "Katharopoulos et al.: Transformers are RNNs (2020), arXiv 2006.16236",
    equation: "S_t = S_{t-1} + phi(k_t)^T v_t\nz_t = z_{t-1} + phi(k_t)\no_t = phi(q_t) S_t / (phi(q_t) . z_t)",
    direction: Direction::Either,
    streams: true,
    state: "constant",
    notes: "Nothing is ever forgotten or overwritten, so recall fails once more pairs are stored than the keys can keep apart.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "feature_map",
            doc: "elu (elu(x) + 1), relu or identity",
        },
        Knob {
            name: "normalise",
            doc: "divide by the sum of the weights",
        },
        Knob {
            name: "causal",
            doc: "look back only",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<LinearAttentionConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: LinearAttentionConfig = read(&CARD, options)?;
        head_dim(&CARD, dim, config.heads)?;
        let linear = |name: &str| Linear::new(builder, name, dim, dim, false);
        Ok(Box::new(LinearAttention {
            q_proj: linear("q_proj"),
            k_proj: linear("k_proj"),
            v_proj: linear("v_proj"),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, false),
            config,
            dim,
        }))
    },
};

struct LinearAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    config: LinearAttentionConfig,
    dim: usize,
}

impl LinearAttention {
    fn additive(&self) -> Additive {
        Additive {
            map: match self.config.feature_map {
                FeatureMap::Elu => feature_attention::FeatureMap::Elu,
                FeatureMap::Relu => feature_attention::FeatureMap::Relu { add: 0.0 },
                FeatureMap::Identity => feature_attention::FeatureMap::Identity,
            },
            scale: ((self.dim / self.config.heads) as f32).powf(-0.5),
            normalise: self.config.normalise,
            causal: self.config.causal,
        }
    }

    fn value_dim(&self) -> usize {
        self.dim / self.config.heads + usize::from(self.config.normalise)
    }
}

impl TokenMixer for LinearAttention {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let parts = [&self.q_proj, &self.k_proj, &self.v_proj];
        let parts = parts.map(|linear| split_heads(linear.forward(x.clone()), self.config.heads));
        let refusal = "bidirectional linear attention";
        let (o, next) = self.additive().attend(parts, context, state, refusal)?;
        Ok((self.o_proj.forward(join_heads(o)), next))
    }

    fn cost(&self, time: usize) -> Cost {
        let (heads, head_dim) = (self.config.heads, self.dim / self.config.heads);
        let weights = 4 * self.dim * self.dim;
        let layers = Cost {
            params: weights as u64,
            flops: 2 * (weights * time) as u64,
            state_bytes: 0,
        };
        layers + additive::cost(self.config.causal, time, heads, head_dim, self.value_dim())
    }
}
