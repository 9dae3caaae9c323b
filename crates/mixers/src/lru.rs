//! LRU: a linear recurrent unit with complex diagonal dynamics shared by all features.
//!
//! Orvieto et al. (2023), arXiv 2303.06349: `h_t = lambda h_{t-1} + gamma (B u_t)`, `y_t = Re(C h_t) + D u_t`, with
//! `lambda = exp(-exp(nu) + i exp(theta))` `[state]` and gamma that normalises; then GELU, a linear layer to twice the width
//! and a gated linear unit, as in the block of the paper. Computed in chunks, states going on between them.

use anyformer_ops::activation::{gelu, sigmoid};
use anyformer_ops::{Init, Linear, Param, Tensor, meter};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{indices, linear_cost, row_by_row};

/// Tokens of a chunk.
const CHUNK: usize = 32;

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

type Complex = [Tensor<3>; 2];

impl Lru {
    /// States after every token from inputs `[state, rows, time]` in chunks of `chunk`, and the last, from `[state, rows, 1]`.
    fn chunks(&self, v: Complex, chunk: usize, from: Complex) -> (Complex, Complex) {
        let [state, rows, time] = v[0].dims();
        let count = time / chunk;
        meter::add(self.chunk_flops(chunk) * (count * rows) as u64);
        let device = v[0].device();
        let steps: Vec<f32> = (0..=chunk).map(|step| step as f32).collect();
        let steps = Tensor::<1>::from_data(steps.as_slice(), &device).reshape([1, chunk + 1]);
        let column = |param: &Param| param.tensor::<1>().exp().reshape([state, 1]);
        let size = (column(&self.nu).neg() * steps.clone()).exp();
        let angle = column(&self.theta) * steps;
        let powers = [size.clone() * angle.clone().cos(), size * angle.sin()];
        // The power of the distance from column to row, zero above the diagonal.
        let places = indices(
            (0..chunk * chunk).map(|at| {
                let (row, column) = (at / chunk, at % chunk);
                if row >= column { row - column } else { chunk }
            }),
            &device,
        );
        let none = Tensor::zeros([state, 1], &device);
        let triangle = powers.clone().map(|power| {
            Tensor::cat(vec![power.narrow(1, 0, chunk), none.clone()], 1)
                .select(1, places.clone())
                .reshape([state, chunk, chunk])
        });
        let v = v.map(|part| part.reshape([state, rows * count, chunk]).swap_dims(1, 2));
        let times = |at: usize, part: usize| triangle[at].clone().matmul(v[part].clone());
        let wide = |x: Tensor<3>| x.reshape([state, chunk, rows, count]);
        let inner = [
            wide(times(0, 0) - times(1, 1)),
            wide(times(0, 1) + times(1, 0)),
        ];
        let later = powers.map(|power| power.narrow(1, 1, chunk).reshape([state, chunk, 1]));
        let mut held = from.map(|part| part.reshape([state, 1, rows]));
        let mut all: [Vec<Tensor<4>>; 2] = [Vec::new(), Vec::new()];
        for at in 0..count {
            let [real, imag] = held;
            let gone = [
                later[0].clone() * real.clone() - later[1].clone() * imag.clone(),
                later[0].clone() * imag + later[1].clone() * real,
            ];
            let now = [0, 1].map(|part| {
                let own = inner[part].clone().narrow(3, at, 1);
                own.reshape([state, chunk, rows]) + gone[part].clone()
            });
            held = now.clone().map(|part| part.narrow(1, chunk - 1, 1));
            for (all, part) in all.iter_mut().zip(now) {
                all.push(part.reshape([state, chunk, rows, 1]));
            }
        }
        let joined = all.map(|parts| {
            let all = Tensor::cat(parts, 3);
            all.permute([0, 2, 3, 1]).reshape([state, rows, time])
        });
        (joined, held.map(|part| part.reshape([state, rows, 1])))
    }

    /// Rows of one length, `[rows, time, dim]`, from a state `[rows, state, 2]`.
    fn run(&self, x: Tensor<3>, from: Option<Tensor<3>>) -> (Tensor<3>, Tensor<3>) {
        let [rows, time, dim] = x.dims();
        let state = self.state;
        meter::add(8 * (rows * time * dim * state) as u64);
        let flat = x.clone().reshape([rows * time, dim]);
        let gamma = self.gamma.tensor::<1>().exp().reshape([state, 1]);
        let v = self.b.each_ref().map(|b| {
            let weight = b.tensor::<2>() * gamma.clone();
            weight
                .matmul(flat.clone().transpose())
                .reshape([state, rows, time])
        });
        let mut held = match from {
            Some(from) => [0, 1].map(|part| from.clone().narrow(2, part, 1).permute([1, 0, 2])),
            None => [(); 2].map(|()| Tensor::zeros([state, rows, 1], &x.device())),
        };
        let whole = time / CHUNK * CHUNK;
        let mut parts: [Vec<Tensor<3>>; 2] = [Vec::new(), Vec::new()];
        for (start, length, chunk) in [(0, whole, CHUNK), (whole, time - whole, time - whole)] {
            if length > 0 {
                let piece = v.clone().map(|part| part.narrow(2, start, length));
                let (h, next) = self.chunks(piece, chunk, held);
                held = next;
                for (parts, part) in parts.iter_mut().zip(h) {
                    parts.push(part);
                }
            }
        }
        let h = parts.map(|parts| Tensor::cat(parts, 2).reshape([state, rows * time]));
        let [real, imag] = h;
        let [c_real, c_imag] = self.c.each_ref().map(|c| c.tensor::<2>());
        let y = c_real.matmul(real) - c_imag.matmul(imag);
        let y = y.transpose().reshape([rows, time, dim])
            + x * self.d.tensor::<1>().reshape([1, 1, dim]);
        let both = self.output.forward(gelu(y));
        let [a, b] = [0, dim].map(|start| both.clone().narrow(2, start, dim));
        let held = held.map(|part| part.permute([1, 0, 2])).to_vec();
        (a * sigmoid(b), Tensor::cat(held, 2))
    }

    fn chunk_flops(&self, chunk: usize) -> u64 {
        8 * (self.state * chunk * chunk) as u64
    }
}

impl TokenMixer for Lru {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let held = state.map(|state| state.get::<3>("h"));
        let times = context.times_after(x.dims()[0], x.dims()[1], state);
        let (y, end) = row_by_row(x, context, held, |x, state| self.run(x, state));
        let next = context.keep_state.then(|| State::new(times).with("h", end));
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        let own = [&self.nu, &self.theta, &self.gamma, &self.d];
        let own = own.into_iter().chain(&self.b).chain(&self.c);
        let chunks =
            (time / CHUNK) as u64 * self.chunk_flops(CHUNK) + self.chunk_flops(time % CHUNK);
        linear_cost(&[&self.output], time)
            + Cost {
                params: own.map(|param| param.count() as u64).sum(),
                flops: 8 * (time * self.dim * self.state) as u64 + chunks,
                state_bytes: 8 * self.state as u64,
            }
    }
}
