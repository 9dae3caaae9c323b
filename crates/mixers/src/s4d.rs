//! S4D: a diagonal state space with fixed dynamics, one per feature, as a long convolution.
//!
//! Gu et al. (2022), arXiv 2206.11893. Per feature, with `m = state / 2` complex modes (the other half are their
//! conjugates) and `z = dt A`: `h_t = e^z h_{t-1} + u_t`, `y_t = 2 Re(sum_m C (e^z - 1) / A h_t) + D u_t`; then GELU, a linear
//! layer to twice the width, and a gated linear unit, as in the released layer. Both directions: a second C whose run goes
//! backwards over the tokens after t.
//!
//! Computed in chunks: inside a chunk the convolution is a triangular matrix per feature, between chunks the states go on.

use anyformer_ops::activation::{gelu, sigmoid};
use anyformer_ops::{Builder, Init, Linear, Param, Tensor, meter};
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
pub struct S4dConfig {
    /// Real size of a feature's state; even.
    pub state: usize,
    /// Smallest initial step size.
    pub dt_min: f64,
    /// Largest initial step size.
    pub dt_max: f64,
    /// Look back only.
    pub causal: bool,
}

impl Default for S4dConfig {
    fn default() -> Self {
        S4dConfig {
            state: 16,
            dt_min: 0.001,
            dt_max: 0.1,
            causal: true,
        }
    }
}

static CARD: Card = Card {
    name: "s4d",
    title: "S4D (diagonal state space)",
    paper: "Gu, Gupta, Goel, Re: On the Parameterization and Initialization of Diagonal State Space Models (NeurIPS 2022), arXiv 2206.11893",
    equation: "h_t = exp(dt A) h_{t-1} + u_t\ny_t = 2 Re(C (exp(dt A) - 1) / A h_t) + D u_t\nout = GLU(W gelu(y) + b)",
    direction: Direction::Either,
    streams: true,
    state: "constant: dim x state",
    notes: "The released S4D-Lin layer: A = -exp(a) + i b from -1/2 + i pi n, B folded into C. Time costs grow linearly; the dynamics do not depend on the tokens. Dropout and the separate learning rate of its parameters are left out; they are kept out of weight decay.",
    knobs: &[
        Knob {
            name: "state",
            doc: "real size of a feature's state; even",
        },
        Knob {
            name: "dt_min",
            doc: "smallest initial step size",
        },
        Knob {
            name: "dt_max",
            doc: "largest initial step size",
        },
        Knob {
            name: "causal",
            doc: "look back only; otherwise a second run goes backwards",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<S4dConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: S4dConfig = read(&CARD, options)?;
        let sound = config.dt_min > 0.0 && config.dt_max >= config.dt_min;
        if config.state < 2 || !config.state.is_multiple_of(2) || !sound {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "state must be even and at least 2, and 0 < dt_min <= dt_max, got {}, {} and {}",
                    config.state, config.dt_min, config.dt_max
                ),
            });
        }
        Ok(Box::new(S4d::new(dim, config, builder)))
    },
};

struct S4d {
    log_dt: Param,
    log_a_real: Param,
    a_imag: Param,
    /// Forwards, and backwards where both directions are seen: `[dim, modes, 2]`, real and imaginary parts.
    c: Vec<Param>,
    d: Param,
    output: Linear,
    dim: usize,
    modes: usize,
}

/// What a run over chunks of one length needs, from the parameters.
struct Dynamics {
    /// `[dim, chunk, chunk]`: the convolution inside a chunk.
    inner: Tensor<3>,
    /// `[dim, 2 modes, chunk]`: what a chunk adds to the state, real parts first.
    write: Tensor<3>,
    /// `[dim, chunk, 2 modes]`: what the state before a chunk adds to its outputs.
    read: Tensor<3>,
    /// `[dim, modes, 1]`: real and imaginary parts of the state's factor over a chunk.
    decay: [Tensor<3>; 2],
}

impl S4d {
    fn new(dim: usize, config: S4dConfig, builder: &Builder) -> Self {
        let modes = config.state / 2;
        let (low, high) = (config.dt_min.ln() as f32, config.dt_max.ln() as f32);
        let steps = Init::With(Box::new(move |rng, count| {
            (0..count)
                .map(|_| low + (high - low) * rng.random::<f32>())
                .collect()
        }));
        let frequencies = Init::With(Box::new(move |_, count| {
            let at = |index: usize| std::f32::consts::PI * (index % modes) as f32;
            (0..count).map(at).collect()
        }));
        let shape = [dim, modes];
        let direction = |name: &str| {
            builder.param_no_decay(name, &[dim, modes, 2], Init::Normal(0.5f32.sqrt()))
        };
        let names: &[&str] = if config.causal {
            &["C"]
        } else {
            &["C", "C_back"]
        };
        S4d {
            log_dt: builder.param_no_decay("log_dt", &[dim], steps),
            log_a_real: builder.param_no_decay("log_A_real", &shape, Init::Constant(0.5f32.ln())),
            a_imag: builder.param_no_decay("A_imag", &shape, frequencies),
            c: names.iter().map(|name| direction(name)).collect(),
            d: builder.param_no_decay("D", &[dim], Init::Normal(1.0)),
            output: Linear::residual(builder, "output_linear", dim, 2 * dim, true),
            dim,
            modes,
        }
    }

    /// The dynamics of a direction over chunks of `chunk` tokens.
    fn dynamics(&self, c: &Param, chunk: usize) -> Dynamics {
        let (dim, modes) = (self.dim, self.modes);
        let dt = self.log_dt.tensor::<1>().exp().reshape([dim, 1]);
        let a_real = self.log_a_real.tensor::<2>().exp().neg();
        let a_imag = self.a_imag.tensor::<2>();
        let device = dt.device();
        let (z_real, z_imag) = (a_real.clone() * dt.clone(), a_imag.clone() * dt);
        // C (e^z - 1) / A.
        let c = c.tensor::<3>();
        let part = |at: usize| c.clone().narrow(2, at, 1).reshape([dim, modes]);
        let grown = z_real.clone().exp();
        let (e_real, e_imag) = (
            grown.clone() * z_imag.clone().cos() - 1.0,
            grown * z_imag.clone().sin(),
        );
        let size = a_real.clone() * a_real.clone() + a_imag.clone() * a_imag.clone();
        let q_real =
            (e_real.clone() * a_real.clone() + e_imag.clone() * a_imag.clone()) / size.clone();
        let q_imag = (e_imag * a_real - e_real * a_imag) / size;
        let c_real = part(0) * q_real.clone() - part(1) * q_imag.clone();
        let c_imag = part(0) * q_imag + part(1) * q_real;
        // e^(z l) for l = 0 to chunk, [dim, modes, chunk + 1].
        let steps: Vec<f32> = (0..=chunk).map(|step| step as f32).collect();
        let steps = Tensor::<1>::from_data(steps.as_slice(), &device).reshape([1, 1, chunk + 1]);
        let over = |z: Tensor<2>| z.reshape([dim, modes, 1]) * steps.clone();
        let (size, angle) = (over(z_real).exp(), over(z_imag));
        let (p_real, p_imag) = (size.clone() * angle.clone().cos(), size * angle.sin());
        let wide = |c: Tensor<2>| c.reshape([dim, modes, 1]);
        let (c_real, c_imag) = (wide(c_real), wide(c_imag));
        // 2 C' e^(z l), [dim, modes, chunk + 1].
        let o_real = (p_real.clone() * c_real.clone() - p_imag.clone() * c_imag.clone()) * 2.0;
        let o_imag = (p_real.clone() * c_imag + p_imag.clone() * c_real) * 2.0;
        let kernel = o_real.clone().sum_dim(1).reshape([dim, chunk + 1]);
        let none = Tensor::zeros([dim, 1], &device);
        let kernel = Tensor::cat(vec![kernel.narrow(1, 0, chunk), none], 1);
        let places = (0..chunk * chunk).map(|at| {
            let (row, column) = (at / chunk, at % chunk);
            if row >= column { row - column } else { chunk }
        });
        let inner = kernel
            .select(1, indices(places, &device))
            .reshape([dim, chunk, chunk]);
        let back = indices((0..chunk).rev(), &device);
        let write = Tensor::cat(vec![p_real.clone(), p_imag.clone()], 1).select(2, back);
        let later = |x: Tensor<3>| x.narrow(2, 1, chunk);
        let read = Tensor::cat(vec![later(o_real), later(o_imag).neg()], 1).swap_dims(1, 2);
        let last = |x: Tensor<3>| x.narrow(2, chunk, 1);
        Dynamics {
            inner,
            write,
            read,
            decay: [last(p_real), last(p_imag)],
        }
    }

    /// Chunks of `chunk` tokens that fill x `[rows, time, dim]`, from a state `[dim, 2 modes, rows]`.
    fn chunks(
        &self,
        c: &Param,
        x: Tensor<3>,
        chunk: usize,
        state: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        let [rows, time, dim] = x.dims();
        let (count, modes) = (time / chunk, self.modes);
        meter::add((rows * count) as u64 * self.chunk_flops(chunk));
        let dynamics = self.dynamics(c, chunk);
        let x = x
            .reshape([rows, count, chunk, dim])
            .permute([3, 2, 1, 0])
            .reshape([dim, chunk, count * rows]);
        let added = dynamics.write.matmul(x.clone());
        let mut before = Vec::with_capacity(count);
        let mut state = state;
        let [d_real, d_imag] = dynamics.decay;
        for at in 0..count {
            before.push(state.clone());
            let real = state.clone().narrow(1, 0, modes);
            let imag = state.narrow(1, modes, modes);
            let gone = Tensor::cat(
                vec![
                    real.clone() * d_real.clone() - imag.clone() * d_imag.clone(),
                    real * d_imag.clone() + imag * d_real.clone(),
                ],
                1,
            );
            state = gone + added.clone().narrow(2, at * rows, rows);
        }
        let y = dynamics.inner.matmul(x) + dynamics.read.matmul(Tensor::cat(before, 2));
        let y = y
            .reshape([dim, chunk, count, rows])
            .permute([3, 2, 1, 0])
            .reshape([rows, time, dim]);
        (y, state)
    }

    /// The convolution of a direction over x `[rows, time, dim]`; the state is `[rows, dim, 2 modes]`.
    fn convolve(
        &self,
        c: &Param,
        x: Tensor<3>,
        state: Option<Tensor<3>>,
    ) -> (Tensor<3>, Tensor<3>) {
        let [rows, time, dim] = x.dims();
        let mut state = match state {
            Some(state) => state.permute([1, 2, 0]),
            None => Tensor::zeros([dim, 2 * self.modes, rows], &x.device()),
        };
        let whole = time / CHUNK * CHUNK;
        let mut parts = Vec::new();
        for (start, length, chunk) in [(0, whole, CHUNK), (whole, time - whole, time - whole)] {
            if length > 0 {
                let piece = x.clone().narrow(1, start, length);
                let (y, next) = self.chunks(c, piece, chunk, state);
                parts.push(y);
                state = next;
            }
        }
        (Tensor::cat(parts, 1), state.permute([2, 0, 1]))
    }

    /// Rows of one length, `[rows, time, dim]`.
    fn run(&self, x: Tensor<3>, state: Option<Tensor<3>>) -> (Tensor<3>, Tensor<3>) {
        let [rows, time, dim] = x.dims();
        let (mut y, state) = self.convolve(&self.c[0], x.clone(), state);
        if let Some(back) = self.c.get(1) {
            // Token t gets what the backward run holds after the token next to it.
            let (from_end, _) = self.convolve(back, x.clone().flip([1]), None);
            let none = Tensor::zeros([rows, 1, dim], &x.device());
            let moved = Tensor::cat(vec![none, from_end], 1).narrow(1, 0, time);
            y = y + moved.flip([1]);
        }
        let y = y + x * self.d.tensor::<1>().reshape([1, 1, dim]);
        let both = self.output.forward(gelu(y));
        let [a, b] = [0, dim].map(|start| both.clone().narrow(2, start, dim));
        (a * sigmoid(b), state)
    }

    fn chunk_flops(&self, chunk: usize) -> u64 {
        2 * (self.dim * chunk * (chunk + 4 * self.modes)) as u64
    }
}

impl TokenMixer for S4d {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let causal = self.c.len() == 1;
        if !causal && state.is_some() {
            return Err(RunError::CannotStream(CARD.name));
        }
        let held = state.map(|state| state.get::<3>("h"));
        let times = context.times_after(x.dims()[0], x.dims()[1], state);
        let (y, end) = row_by_row(x, context, held, |x, state| self.run(x, state));
        let next = (context.keep_state && causal).then(|| State::new(times).with("h", end));
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        let runs = |time: usize| {
            let rest = time % CHUNK;
            (time / CHUNK) as u64 * self.chunk_flops(CHUNK) + self.chunk_flops(rest)
        };
        let own = [&self.log_dt, &self.log_a_real, &self.a_imag, &self.d];
        let own = own
            .into_iter()
            .chain(&self.c)
            .map(Param::count)
            .sum::<usize>();
        linear_cost(&[&self.output], time)
            + Cost {
                params: own as u64,
                flops: self.c.len() as u64 * runs(time),
                state_bytes: if self.c.len() == 1 {
                    4 * (self.dim * 2 * self.modes) as u64
                } else {
                    0
                },
            }
    }
}
