//! Retention: linear attention with one fixed decay per head and rotary positions.
//!
//! Sun et al., Retentive Network (2023), arXiv 2307.08621. Per head `S_t = gamma S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`,
//! `gamma_h = 1 - 2^(-5-h)`; queries and keys are rotated. State `[sequences, heads, key_dim, value_dim]`.

use std::sync::{Arc, OnceLock};

use anyformer_ops::Tensor;
use anyformer_ops::recurrence::Gate;
use anyformer_ops::rope::{Rotations, rope_by};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, read, resolve};
use crate::gated::Gated;
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct RetentionConfig {
    /// Heads.
    pub heads: usize,
    /// Key features of all heads together, over `dim`.
    pub expand_k: f64,
    /// Value features of all heads together, over `dim`.
    pub expand_v: f64,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Added to the mean square in the norm per head.
    pub norm_eps: f64,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        RetentionConfig {
            heads: 4,
            expand_k: 1.0,
            expand_v: 2.0,
            rope_base: 10_000.0,
            norm_eps: 1e-5,
        }
    }
}

static CARD: Card = Card {
    name: "retention",
    title: "Retention (RetNet)",
    paper: "Sun et al.: Retentive Network (2023), arXiv 2307.08621",
    equation: "S_t = gamma_h S_{t-1} + k_t^T v_t, gamma_h = 1 - 2^(-5-h)\no_t = q_t S_t\ny = W_o (norm_head(o) * silu(W_g x))",
    direction: Direction::Causal,
    streams: true,
    state: "constant",
    notes: "The decay does not depend on the data: the first head forgets over about 32 tokens, each next one over twice as many.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides the key and value features",
        },
        Knob {
            name: "expand_k",
            doc: "key features of all heads together, over dim",
        },
        Knob {
            name: "expand_v",
            doc: "value features of all heads together, over dim",
        },
        Knob {
            name: "rope_base",
            doc: "base of the rotary frequencies",
        },
        Knob {
            name: "norm_eps",
            doc: "added to the mean square in the norm per head",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<RetentionConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: RetentionConfig = read(&CARD, options)?;
        let expand = [config.expand_k, config.expand_v];
        let gated = Gated::new(&CARD, dim, config.heads, expand, config.norm_eps, builder)?;
        if gated.key_dim % 2 != 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "rotary positions turn pairs of features, and the key features per head are {}; choose an even number",
                    gated.key_dim
                ),
            });
        }
        Ok(Box::new(Retention {
            gated,
            base: config.rope_base,
            inv_freq: OnceLock::new(),
        }))
    },
};

struct Retention {
    gated: Gated,
    base: f64,
    inv_freq: OnceLock<Vec<f32>>,
}

impl Retention {
    fn inv_freq(&self) -> &[f32] {
        let width = self.gated.key_dim;
        let frequency = |pair: usize| self.base.powf(-2.0 * pair as f64 / width as f64) as f32;
        self.inv_freq
            .get_or_init(|| (0..width / 2).map(frequency).collect())
    }
}

impl TokenMixer for Retention {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let [batch, time, _] = x.dims();
        let heads = self.gated.heads;
        let positions = context.positions(batch, time, state);
        let rotations = Arc::new(Rotations::new(&positions, self.inv_freq()));
        let (q, k) = self.gated.queries_keys(&x);
        let q = rope_by(q, rotations.clone());
        let k = rope_by(k, rotations);
        let log_decay: Vec<f32> = (0..heads)
            .map(|head| (-(2f64.powi(-5 - head as i32))).ln_1p() as f32)
            .collect();
        let log_decay = Tensor::<1>::from_data(log_decay.as_slice(), &x.device())
            .reshape([1, 1, heads])
            .expand([batch, time, heads]);
        let gate = Gate::Scalar(log_decay);
        Ok(self.gated.finish(x, [q, k], gate, context, state))
    }

    fn cost(&self, time: usize) -> Cost {
        self.gated.cost(time)
    }
}
