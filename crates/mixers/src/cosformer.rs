//! cosFormer: linear attention on `relu` features, each pair weighted by the cosine of its distance.
//!
//! Qin et al. (2022), arXiv 2202.08791: `o_i = sum_j s_ij v_j / sum_j s_ij` with
//! `s_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 M))`. The cosine of a difference is a sum of products, so features
//! `[relu(x) sin, relu(x) cos]` of the position make it linear in time. M is the knob `max_time`, the same in training and
//! decoding. State: `kv [sequences, heads, 2 head_dim, head_dim]` and `z [sequences, heads, 2 head_dim]`.

use std::sync::Arc;

use anyformer_ops::Tensor;
use anyformer_ops::feature_attention::FeatureMap;
use serde::{Deserialize, Serialize};

use crate::additive::{self, Additive};
use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::Projections;

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct CosformerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Longest sequence in tokens: the distance at which a weight reaches zero.
    pub max_time: usize,
    /// Look back only.
    pub causal: bool,
    /// Biases on all four projections.
    pub bias: bool,
}

impl Default for CosformerConfig {
    fn default() -> Self {
        CosformerConfig {
            heads: 4,
            max_time: 2048,
            causal: true,
            bias: true,
        }
    }
}

static CARD: Card = Card {
    name: "cosformer",
    title: "cosFormer",
    paper: "Qin et al.: cosFormer: Rethinking Softmax in Attention (ICLR 2022), arXiv 2202.08791",
    equation: "s_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 M))\no_i = sum_j s_ij v_j / sum_j s_ij",
    direction: Direction::Either,
    streams: true,
    state: "constant",
    notes: "M is fixed by max_time; the released code takes the length of the batch, so that its weights change with it. Where no feature of query and keys is shared the divisor is zero and the output too.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "max_time",
            doc: "longest sequence in tokens: the distance at which a weight reaches zero",
        },
        Knob {
            name: "causal",
            doc: "look back only",
        },
        Knob {
            name: "bias",
            doc: "biases on all four projections",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<CosformerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: CosformerConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        if config.max_time == 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "max_time must be at least 1".into(),
            });
        }
        Ok(Box::new(Cosformer {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            head_dim,
            config,
        }))
    },
};

struct Cosformer {
    projections: Projections,
    head_dim: usize,
    config: CosformerConfig,
}

impl Cosformer {
    /// `[relu(x) sin, relu(x) cos]` of each token's angle `pi position / (2 M)`.
    fn map(&self, positions: &[usize]) -> Result<FeatureMap, RunError> {
        let longest = positions.iter().max().map_or(0, |last| last + 1);
        if longest > self.config.max_time {
            return Err(RunError::TooLong {
                mixer: CARD.name,
                limit: self.config.max_time,
                got: longest,
            });
        }
        let step = std::f64::consts::FRAC_PI_2 / self.config.max_time as f64;
        let table = |of: fn(f64) -> f64| {
            let values = positions.iter().map(|at| of(step * *at as f64) as f32);
            Arc::new(values.collect())
        };
        Ok(FeatureMap::Turned {
            sin: table(f64::sin),
            cos: table(f64::cos),
        })
    }
}

impl TokenMixer for Cosformer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let refusal = "bidirectional cosformer";
        if state.is_some() && !self.config.causal {
            return Err(RunError::CannotStream(refusal));
        }
        let [batch, time, _] = x.dims();
        let additive = Additive {
            map: self.map(&context.positions(batch, time, state))?,
            scale: 1.0,
            normalise: true,
            causal: self.config.causal,
        };
        let parts = self.projections.split(&x);
        let (o, next) = additive.attend(parts, context, state, refusal)?;
        Ok((self.projections.join(o), next))
    }

    fn cost(&self, time: usize) -> Cost {
        let (heads, features, width) = (self.config.heads, 2 * self.head_dim, self.head_dim + 1);
        self.projections.cost(time)
            + additive::cost(self.config.causal, time, heads, features, width)
    }
}
