//! LRU: a linear recurrent unit with complex diagonal dynamics shared by all features.
//!
//! Orvieto et al. (2023), arXiv 2303.06349: `h_t = lambda h_{t-1} + gamma (B u_t)`, `y_t = Re(C h_t) + D u_t`, with
//! `lambda = exp(-exp(nu) + i exp(theta))` `[state]` and gamma that normalises; then GELU, a linear layer to twice the width
//! and a gated linear unit, as in the block of the paper.

use anyformer_ops::activation::{gelu, glu};
use anyformer_ops::diagonal::{diagonal_flops, diagonal_recurrence};
use anyformer_ops::linear::{Precision, linear};
use anyformer_ops::{Init, Linear, Param, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::linear_cost;

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LruConfig {
    /// Complex size of the state; 0 takes `dim`.
    pub state: usize,
    /// Smallest initial size of an eigenvalue.
    pub r_min: f64,
    /// Largest initial size of an eigenvalue, at most 1.
    pub r_max: f64,
    /// Largest initial phase in radians.
    pub max_phase: f64,
}

impl Default for LruConfig {
    fn default() -> Self {
        LruConfig {
            state: 0,
            r_min: 0.0,
            r_max: 1.0,
            max_phase: std::f64::consts::TAU,
        }
    }
}

static CARD: Card = Card {
    name: "lru",
    title: "LRU (linear recurrent unit)",
    paper: "Orvieto et al.: Resurrecting Recurrent Neural Networks for Long Sequences (ICML 2023), arXiv 2303.06349",
    equation: "lambda = exp(-exp(nu) + i exp(theta))\nh_t = lambda h_{t-1} + exp(gamma_log) (B u_t)\ny_t = Re(C h_t) + D u_t, out = GLU(W gelu(y) + b)",
    direction: Direction::Causal,
    streams: true,
    state: "constant: state complex numbers",
    notes: "Linear in time; the dynamics do not depend on the tokens. Long tasks need r_min near 1 and a small max_phase (Path-X: 0.999, pi/50). Dropout is left out; the recurrence is kept out of weight decay.",
    knobs: &[
        Knob {
            name: "state",
            doc: "complex size of the state; 0 takes dim",
        },
        Knob {
            name: "r_min",
            doc: "smallest initial size of an eigenvalue",
        },
        Knob {
            name: "r_max",
            doc: "largest initial size of an eigenvalue, at most 1",
        },
        Knob {
            name: "max_phase",
            doc: "largest initial phase in radians",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<LruConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: LruConfig = read(&CARD, options)?;
        let (low, high, phase) = (config.r_min, config.r_max, config.max_phase);
        let sound = (0.0..1.0).contains(&low) && low < high && high <= 1.0 && phase > 0.0;
        if !sound {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "expected 0 <= r_min < r_max <= 1 and max_phase above 0, got {low}, {high} and {phase}"
                ),
            });
        }
        let state = if config.state == 0 { dim } else { config.state };
        // Squared sizes are uniform between the limits.
        let squares = move |part: f64| (part * (high * high - low * low) + low * low).max(1e-6);
        // The quantiles of the paper's random draw, so that size and gain belong together without a draw.
        let shared: Vec<f64> = (0..state)
            .map(|index| (index as f64 + 0.5) / state as f64)
            .collect();
        let gains: Vec<f32> = shared
            .iter()
            .map(|part| (0.5 * (1.0 - squares(*part)).max(1e-6).ln()) as f32)
            .collect();
        let sizes: Vec<f32> = shared
            .iter()
            .map(|part| (-0.5 * squares(*part).min(1.0 - 1e-6).ln()).ln() as f32)
            .collect();
        let phases = Init::With(Box::new(move |rng, count| {
            let phase = |_| (phase * rng.random::<f64>().max(1e-6)).ln() as f32;
            (0..count).map(phase).collect()
        }));
        let own = |name: &str, init| builder.param_no_decay(name, &[state], init);
        let wide = |name: &str| {
            let scale = 1.0 / (2.0 * dim as f32).sqrt();
            builder.param(name, &[state, dim], Init::Normal(scale))
        };
        let tall = |name: &str| {
            builder.param(
                name,
                &[dim, state],
                Init::Normal(1.0 / (state as f32).sqrt()),
            )
        };
        Ok(Box::new(Lru {
            nu: own("nu_log", Init::With(Box::new(move |_, _| sizes))),
            theta: own("theta_log", phases),
            gamma: own("gamma_log", Init::With(Box::new(move |_, _| gains))),
            b: ["B_re", "B_im"].map(wide),
            c: ["C_re", "C_im"].map(tall),
            d: builder.param_no_decay("D", &[dim], Init::Normal(1.0)),
            output: Linear::residual(builder, "output_linear", dim, 2 * dim, true),
            dim,
            state,
        }))
    },
};

struct Lru {
    nu: Param,
    theta: Param,
    gamma: Param,
    b: [Param; 2],
    c: [Param; 2],
    d: Param,
    output: Linear,
    dim: usize,
    state: usize,
}

impl Lru {
    /// `exp(-exp(nu) + i exp(theta))`, `[2, state]`.
    fn lambda(&self) -> Tensor<2> {
        let row = |param: &Param| param.tensor::<1>().exp().reshape([1, self.state]);
        let (size, angle) = (row(&self.nu).neg().exp(), row(&self.theta));
        Tensor::cat(
            vec![size.clone() * angle.clone().cos(), size * angle.sin()],
            0,
        )
    }
}

impl TokenMixer for Lru {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let [batch, time, dim] = x.dims();
        let (size, rows) = (self.state, batch * time);
        let flat = x.clone().reshape([rows, dim]);
        // Real parts, then imaginary ones.
        let gamma = self.gamma.tensor::<1>().exp().reshape([size, 1]);
        let wide = self.b.each_ref().map(|b| b.tensor::<2>() * gamma.clone());
        let v = linear(flat, Tensor::cat(wide.to_vec(), 0), None, Precision::F32);
        // The state is kept as [sequences, state, 2].
        let before = state.map(|state| {
            let held = state.get::<3>("h").swap_dims(1, 2);
            let sequences = held.dims()[0];
            held.reshape([sequences, 2 * size])
        });
        let v = v.reshape([batch, time, 2 * size]);
        let offsets = context.offsets.as_ref();
        let (h, last) = diagonal_recurrence(v, self.lambda(), before, offsets);
        let [c_real, c_imag] = self.c.each_ref().map(|c| c.tensor::<2>());
        let tall = Tensor::cat(vec![c_real, c_imag.neg()], 1);
        let y = linear(h.reshape([rows, 2 * size]), tall, None, Precision::F32);
        let y = y.reshape([batch, time, dim]) + x * self.d.tensor::<1>().reshape([1, 1, dim]);
        let y = glu(self.output.forward(gelu(y)));
        let next = context.keep_state.then(|| {
            let sequences = last.dims()[0];
            let last = last.reshape([sequences, 2, size]).swap_dims(1, 2);
            State::new(context.times_after(batch, time, state)).with("h", last)
        });
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        let own = [&self.nu, &self.theta, &self.gamma, &self.d];
        let own = own.into_iter().chain(&self.b).chain(&self.c);
        linear_cost(&[&self.output], time)
            + Cost {
                params: own.map(|param| param.count() as u64).sum(),
                flops: 8 * (time * self.dim * self.state) as u64 + diagonal_flops(time, self.state),
                state_bytes: 8 * self.state as u64,
            }
    }
}
