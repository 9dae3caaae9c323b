//! Gated DeltaNet: the delta rule with a decay per head that depends on the data.
//!
//! Yang, Kautz, Hatamizadeh (2025), arXiv 2412.06464. Per head the state decays, then the value read for the key is
//! replaced: `S_t = alpha_t S_{t-1}`, `S_t += beta_t k_t^T (v_t - k_t S_t)`, `o_t = q_t S_t`, with
//! `log alpha_t = -exp(A_log) softplus(w_a . x_t + dt_bias)`. State `[sequences, heads, head_dim, value_dim]` and the
//! last inputs of the convolutions.

use anyformer_ops::activation::{sigmoid, softplus};
use anyformer_ops::norm::{gated_rms_norm, l2_normalise};
use anyformer_ops::recurrence::{
    Gate, RecurrenceOptions, Write, linear_recurrence, recurrence_flops,
};
use anyformer_ops::{Init, Linear, Param, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::card::{
    Card, ConfigError, Direction, Knob, Preset, TokenEntry, head_dim, read, resolve,
};
use crate::delta_net::L2_EPS;
use crate::mamba::step_bias;
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{join_heads, split_heads};
use crate::short::ShortProjection;

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct GatedDeltaNetConfig {
    /// Heads.
    pub heads: usize,
    /// Key features per head; 0 takes `dim / heads`.
    pub head_dim: usize,
    /// Value features over key features.
    pub expand_v: f64,
    /// Width of the short convolutions in tokens; 0 leaves them out (SiLU stays).
    pub conv_size: usize,
    /// Let beta reach 2.
    pub allow_neg_eigval: bool,
    /// Added to the mean square in the norm per head.
    pub norm_eps: f64,
}

impl Default for GatedDeltaNetConfig {
    fn default() -> Self {
        GatedDeltaNetConfig {
            heads: 4,
            head_dim: 0,
            expand_v: 2.0,
            conv_size: 4,
            allow_neg_eigval: false,
            norm_eps: 1e-5,
        }
    }
}

static CARD: Card = Card {
    name: "gated_delta_net",
    title: "Gated DeltaNet",
    paper: "Yang, Kautz, Hatamizadeh: Gated Delta Networks (ICLR 2025), arXiv 2412.06464",
    equation: "S_t = alpha_t S_{t-1}; S_t = S_t + beta_t k_t^T (v_t - k_t S_t)\nlog alpha_t = -exp(A_log) softplus(w_a . x_t + dt_bias)\no_t = q_t S_t / sqrt(head_dim)\ny = W_o (norm_head(o) * silu(W_g x))",
    direction: Direction::Causal,
    streams: true,
    state: "constant",
    notes: "Overwrites like DeltaNet and clears like Mamba-2. With alpha = 1 it is DeltaNet with an output gate.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads",
        },
        Knob {
            name: "head_dim",
            doc: "key features per head; 0 takes dim / heads",
        },
        Knob {
            name: "expand_v",
            doc: "value features over key features",
        },
        Knob {
            name: "conv_size",
            doc: "width of the short convolutions in tokens; 0 leaves them out",
        },
        Knob {
            name: "allow_neg_eigval",
            doc: "let beta reach 2",
        },
        Knob {
            name: "norm_eps",
            doc: "added to the mean square in the norm per head",
        },
    ],
    presets: &[Preset {
        name: "340m",
        model: r#"{"dim":1024,"layers":21,"mixers":[{"name":"gated_delta_net","heads":6,"head_dim":256}],"channel":{"name":"swiglu","hidden":2816},"norm_eps":1e-6,"initializer_range":0.02,"scale_residual":false,"reads":{"tokens":{"vocab":32000}},"gives":{"next_token":{"tied":false}}}"#,
    }],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<GatedDeltaNetConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: GatedDeltaNetConfig = read(&CARD, options)?;
        let head_dim = match config.head_dim {
            0 => head_dim(&CARD, dim, config.heads)?,
            given => given,
        };
        let value_dim = (head_dim as f64 * config.expand_v) as usize;
        if value_dim == 0 || config.heads == 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "heads {} and expand_v {} leave nothing to store",
                    config.heads, config.expand_v
                ),
            });
        }
        let heads = config.heads;
        let (keys, values) = (heads * head_dim, heads * value_dim);
        let short = |name, width| ShortProjection::new(builder, name, dim, width, config.conv_size);
        // A in U(0, 16); the bias is the inverse softplus of a log-uniform step in [1e-3, 0.1].
        let a_log = Init::With(Box::new(move |rng, count| {
            (0..count)
                .map(|_| (rng.random::<f32>() * 16.0).max(1e-4).ln())
                .collect()
        }));
        let dt_bias = Init::With(Box::new(|rng, count| step_bias(rng, count, 1e-3, 0.1)));
        Ok(Box::new(GatedDeltaNet {
            q: short("q", keys),
            k: short("k", keys),
            v: short("v", values),
            a_proj: Linear::new(builder, "a_proj", dim, heads, false),
            b_proj: Linear::new(builder, "b_proj", dim, heads, false),
            g_proj: Linear::new(builder, "g_proj", dim, values, false),
            a_log: builder.param_no_decay("A_log", &[heads], a_log),
            dt_bias: builder.param_no_decay("dt_bias", &[heads], dt_bias),
            o_norm: builder
                .at("o_norm")
                .param_no_decay("weight", &[value_dim], Init::Ones),
            o_proj: Linear::residual(builder, "o_proj", values, dim, false),
            head_dim,
            value_dim,
            config,
        }))
    },
};

struct GatedDeltaNet {
    q: ShortProjection,
    k: ShortProjection,
    v: ShortProjection,
    a_proj: Linear,
    b_proj: Linear,
    g_proj: Linear,
    a_log: Param,
    dt_bias: Param,
    o_norm: Param,
    o_proj: Linear,
    head_dim: usize,
    value_dim: usize,
    config: GatedDeltaNetConfig,
}

impl TokenMixer for GatedDeltaNet {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let [batch, time, _] = x.dims();
        let heads = self.config.heads;
        let mut next = State::new(context.times_after(batch, time, state));
        let mut project = |part: &ShortProjection| {
            let (y, held) = part.forward(x.clone(), context, state);
            if let Some((name, held)) = held {
                next = std::mem::take(&mut next).with(name, held);
            }
            split_heads(y, heads)
        };
        let (q, k, v) = (project(&self.q), project(&self.k), project(&self.v));
        let (q, k) = (l2_normalise(q, L2_EPS), l2_normalise(k, L2_EPS));
        let mut beta = sigmoid(self.b_proj.forward(x.clone()));
        if self.config.allow_neg_eigval {
            beta = beta.mul_scalar(2.0);
        }
        let step = self.a_proj.forward(x.clone()) + self.dt_bias.tensor::<1>().unsqueeze::<3>();
        let rate = self.a_log.tensor::<1>().exp().neg().unsqueeze::<3>();
        let log_decay = softplus(step) * rate;
        let options = RecurrenceOptions {
            scale: (self.head_dim as f32).powf(-0.5),
            offsets: context.offsets.clone(),
            ..RecurrenceOptions::default()
        };
        let initial = state.map(|state| state.get("recurrent"));
        let (o, last) = linear_recurrence(
            q,
            k,
            v,
            Gate::Scalar(log_decay),
            Write::Delta(beta),
            initial,
            &options,
        );
        let gate = split_heads(self.g_proj.forward(x), heads);
        let y = gated_rms_norm(
            o,
            gate,
            self.o_norm.tensor::<1>(),
            self.config.norm_eps as f32,
            false,
            self.value_dim,
        );
        let y = self.o_proj.forward(join_heads(y));
        Ok((y, context.keep_state.then(|| next.with("recurrent", last))))
    }

    fn cost(&self, time: usize) -> Cost {
        let heads = self.config.heads;
        let parts = [&self.a_proj, &self.b_proj, &self.g_proj, &self.o_proj];
        let weights: usize = parts.iter().map(|part| part.weight.count()).sum();
        let own = Cost {
            params: (weights + 2 * heads + self.value_dim) as u64,
            flops: 2 * (weights * time) as u64
                + recurrence_flops(time, heads, self.head_dim, self.value_dim, true),
            state_bytes: 4 * (heads * self.head_dim * self.value_dim) as u64,
        };
        [&self.q, &self.k, &self.v]
            .iter()
            .fold(own, |cost, part| cost + part.cost(time))
    }
}
