//! Mamba: a diagonal state-space recurrence whose step size, input map and output map depend on the token.
//!
//! Gu and Dao (2023), arXiv 2312.00752, in the form of the released code (input map `Delta B`). With `D_in = expand·dim`:
//! `[x; z] = W_in u`, `x = silu(conv(x))`, `[dt; B; C] = W_x x`, `Delta = softplus(W_dt dt + b_dt)`,
//! `h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t`, `y_t = C_t . h_t + D x_t`, `out = W_out (y ⊙ silu(z))`. State:
//! `ssm [sequences, D_in, state]` and `conv [sequences, D_in, conv - 1]`, the last inputs of the convolution.

use anyformer_ops::activation::mul_silu;
use anyformer_ops::conv::{causal_conv1d, conv_flops};
use anyformer_ops::scan::{ScanInputs, scan_flops, selective_scan};
use anyformer_ops::{Init, Linear, Param, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, Preset, TokenEntry, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct MambaConfig {
    /// Inner width over `dim`.
    pub expand: usize,
    /// State per inner channel.
    pub state: usize,
    /// Width of the convolution in tokens.
    pub conv: usize,
    /// Width of the step-size projection; 0 takes `dim/16`, rounded up.
    pub dt_rank: usize,
    /// Smallest initial step.
    pub dt_min: f64,
    /// Largest initial step.
    pub dt_max: f64,
}

impl Default for MambaConfig {
    fn default() -> Self {
        MambaConfig {
            expand: 2,
            state: 16,
            conv: 4,
            dt_rank: 0,
            dt_min: 1e-3,
            dt_max: 0.1,
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
                r#","mixers":[{"name":"mamba"}],"channel":{"name":"none"},"reads":{"tokens":{"vocab":50280}},"gives":{"next_token":{"tied":true}}}"#
            ),
        }
    };
}

static CARD: Card = Card {
    name: "mamba",
    title: "Mamba (S6)",
    paper: "Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023), arXiv 2312.00752",
    equation: "[x; z] = W_in u, x = silu(conv(x)), [dt; B; C] = W_x x, Delta = softplus(W_dt dt + b_dt)\nh_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t\ny_t = C_t . h_t + D x_t\nout = W_out (y * silu(z))",
    direction: Direction::Causal,
    streams: true,
    state: "constant",
    notes: "A whole block: use channel = none for the published models. The input map is Delta B as in the released code, not the paper's zero-order hold. Weak at exact recall when the state is small.",
    knobs: &[
        Knob {
            name: "expand",
            doc: "inner width over dim",
        },
        Knob {
            name: "state",
            doc: "state per inner channel",
        },
        Knob {
            name: "conv",
            doc: "width of the convolution in tokens, 1 to 8",
        },
        Knob {
            name: "dt_rank",
            doc: "width of the step-size projection; 0 takes dim/16, rounded up",
        },
        Knob {
            name: "dt_min",
            doc: "smallest initial step",
        },
        Knob {
            name: "dt_max",
            doc: "largest initial step",
        },
    ],
    presets: &[
        preset!("130m", 768, 24),
        preset!("370m", 1024, 48),
        preset!("790m", 1536, 48),
        preset!("1.4b", 2048, 48),
        preset!("2.8b", 2560, 64),
    ],
};

/// The inverse softplus of steps log-uniform in `[low, high]`, at least 1e-4: how Mamba starts its step bias.
pub(crate) fn step_bias(rng: &mut ChaCha8Rng, count: usize, low: f64, high: f64) -> Vec<f32> {
    let (low, high) = (low.ln(), high.ln());
    (0..count)
        .map(|_| (low + rng.random::<f64>() * (high - low)).exp().max(1e-4))
        .map(|dt| (dt + (-(-dt).exp_m1()).ln()) as f32)
        .collect()
}

/// Refuses a convolution that the kernel cannot run.
pub(crate) fn check_conv(card: &'static Card, width: usize) -> Result<(), ConfigError> {
    match (1..=8).contains(&width) {
        true => Ok(()),
        false => Err(ConfigError::Impossible {
            mixer: card.name,
            message: format!("expected a convolution of 1 to 8 tokens, got {width}"),
        }),
    }
}

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<MambaConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: MambaConfig = read(&CARD, options)?;
        check_conv(&CARD, config.conv)?;
        let (inner, state) = (config.expand * dim, config.state);
        if inner == 0 || state == 0 || !(config.dt_min > 0.0 && config.dt_max >= config.dt_min) {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "expand {} and state {state} must be at least 1, and 0 < dt_min {} <= dt_max {}",
                    config.expand, config.dt_min, config.dt_max
                ),
            });
        }
        let rank = match config.dt_rank {
            0 => dim.div_ceil(16),
            given => given,
        };
        let (low, high) = (config.dt_min, config.dt_max);
        let conv = builder.at("conv1d");
        let step = builder.at("dt_proj");
        let bound = (rank as f32).powf(-0.5);
        Ok(Box::new(Mamba {
            in_proj: Linear::new(builder, "in_proj", dim, 2 * inner, false),
            conv_weight: conv.param("weight", &[inner, 1, config.conv], Init::FanIn(config.conv)),
            conv_bias: conv.param_no_decay("bias", &[inner], Init::FanIn(config.conv)),
            x_proj: Linear::new(builder, "x_proj", inner, rank + 2 * state, false),
            dt_weight: step.param("weight", &[inner, rank], Init::Uniform(-bound, bound)),
            dt_bias: step.param_no_decay(
                "bias",
                &[inner],
                Init::With(Box::new(move |rng, count| step_bias(rng, count, low, high))),
            ),
            a_log: builder.param_no_decay(
                "A_log",
                &[inner, state],
                Init::With(Box::new(move |_, count| {
                    (0..count).map(|i| ((i % state + 1) as f32).ln()).collect()
                })),
            ),
            d: builder.param_no_decay("D", &[inner], Init::Ones),
            out_proj: Linear::residual(builder, "out_proj", inner, dim, false),
            inner,
            rank,
            state,
            conv: config.conv,
        }))
    },
};

struct Mamba {
    in_proj: Linear,
    conv_weight: Param,
    conv_bias: Param,
    x_proj: Linear,
    dt_weight: Param,
    dt_bias: Param,
    a_log: Param,
    d: Param,
    out_proj: Linear,
    inner: usize,
    rank: usize,
    state: usize,
    conv: usize,
}

impl TokenMixer for Mamba {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let [batch, time, _] = x.dims();
        let (inner, n) = (self.inner, self.state);
        let parts = self
            .in_proj
            .forward(x)
            .split_with_sizes(vec![inner, inner], 2);
        let (u, z) = (parts[0].clone(), parts[1].clone());
        let (u, held) = causal_conv1d(
            u,
            self.conv_weight.tensor::<3>().reshape([inner, self.conv]),
            Some(self.conv_bias.tensor()),
            true,
            state.and_then(|state| state.find("conv")),
            context.offsets.clone(),
        );
        let parts = self
            .x_proj
            .forward(u.clone())
            .split_with_sizes(vec![self.rank, n, n], 2);
        let step = Linear {
            weight: self.dt_weight.clone(),
            bias: None,
            precision: self.x_proj.precision,
        };
        let (y, last) = selective_scan(
            ScanInputs {
                u,
                delta: step.forward(parts[0].clone()),
                delta_bias: self.dt_bias.tensor(),
                a: self.a_log.tensor::<2>().exp().neg(),
                b: parts[1].clone(),
                c: parts[2].clone(),
                d: self.d.tensor(),
            },
            state.map(|state| state.get("ssm")),
            context.offsets.clone(),
        );
        let y = self.out_proj.forward(mul_silu(y, z));
        let next = context.keep_state.then(|| {
            State::new(context.times_after(batch, time, state))
                .with("conv", held)
                .with("ssm", last)
        });
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        let linear = [&self.in_proj, &self.x_proj, &self.out_proj];
        let weights: usize = linear.iter().map(|part| part.weight.count()).sum();
        let weights = weights + self.dt_weight.count();
        let others = [
            &self.conv_weight,
            &self.conv_bias,
            &self.dt_bias,
            &self.a_log,
            &self.d,
        ];
        let others: usize = others.iter().map(|param| param.count()).sum();
        Cost {
            params: (weights + others) as u64,
            flops: 2 * (weights * time) as u64
                + conv_flops(time, self.inner, self.conv)
                + scan_flops(time, self.inner, self.state),
            state_bytes: 4 * (self.inner * (self.state + self.conv - 1)) as u64,
        }
    }
}
