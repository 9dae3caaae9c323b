//! Gated linear attention: every row of the state has its own, data-dependent decay.
//!
//! Yang et al. (2024), arXiv 2312.06635. Per head `S_t = diag(alpha_t) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`, the log
//! decay being `logsigmoid(W_2 W_1 x) / 16`. State `[sequences, heads, key_dim, value_dim]`.

use anyformer_ops::activation::log_sigmoid;
use anyformer_ops::recurrence::Gate;
use anyformer_ops::{Linear, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{Card, Direction, Knob, Preset, TokenEntry, read, resolve};
use crate::gated::Gated;
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::split_heads;

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct GlaConfig {
    /// Heads.
    pub heads: usize,
    /// Key features of all heads together, over `dim`.
    pub expand_k: f64,
    /// Value features of all heads together, over `dim`.
    pub expand_v: f64,
    /// Inner width of the two-layer gate projection.
    pub gate_low_rank_dim: usize,
    /// Divisor of the log decay: larger remembers longer.
    pub gate_logit_normalizer: f64,
    /// Added to the mean square in the norm per head.
    pub norm_eps: f64,
}

impl Default for GlaConfig {
    fn default() -> Self {
        GlaConfig {
            heads: 4,
            expand_k: 0.5,
            expand_v: 1.0,
            gate_low_rank_dim: 16,
            gate_logit_normalizer: 16.0,
            norm_eps: 1e-5,
        }
    }
}

static CARD: Card = Card {
    name: "gla",
    title: "Gated linear attention (GLA)",
    paper: "Yang, Wang, Shen, Panda, Kim: Gated Linear Attention Transformers with Hardware-Efficient Training (ICML 2024), arXiv 2312.06635",
    equation: "S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, log alpha_t = logsigmoid(W_2 W_1 x_t + b) / 16\no_t = q_t S_t / sqrt(key_dim)\ny = W_o (norm_head(o) * silu(W_g x))",
    direction: Direction::Causal,
    streams: true,
    state: "constant",
    notes: "Computed in chunks with two levels, every exponent at most zero, so that strong decay neither overflows nor loses the gradient. Norm is RMS per head and the output gate has no bias, as in the released code (the paper writes LayerNorm and a bias).",
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
            name: "gate_low_rank_dim",
            doc: "inner width of the two-layer gate projection",
        },
        Knob {
            name: "gate_logit_normalizer",
            doc: "divisor of the log decay; larger remembers longer",
        },
        Knob {
            name: "norm_eps",
            doc: "added to the mean square in the norm per head",
        },
    ],
    presets: &[
        Preset {
            name: "340m",
            model: r#"{"dim":1024,"layers":24,"mixers":[{"name":"gla","heads":4}],"channel":{"name":"swiglu","hidden":2816},"norm_eps":1e-6,"initializer_range":0.02,"scale_residual":false,"reads":{"tokens":{"vocab":32000}},"gives":{"next_token":{"tied":false}}}"#,
        },
        Preset {
            name: "1.3b",
            model: r#"{"dim":2048,"layers":24,"mixers":[{"name":"gla","heads":4}],"channel":{"name":"swiglu","hidden":5632},"norm_eps":1e-6,"initializer_range":0.02,"scale_residual":false,"reads":{"tokens":{"vocab":32000}},"gives":{"next_token":{"tied":false}}}"#,
        },
    ],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<GlaConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: GlaConfig = read(&CARD, options)?;
        let expand = [config.expand_k, config.expand_v];
        let gated = Gated::new(&CARD, dim, config.heads, expand, config.norm_eps, builder)?;
        let (rank, keys) = (config.gate_low_rank_dim, gated.heads * gated.key_dim);
        let gate = builder.at("gk_proj");
        Ok(Box::new(Gla {
            gate_down: Linear::new(&gate, "0", dim, rank, false),
            gate_up: Linear::new(&gate, "1", rank, keys, true),
            normalizer: config.gate_logit_normalizer as f32,
            gated,
        }))
    },
};

struct Gla {
    gated: Gated,
    gate_down: Linear,
    gate_up: Linear,
    normalizer: f32,
}

impl TokenMixer for Gla {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let (q, k) = self.gated.queries_keys(&x);
        let logits = self.gate_up.forward(self.gate_down.forward(x.clone()));
        let log_decay = log_sigmoid(logits, self.normalizer);
        let gate = Gate::Vector(split_heads(log_decay, self.gated.heads));
        Ok(self.gated.finish(x, [q, k], gate, context, state))
    }

    fn cost(&self, time: usize) -> Cost {
        let weights = self.gate_down.weight.count() + self.gate_up.weight.count();
        let bias = self.gate_up.weight.shape()[0];
        self.gated.cost(time)
            + Cost {
                params: (weights + bias) as u64,
                flops: 2 * (weights * time) as u64,
                state_bytes: 0,
            }
    }
}
