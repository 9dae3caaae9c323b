//! S4D: a diagonal state space with fixed dynamics, one per feature, as a long convolution.
//!
//! Gu et al. (2022), arXiv 2206.11893. Per feature, with `m = state / 2` complex modes (the other half are their
//! conjugates) and `z = dt A`: `h_t = e^z h_{t-1} + u_t`, `y_t = 2 Re(sum_m C (e^z - 1) / A h_t) + D u_t`; then GELU, a linear
//! layer to twice the width, and a gated linear unit, as in the released layer. Both directions: a second C whose run goes
//! backwards over the tokens after t.
//!
//! Whole sequences of more than [`LONG`] tokens, on the CPU: the taps of the convolution, then the convolution through Fourier
//! transforms. Otherwise in chunks: inside a chunk the convolution is a triangular matrix per feature, between chunks the
//! states go on.

use std::sync::Arc;

use anyformer_ops::activation::{gelu, glu};
use anyformer_ops::long_conv::{long_conv, long_conv_flops};
use anyformer_ops::{Builder, Init, Linear, Param, Tensor, device_is_cpu, meter};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{indices, linear_cost, row_by_row};

/// Tokens of a chunk.
const CHUNK: usize = 32;
/// Above this many tokens of the longest sequence the transforms take over from the chunks. By count of operations, not by
/// measurement yet: `anyformer bench --mixers s4d --lengths 256,512,1024,4096` before and after a change of it.
const LONG: usize = 256;

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

    /// The dynamics of a direction: `z` and `C (e^z - 1) / A`, real and imaginary parts `[dim, modes]`.
    fn modes_of(&self, c: &Param) -> [[Tensor<2>; 2]; 2] {
        let (dim, modes) = (self.dim, self.modes);
        let dt = self.log_dt.tensor::<1>().exp().reshape([dim, 1]);
        let a_real = self.log_a_real.tensor::<2>().exp().neg();
        let a_imag = self.a_imag.tensor::<2>();
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
        [[z_real, z_imag], [c_real, c_imag]]
    }

    /// The taps of a direction's convolution, `2 Re(sum_m C' e^(z l))` for l below `time`: `[dim, time]`. With l = 32 a + b it is
    /// a product of what depends on a and what depends on b.
    fn taps(&self, c: &Param, time: usize) -> Tensor<2> {
        let count = time.div_ceil(CHUNK);
        let [z, c] = self.modes_of(c);
        let small = powers(&z, (0..CHUNK).map(|b| b as f32));
        let [o_real, o_imag] = outputs(powers(&z, (0..count).map(|a| (a * CHUNK) as f32)), c);
        let left = Tensor::cat(vec![o_real, o_imag.neg()], 1).swap_dims(1, 2);
        let taps = left.matmul(Tensor::cat(small.into(), 1));
        taps.reshape([self.dim, count * CHUNK]).narrow(1, 0, time)
    }

    /// The dynamics of a direction over chunks of `chunk` tokens.
    fn dynamics(&self, c: &Param, chunk: usize) -> Dynamics {
        let dim = self.dim;
        let [z, c] = self.modes_of(c);
        let device = z[0].device();
        // For l = 0 to chunk, [dim, modes, chunk + 1].
        let [p_real, p_imag] = powers(&z, (0..=chunk).map(|step| step as f32));
        let [o_real, o_imag] = outputs([p_real.clone(), p_imag.clone()], c);
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

    /// Whole sequences of any lengths through Fourier transforms.
    fn transformed(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let [rows, time, dim] = x.dims();
        let offsets = context.sequences(rows, time);
        let lengths = offsets.windows(2).map(|pair| pair[1] - pair[0]);
        let longest = lengths.max().unwrap_or(0);
        let taps = self.taps(&self.c[0], longest);
        meter::add(self.taps_flops(longest));
        let mut y = long_conv(x.clone(), taps, Some(&offsets));
        if let Some(back) = self.c.get(1) {
            // Token t gets what the backward run holds after the token next to it: a tap of zero comes first.
            let none = Tensor::zeros([dim, 1], &x.device());
            let taps = self.taps(back, longest - 1);
            meter::add(self.taps_flops(longest - 1));
            let taps = Tensor::cat(vec![none, taps], 1);
            let total = rows * time;
            let from_end = offsets.iter().rev().map(|offset| total - offset).collect();
            let turned = x.clone().reshape([1, total, dim]).flip([1]);
            let from_end = long_conv(turned, taps, Some(&Arc::new(from_end)));
            y = y + from_end.flip([1]).reshape([rows, time, dim]);
        }
        y
    }

    fn taps_flops(&self, time: usize) -> u64 {
        2 * (self.dim * time.next_multiple_of(CHUNK) * 2 * self.modes) as u64
    }

    /// The rest of the layer, from what the convolution gives.
    fn finish(&self, x: Tensor<3>, y: Tensor<3>) -> Tensor<3> {
        let dim = self.dim;
        let y = y + x * self.d.tensor::<1>().reshape([1, 1, dim]);
        glu(self.output.forward(gelu(y)))
    }

    /// Rows of one length, `[rows, time, dim]`.
    fn run(&self, x: Tensor<3>, state: Option<Tensor<3>>) -> (Tensor<3>, Tensor<3>) {
        let [rows, time, _] = x.dims();
        let (mut y, state) = self.convolve(&self.c[0], x.clone(), state);
        if let Some(back) = self.c.get(1) {
            // Token t gets what the backward run holds after the token next to it.
            let (from_end, _) = self.convolve(back, x.clone().flip([1]), None);
            let none = Tensor::zeros([rows, 1, self.dim], &x.device());
            let moved = Tensor::cat(vec![none, from_end], 1).narrow(1, 0, time);
            y = y + moved.flip([1]);
        }
        (self.finish(x, y), state)
    }

    fn chunk_flops(&self, chunk: usize) -> u64 {
        2 * (self.dim * chunk * (chunk + 4 * self.modes)) as u64
    }
}

/// `e^(z l)` for each l, `[dim, modes, steps]`, real and imaginary parts.
fn powers([z_real, z_imag]: &[Tensor<2>; 2], steps: impl Iterator<Item = f32>) -> [Tensor<3>; 2] {
    let [dim, modes] = z_real.dims();
    let steps: Vec<f32> = steps.collect();
    let count = steps.len();
    let steps = Tensor::<1>::from_data(steps.as_slice(), &z_real.device());
    let steps = steps.reshape([1, 1, count]);
    let over = |z: &Tensor<2>| z.clone().reshape([dim, modes, 1]) * steps.clone();
    let (size, angle) = (over(z_real).exp(), over(z_imag));
    [size.clone() * angle.clone().cos(), size * angle.sin()]
}

/// `2 C' e^(z l)` from those powers.
fn outputs([p_real, p_imag]: [Tensor<3>; 2], c: [Tensor<2>; 2]) -> [Tensor<3>; 2] {
    let [dim, modes] = c[0].dims();
    let [c_real, c_imag] = c.map(|c| c.reshape([dim, modes, 1]));
    [
        (p_real.clone() * c_real.clone() - p_imag.clone() * c_imag.clone()) * 2.0,
        (p_real * c_imag + p_imag * c_real) * 2.0,
    ]
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
        let [rows, time, _] = x.dims();
        let offsets = context.sequences(rows, time);
        let long = offsets.windows(2).any(|pair| pair[1] - pair[0] > LONG);
        // Chunks give a last state with their outputs; transforms do not.
        let streams = state.is_some() || context.keep_state && causal;
        if long && !streams && device_is_cpu(&x.device()) {
            let y = self.transformed(x.clone(), context);
            return Ok((self.finish(x, y), None));
        }
        let held = state.map(|state| state.get::<3>("h"));
        let times = context.times_after(x.dims()[0], x.dims()[1], state);
        let (y, end) = row_by_row(x, context, held, |x, state| self.run(x, state));
        let next = (context.keep_state && causal).then(|| State::new(times).with("h", end));
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        // A whole sequence whose last state is not asked for.
        let runs = |time: usize| {
            let rest = time % CHUNK;
            (time / CHUNK) as u64 * self.chunk_flops(CHUNK) + self.chunk_flops(rest)
        };
        let conv = |taps: usize, zero: usize| {
            self.taps_flops(taps) + long_conv_flops(time, self.dim, taps + zero)
        };
        let back = || conv(time - 1, 1);
        let transformed = match time > LONG {
            true => conv(time, 0) + self.c.get(1).map_or(0, |_| back()),
            false => 0,
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
                flops: match time > LONG {
                    true => transformed,
                    false => self.c.len() as u64 * runs(time),
                },
                state_bytes: if self.c.len() == 1 {
                    4 * (self.dim * 2 * self.modes) as u64
                } else {
                    0
                },
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyformer_ops::{Device, portable, tensor_values};

    /// Output, gradient of the input and of every parameter.
    fn all(mixer: &S4d, store: &[Param], x: &Tensor<3>, context: &Context) -> Vec<Vec<f32>> {
        let (y, _) = mixer.forward(x.clone(), context, None).expect("runs");
        let wave = y.clone() * y.clone().cos();
        let mut grads = wave.sum().backward();
        let mut found = vec![tensor_values(y)];
        found.push(tensor_values(x.grad(&grads).expect("tracked")));
        let of = |param: &Param| param.gradient(&mut grads).expect("learns");
        found.extend(store.iter().map(of));
        found
    }

    #[test]
    fn the_cost_is_what_runs_on_both_sides_of_the_transforms() {
        let device = Device::flex();
        for causal in [true, false] {
            let config = S4dConfig {
                causal,
                ..S4dConfig::default()
            };
            let mixer = S4d::new(5, config, &Builder::new(&device, 3));
            for time in [40, LONG, LONG + 40] {
                let x = Tensor::zeros([1, time, 5], &device);
                let run = || mixer.forward(x, &Context::default(), None).map(|_| ());
                let (done, flops) = meter::count(run);
                done.expect("runs");
                assert_eq!(flops, mixer.cost(time).flops, "causal {causal}, {time}");
            }
        }
    }

    #[test]
    fn transforms_equal_chunks_with_every_gradient() {
        let device = Device::flex().autodiff();
        for causal in [true, false] {
            let config = S4dConfig {
                causal,
                ..S4dConfig::default()
            };
            let builder = Builder::new(&device, 3);
            let mixer = S4d::new(5, config, &builder);
            let store = builder.store();
            for lengths in [None, Some(vec![0, 40, 41, LONG + 50, LONG + 82])] {
                let time = LONG + 82;
                let values: Vec<f32> = (0..2 * time * 5)
                    .map(|at| (at as f32 * 0.37).sin() + (at as f32 * 0.011).cos())
                    .collect();
                let rows = if lengths.is_some() { 1 } else { 2 };
                let values = &values[..rows * time * 5];
                let x = Tensor::<1>::from_data(values, &device).reshape([rows, time, 5]);
                let x = x.require_grad();
                let context = Context {
                    offsets: lengths.map(Arc::new),
                    ..Context::default()
                };
                let got = all(&mixer, store.params(), &x, &context);
                let want = portable(|| all(&mixer, store.params(), &x, &context));
                for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                    let largest = want.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
                    for (a, b) in got.iter().zip(want) {
                        let error = (a - b).abs() / largest;
                        assert!(error < 1e-4, "causal {causal}, {at}: {a} and {b}");
                    }
                }
            }
        }
    }
}
