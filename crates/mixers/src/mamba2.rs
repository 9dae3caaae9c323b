//! Mamba-2: the state-space dual form, one scalar decay per head.
//!
//! Dao and Gu (2024), arXiv 2405.21060. `[z; x; B; C; dt] = W_in u`, `[x; B; C] = silu(conv([x; B; C]))`,
//! `Delta = softplus(dt + dt_bias)`, per head `h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T`, `y_t = h_t C_t + D x_t`,
//! `out = W_out norm(y ⊙ silu(z))`. It is the chunkwise recurrence with a scalar gate: keys B, queries C (shared by the
//! heads of a group), values `Delta x`. State: `ssm [sequences, heads, head_dim, state]` and
//! `conv [sequences, D_in + 2·groups·state, conv - 1]`.

use anyformer_ops::activation::softplus;
use anyformer_ops::conv::{causal_conv1d, conv_flops};
use anyformer_ops::norm::gated_rms_norm;
use anyformer_ops::recurrence::{
    Gate, RecurrenceOptions, Write, linear_recurrence, recurrence_flops,
};
use anyformer_ops::{Init, Linear, Param, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, Preset, TokenEntry, read, resolve};
use crate::mamba::{check_conv, step_bias};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Mamba2Config {
    /// Inner width over `dim`.
    pub expand: usize,
    /// Features of a head; divides the inner width.
    pub head_dim: usize,
    /// State per feature of a head.
    pub state: usize,
    /// Groups of heads that share B and C; divides the heads.
    pub groups: usize,
    /// Width of the convolution in tokens.
    pub conv: usize,
    /// Added to the variance of the gated norm.
    pub norm_eps: f64,
}

impl Default for Mamba2Config {
    fn default() -> Self {
        Mamba2Config {
            expand: 2,
            head_dim: 64,
            state: 128,
            groups: 1,
            conv: 4,
            norm_eps: 1e-5,
        }
    }
}

macro_rules! preset {
    ($name:literal, $dim:literal, $layers:literal) => {
        Preset {
            name: $name,
            model: concat!(
                r#"{"dim":"#,
                $dim,
                r#","layers":"#,
                $layers,
                r#","mixers":[{"name":"mamba2"}],"channel":{"name":"none"},"reads":{"tokens":{"vocab":50288}},"gives":{"next_token":{"tied":true}}}"#
            ),
        }
    };
}

static CARD: Card = Card {
    name: "mamba2",
    title: "Mamba-2 (SSD)",
    paper: "Dao, Gu: Transformers are SSMs (ICML 2024), arXiv 2405.21060",
    equation: "[z; x; B; C; dt] = W_in u, [x; B; C] = silu(conv([x; B; C])), Delta = softplus(dt + dt_bias)\nh_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T\ny_t = h_t C_t + D x_t\nout = W_out norm(y * silu(z))",
    direction: Direction::Causal,
    streams: true,
    state: "constant",
    notes: "A whole block: use channel = none for the published models. The decay is one number per head, so that a chunk is matrix products; the state per head is larger than Mamba's.",
    knobs: &[
        Knob {
            name: "expand",
            doc: "inner width over dim",
        },
        Knob {
            name: "head_dim",
            doc: "features of a head; divides the inner width",
        },
        Knob {
            name: "state",
            doc: "state per feature of a head",
        },
        Knob {
            name: "groups",
            doc: "groups of heads that share B and C; divides the heads",
        },
        Knob {
            name: "conv",
            doc: "width of the convolution in tokens, 1 to 8",
        },
        Knob {
            name: "norm_eps",
            doc: "added to the variance of the gated norm",
        },
    ],
    presets: &[
        preset!("130m", 768, 24),
        preset!("370m", 1024, 48),
        preset!("780m", 1536, 48),
        preset!("1.3b", 2048, 48),
        preset!("2.7b", 2560, 64),
    ],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<Mamba2Config>(&CARD, options),
    build: |dim, options, builder| {
        let config: Mamba2Config = read(&CARD, options)?;
        check_conv(&CARD, config.conv)?;
        let inner = config.expand * dim;
        let impossible = |message: String| ConfigError::Impossible {
            mixer: CARD.name,
            message,
        };
        if config.head_dim == 0 || inner == 0 || !inner.is_multiple_of(config.head_dim) {
            return Err(impossible(format!(
                "head_dim {} does not divide the inner width {inner} (expand {} times dim {dim})",
                config.head_dim, config.expand
            )));
        }
        let heads = inner / config.head_dim;
        if config.state == 0 || config.groups == 0 || !heads.is_multiple_of(config.groups) {
            return Err(impossible(format!(
                "groups {} must divide the {heads} heads, and state {} be at least 1",
                config.groups, config.state
            )));
        }
        let mixed = inner + 2 * config.groups * config.state;
        let conv = builder.at("conv1d");
        let a_log = Init::With(Box::new(|rng, count| {
            (0..count)
                .map(|_| (1.0 + 15.0 * rng.random::<f32>()).ln())
                .collect()
        }));
        let bias = Init::With(Box::new(|rng, count| step_bias(rng, count, 1e-3, 0.1)));
        Ok(Box::new(Mamba2 {
            in_proj: Linear::new(builder, "in_proj", dim, inner + mixed + heads, false),
            conv_weight: conv.param("weight", &[mixed, 1, config.conv], Init::FanIn(config.conv)),
            conv_bias: conv.param_no_decay("bias", &[mixed], Init::FanIn(config.conv)),
            dt_bias: builder.param_no_decay("dt_bias", &[heads], bias),
            a_log: builder.param_no_decay("A_log", &[heads], a_log),
            d: builder.param_no_decay("D", &[heads], Init::Ones),
            norm: builder
                .at("norm")
                .param_no_decay("weight", &[inner], Init::Ones),
            out_proj: Linear::residual(builder, "out_proj", inner, dim, false),
            inner,
            heads,
            config,
        }))
    },
};

struct Mamba2 {
    in_proj: Linear,
    conv_weight: Param,
    conv_bias: Param,
    dt_bias: Param,
    a_log: Param,
    d: Param,
    norm: Param,
    out_proj: Linear,
    inner: usize,
    heads: usize,
    config: Mamba2Config,
}

impl TokenMixer for Mamba2 {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let [batch, time, _] = x.dims();
        let (inner, heads) = (self.inner, self.heads);
        let Mamba2Config {
            head_dim,
            state: n,
            groups,
            conv,
            ..
        } = self.config;
        let shared = groups * n;
        let mixed = inner + 2 * shared;
        let parts = self
            .in_proj
            .forward(x)
            .split_with_sizes(vec![inner, mixed, heads], 2);
        let (z, dt) = (parts[0].clone(), parts[2].clone());
        let (mixture, held) = causal_conv1d(
            parts[1].clone(),
            self.conv_weight.tensor::<3>().reshape([mixed, conv]),
            Some(self.conv_bias.tensor()),
            true,
            state.and_then(|state| state.find("conv")),
            context.offsets.clone(),
        );
        let parts = mixture.split_with_sizes(vec![inner, shared, shared], 2);
        let values = parts[0].clone().reshape([batch, time, heads, head_dim]);
        let keys = parts[1].clone().reshape([batch, time, groups, n]);
        let queries = parts[2].clone().reshape([batch, time, groups, n]);
        let delta = softplus(dt + self.dt_bias.tensor::<1>().unsqueeze::<3>());
        let rate = self.a_log.tensor::<1>().exp().neg().unsqueeze::<3>();
        let options = RecurrenceOptions {
            offsets: context.offsets.clone(),
            ..RecurrenceOptions::default()
        };
        let (y, last) = linear_recurrence(
            queries,
            keys,
            values.clone() * delta.clone().unsqueeze_dim(3),
            Gate::Scalar(delta * rate),
            Write::Additive,
            state.map(|state| state.get::<4>("ssm").swap_dims(2, 3)),
            &options,
        );
        let skip = self.d.tensor::<1>().reshape([1, 1, heads, 1]);
        let y = (y + values * skip).reshape([batch, time, inner]);
        let eps = self.config.norm_eps as f32;
        let y = gated_rms_norm(y, z, self.norm.tensor(), eps, true, inner / groups);
        let y = self.out_proj.forward(y);
        let next = context.keep_state.then(|| {
            State::new(context.times_after(batch, time, state))
                .with("conv", held)
                .with("ssm", last.swap_dims(2, 3))
        });
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        let Mamba2Config {
            head_dim,
            state,
            groups,
            conv,
            ..
        } = self.config;
        let mixed = self.inner + 2 * groups * state;
        let weights = self.in_proj.weight.count() + self.out_proj.weight.count();
        let others = [
            &self.conv_weight,
            &self.conv_bias,
            &self.dt_bias,
            &self.a_log,
            &self.d,
            &self.norm,
        ];
        let others: usize = others.iter().map(|param| param.count()).sum();
        Cost {
            params: (weights + others) as u64,
            flops: 2 * (weights * time) as u64
                + conv_flops(time, mixed, conv)
                + recurrence_flops(time, self.heads, state, head_dim, false),
            state_bytes: 4 * (self.inner * state + mixed * (conv - 1)) as u64,
        }
    }
}
