//! Transformer-XL: attention over the current segment and a memory of the inputs before it, with relative positions.
//!
//! Dai et al. (2019), arXiv 1901.02860: `A_ij = (q_i + u) . k_j + (q_i + v) . (W_R r_(i-j))`, scaled by `1 / sqrt(head_dim)`, with
//! learned u and v per head and r the sinusoids of the distance, sines first. A token sees its segment up to itself and the
//! `memory` tokens before the segment. The engine serves [`crate::compressive`] as well, which keeps a coarser memory of
//! what came before that; its places count as one step of distance each.
//!
//! The state is what the next token needs: the inputs from `memory` tokens before the segment on, `[tokens, dim]`, sequences
//! end to end, and the coarse memory `[slots, dim]`.

use anyformer_ops::activation::softmax;
use anyformer_ops::{Builder, Device, Init, Linear, Param, Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, linear_cost};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct TransformerXlConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Tokens of a segment.
    pub segment: usize,
    /// Tokens before the segment that are seen.
    pub memory: usize,
}

impl Default for TransformerXlConfig {
    fn default() -> Self {
        TransformerXlConfig {
            heads: 4,
            segment: 64,
            memory: 64,
        }
    }
}

static CARD: Card = Card {
    name: "transformer_xl",
    title: "Transformer-XL",
    paper: "Dai et al.: Transformer-XL: Attentive Language Models beyond a Fixed-Length Context (ACL 2019), arXiv 1901.02860",
    equation: "A_ij = ((q_i + u) . k_j + (q_i + v) . W_R r_(i-j)) / sqrt(head_dim)\no_i = softmax_j(A_ij) v_j, j from memory tokens before the segment of i up to i",
    direction: Direction::Causal,
    streams: true,
    state: "constant: the inputs of at most memory + segment tokens",
    notes: "Linear in time for a fixed segment and memory. The memory holds the layer's inputs and is projected again in each segment. Inside one call gradients flow into the memory, where the paper stops them; between calls a detached state stops them.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "segment",
            doc: "tokens of a segment",
        },
        Knob {
            name: "memory",
            doc: "tokens before the segment that are seen",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<TransformerXlConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: TransformerXlConfig = read(&CARD, options)?;
        let engine = Segments::new(&CARD, dim, &config, None, builder)?;
        Ok(Box::new(engine))
    },
};

/// The coarse memory of [`crate::compressive`].
pub(crate) struct Coarse {
    /// Tokens of one place; divides segment and memory.
    pub(crate) rate: usize,
    /// Places kept.
    pub(crate) slots: usize,
    /// `[rate * dim, dim]` in, `dim` out: a convolution with the stride of its width; absent: the mean.
    pub(crate) compress: Option<Linear>,
}

impl Coarse {
    /// `[rows, tokens, dim]` to `[rows, tokens / rate, dim]`.
    fn squeeze(&self, x: Tensor<3>) -> Tensor<3> {
        let [rows, tokens, dim] = x.dims();
        let count = tokens / self.rate;
        match &self.compress {
            Some(linear) => linear.forward(x.reshape([rows, count, self.rate * dim])),
            None => x
                .reshape([rows, count, self.rate, dim])
                .mean_dim(2)
                .reshape([rows, count, dim]),
        }
    }
}

/// The built mixer of both.
pub(crate) struct Segments {
    projections: Projections,
    r_proj: Linear,
    /// `[heads, head_dim]`: added to queries for contents and for distances.
    u: Param,
    v: Param,
    coarse: Option<Coarse>,
    heads: usize,
    head_dim: usize,
    segment: usize,
    memory: usize,
}

/// What a row of sequences holds between segments.
struct Held {
    /// Position of the next token.
    at: usize,
    /// `[rows, tokens, dim]`.
    inputs: Tensor<3>,
    /// `[rows, slots, dim]`.
    slots: Tensor<3>,
}

/// Sinusoids of the distances `count - 1` down to 0, sines then cosines, `[count, dim]`.
fn distances(count: usize, dim: usize, device: &Device) -> Tensor<2> {
    let half = dim.div_ceil(2);
    let value = |row: usize, feature: usize| {
        let pair = feature % half;
        let angle = (count - 1 - row) as f64 * (10_000f64).powf(-2.0 * pair as f64 / dim as f64);
        let value = if feature < half {
            angle.sin()
        } else {
            angle.cos()
        };
        value as f32
    };
    let values: Vec<f32> = (0..count * dim)
        .map(|at| value(at / dim, at % dim))
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape([count, dim])
}

impl Segments {
    pub(crate) fn new(
        card: &'static Card,
        dim: usize,
        config: &TransformerXlConfig,
        coarse: Option<Coarse>,
        builder: &Builder,
    ) -> Result<Self, ConfigError> {
        let head_dim = head_dim(card, dim, config.heads)?;
        if config.segment == 0 {
            return Err(ConfigError::Impossible {
                mixer: card.name,
                message: "segment must be at least 1".into(),
            });
        }
        let shape = [config.heads, head_dim];
        let bias = |name: &str| builder.param_no_decay(name, &shape, Init::Normal(0.02));
        Ok(Segments {
            projections: Projections::new(builder, dim, config.heads, false),
            r_proj: Linear::new(builder, "r_proj", dim, dim, false),
            u: bias("u"),
            v: bias("v"),
            coarse,
            heads: config.heads,
            head_dim,
            segment: config.segment,
            memory: config.memory,
        })
    }

    /// Position of the first input that is held when the next token is at `at`.
    fn low(&self, at: usize) -> usize {
        (at / self.segment * self.segment).saturating_sub(self.memory)
    }

    /// Places of the coarse memory when the next token is at `at`.
    fn slots(&self, at: usize) -> usize {
        let coarse = self.coarse.as_ref();
        coarse.map_or(0, |coarse| (self.low(at) / coarse.rate).min(coarse.slots))
    }

    /// Attention of the last `count` rows of `seen` `[rows, places, dim]` to all places up to themselves.
    fn attend(&self, seen: Tensor<3>, count: usize) -> Tensor<3> {
        let [rows, places, dim] = seen.dims();
        let device = seen.device();
        let (heads, width) = (self.heads, self.head_dim);
        meter::add(rows as u64 * self.pair_flops(count, places));
        let own = seen.clone().narrow(1, places - count, count);
        let q = self.projections.query(&own);
        let [k, values] = self.projections.key_value(&seen);
        let r = self.r_proj.forward(distances(places, dim, &device));
        let r = r
            .reshape([places, heads, width])
            .swap_dims(0, 1)
            .unsqueeze::<4>();
        let bias = |param: &Param| param.tensor::<2>().reshape([1, 1, heads, width]);
        let scale = (width as f32).powf(-0.5);
        let towards = |bias: Tensor<4>| (q.clone() + bias).mul_scalar(scale).swap_dims(1, 2);
        let by_content = towards(bias(&self.u)).matmul(k.swap_dims(1, 2).swap_dims(2, 3));
        let r = r.swap_dims(2, 3).expand([rows, heads, width, places]);
        let by_distance = towards(bias(&self.v)).matmul(r);
        // Row i is moved count - 1 - i places to the left: the distance of each key instead of the key.
        let edge = Tensor::zeros([rows, heads, count, 1], &device);
        let moved = Tensor::cat(vec![edge, by_distance], 3)
            .reshape([rows, heads, places + 1, count])
            .narrow(2, 1, places)
            .reshape([rows, heads, count, places]);
        let later: Vec<f32> = (0..count * places)
            .map(|at| {
                let (query, key) = (at / places, at % places);
                if key > places - count + query {
                    -1e30
                } else {
                    0.0
                }
            })
            .collect();
        let later = Tensor::<1>::from_data(later.as_slice(), &device);
        let logits = by_content + moved + later.reshape([1, 1, count, places]);
        let o = softmax(logits)
            .matmul(values.swap_dims(1, 2))
            .swap_dims(1, 2);
        self.projections.join(o)
    }

    /// Rows of one length and one position, `[rows, time, dim]`.
    fn run(&self, x: Tensor<3>, mut held: Held) -> (Tensor<3>, Held) {
        let [rows, time, dim] = x.dims();
        let mut outputs = Vec::new();
        let mut done = 0;
        while done < time {
            let end = held.at / self.segment * self.segment + self.segment;
            let count = (end - held.at).min(time - done);
            let inputs = Tensor::cat(vec![held.inputs, x.clone().narrow(1, done, count)], 1);
            let seen = Tensor::cat(vec![held.slots.clone(), inputs.clone()], 1);
            outputs.push(self.attend(seen, count));
            let low = self.low(held.at);
            held.at += count;
            done += count;
            held.inputs = inputs;
            let leaving = self.low(held.at) - low;
            if leaving > 0 {
                let [_, tokens, _] = held.inputs.dims();
                let old = held.inputs.clone().narrow(1, 0, leaving);
                held.inputs = match tokens > leaving {
                    true => held.inputs.narrow(1, leaving, tokens - leaving),
                    false => Tensor::zeros([rows, 0, dim], &x.device()),
                };
                if let Some(coarse) = &self.coarse {
                    let all = Tensor::cat(vec![held.slots.clone(), coarse.squeeze(old)], 1);
                    let [_, places, _] = all.dims();
                    let kept = self.slots(held.at);
                    if kept > 0 {
                        held.slots = all.narrow(1, places - kept, kept);
                    }
                }
            }
        }
        let mut y = Tensor::cat(outputs, 1);
        if let Some(linear) = self
            .coarse
            .as_ref()
            .and_then(|coarse| coarse.compress.as_ref())
        {
            // Nothing may have been compressed yet: every parameter keeps a gradient.
            let nothing = linear.weight.tensor::<2>().sum().mul_scalar(0.0);
            y = y + nothing.reshape([1, 1, 1]);
        }
        (y, held)
    }

    /// What sequence `row` of a state holds, or nothing.
    fn held(&self, state: Option<&State>, row: usize, dim: usize, device: &Device) -> Held {
        let Some(state) = state else {
            return Held {
                at: 0,
                inputs: Tensor::zeros([1, 0, dim], device),
                slots: Tensor::zeros([1, 0, dim], device),
            };
        };
        let part = |name: &str, count: &dyn Fn(usize) -> usize| {
            let start: usize = state.times[..row].iter().map(|time| count(*time)).sum();
            let length = count(state.times[row]);
            match state.find::<2>(name) {
                Some(all) if length > 0 => all.narrow(0, start, length).unsqueeze::<3>(),
                _ => Tensor::zeros([1, 0, dim], device),
            }
        };
        Held {
            at: state.times[row],
            inputs: part("x", &|time| time - self.low(time)),
            slots: part("slots", &|time| self.slots(time)),
        }
    }

    /// Operations of the pairs and of the output-side products of one attention, beside the layers.
    fn pair_flops(&self, count: usize, places: usize) -> u64 {
        6 * (count * places * self.heads * self.head_dim) as u64
    }
}

impl TokenMixer for Segments {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let [batch, time, dim] = x.dims();
        let device = x.device();
        let times = context.times_after(batch, time, state);
        let same = state.is_none_or(|state| state.times.iter().all(|time| *time == state.times[0]));
        // Rows that run together, and their inputs.
        let (y, ends) = if context.packed().is_none() && same {
            let rows = (0..batch).map(|row| self.held(state, row, dim, &device));
            let rows: Vec<Held> = rows.collect();
            let at = rows[0].at;
            let join = |of: fn(&Held) -> Tensor<3>| Tensor::cat(rows.iter().map(of).collect(), 0);
            let held = Held {
                at,
                inputs: join(|held| held.inputs.clone()),
                slots: join(|held| held.slots.clone()),
            };
            let (y, end) = self.run(x, held);
            (y, vec![end])
        } else {
            let offsets = context.sequences(batch, time);
            let flat = x.reshape([1, batch * time, dim]);
            let (mut outputs, mut ends) = (Vec::new(), Vec::new());
            for (row, pair) in offsets.windows(2).enumerate() {
                let piece = flat.clone().narrow(1, pair[0], pair[1] - pair[0]);
                let (y, end) = self.run(piece, self.held(state, row, dim, &device));
                outputs.push(y);
                ends.push(end);
            }
            (Tensor::cat(outputs, 1).reshape([batch, time, dim]), ends)
        };
        let next = context.keep_state.then(|| {
            let flat = |of: fn(&Held) -> Tensor<3>| {
                let rows = ends.iter().map(of).map(|held| {
                    let [rows, places, dim] = held.dims();
                    // A reshape to no rows would be read as one that keeps the first extent.
                    match rows * places {
                        0 => Tensor::zeros([0, dim], &held.device()),
                        count => held.reshape([count, dim]),
                    }
                });
                Tensor::cat(rows.collect(), 0)
            };
            let held = times.iter().map(|time| time - self.low(*time)).collect();
            let slots = times.iter().map(|time| self.slots(*time)).collect();
            State::new(times)
                .with_rows("x", flat(|held| held.inputs.clone()), held)
                .with_rows("slots", flat(|held| held.slots.clone()), slots)
        });
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        let dim = self.heads * self.head_dim;
        let mut cost = self.projections.cost(0) + linear_cost(&[&self.r_proj], 0);
        cost.params += (self.u.count() + self.v.count()) as u64;
        let layer = |rows: usize| 2 * (rows * dim * dim) as u64;
        let mut at = 0;
        while at < time {
            let count = (self.segment - at % self.segment).min(time - at);
            let places = self.slots(at) + at - self.low(at) + count;
            // Queries and outputs of the new tokens; keys, values and distances of all places.
            cost.flops += 2 * layer(count) + 3 * layer(places) + self.pair_flops(count, places);
            at += count;
        }
        let held = time - self.low(time) + self.slots(time);
        cost.state_bytes = 4 * (held * dim) as u64;
        if let Some(coarse) = &self.coarse
            && let Some(linear) = &coarse.compress
        {
            let squeezed = linear_cost(&[linear], self.low(time) / coarse.rate);
            cost.params += squeezed.params;
            cost.flops += squeezed.flops;
        }
        cost
    }
}
