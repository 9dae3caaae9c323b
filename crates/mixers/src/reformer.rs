//! Reformer: attention within buckets of a locality-sensitive hash.
//!
//! Kitaev et al. (2020), arXiv 2001.04451. Queries and keys are one projection, keys at unit length. A hash is the largest
//! entry of `[x R, -x R]` for a random R `[head_dim, buckets / 2]`. Tokens are sorted by bucket, cut into chunks, and attend
//! to their chunk and the one before, to themselves only if to nothing else. Several rounds with different R are weighted
//! by their softmax normalisers.

use anyformer_ops::activation::softmax;
use anyformer_ops::norm::l2_normalise;
use anyformer_ops::{Init, Linear, Param, Tensor, meter, tensor_values};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{each_sequence, indices, join_heads, linear_cost, split_heads};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ReformerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Buckets of a hash; even.
    pub buckets: usize,
    /// Rounds of hashing.
    pub hashes: usize,
    /// What the code released with Long Range Arena computes: keys as long as queries, scores times `sqrt(head_dim)`, tokens
    /// see themselves, no output layer. Its settings: hashes 1, buckets 10, chunk a tenth of the length.
    pub lra_compat: bool,
}

impl Default for ReformerConfig {
    fn default() -> Self {
        ReformerConfig {
            heads: 4,
            chunk: 32,
            buckets: 16,
            hashes: 2,
            lra_compat: false,
        }
    }
}

static CARD: Card = Card {
    name: "reformer",
    title: "Reformer (LSH attention)",
    paper: "Kitaev, Kaiser, Levskaya: Reformer: The Efficient Transformer (ICLR 2020), arXiv 2001.04451",
    equation: "bucket(x) = argmax [x R, -x R]; sort by bucket, then time; chunks see themselves and the one before\no_i = sum_r softmax_r(z_i^r) softmax_j(q_i . q_j / |q_j|) v_j, j in the two chunks of round r",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "Time grows as time log time. A sequence of one chunk gets plain attention with shared queries and keys. Places in neighbouring buckets that share a chunk see each other, as in transformers. The bucket of a later token moves earlier ones between chunks, so a causal mask would not make it causal; it has none. The paper's reversible layers and chunked feed-forward save memory, not results, and are not here. The code released with Long Range Arena leaves out the unit length and multiplies where it should divide by sqrt(head_dim): lra_compat.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "chunk",
            doc: "tokens of a chunk",
        },
        Knob {
            name: "buckets",
            doc: "buckets of a hash; even, near twice the number of chunks",
        },
        Knob {
            name: "hashes",
            doc: "rounds of hashing",
        },
        Knob {
            name: "lra_compat",
            doc: "what the code released with Long Range Arena computes: keys as long as queries, scores times sqrt(head_dim), tokens see themselves, no output layer",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<ReformerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: ReformerConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        let ReformerConfig {
            heads,
            chunk,
            buckets,
            hashes,
            lra_compat,
        } = config;
        if chunk == 0 || hashes == 0 || buckets < 2 || !buckets.is_multiple_of(2) {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "chunk and hashes must be at least 1 and buckets even, got {chunk}, {hashes} and {buckets}"
                ),
            });
        }
        let shape = [heads, head_dim, hashes, buckets / 2];
        Ok(Box::new(Reformer {
            qk_proj: Linear::new(builder, "query_key", dim, dim, false),
            v_proj: Linear::new(builder, "value", dim, dim, false),
            o_proj: (!lra_compat).then(|| Linear::residual(builder, "o_proj", dim, dim, false)),
            rotations: builder.buffer("rotations", &shape, Init::Normal(1.0)),
            head_dim,
            config,
        }))
    },
};

/// The logit of a token with itself, and of a place past the end.
const SELF: f32 = -1e5;
const NOBODY: f32 = -1e9;

struct Reformer {
    qk_proj: Linear,
    v_proj: Linear,
    o_proj: Option<Linear>,
    /// `[heads, head_dim, hashes, buckets / 2]`, not trained.
    rotations: Param,
    head_dim: usize,
    config: ReformerConfig,
}

impl Reformer {
    /// Places of `[padded]` tokens sorted by bucket, then time, for each row and round; places past `time` come last.
    fn sorted(&self, q: &Tensor<3>, time: usize, padded: usize) -> Vec<Vec<usize>> {
        let ReformerConfig {
            heads,
            buckets,
            hashes,
            ..
        } = self.config;
        let half = buckets / 2;
        let rows = q.dims()[0];
        let rotations = self.rotations.tensor::<4>();
        let rotations = rotations.reshape([1, heads, self.head_dim, hashes * half]);
        let q = q.clone().detach();
        let q = q.reshape([rows / heads, heads, time, self.head_dim]);
        let shape = [rows / heads, heads, self.head_dim, hashes * half];
        let turned = tensor_values(q.matmul(rotations.expand(shape)));
        let mut all = Vec::with_capacity(rows * hashes);
        for row in 0..rows {
            for hash in 0..hashes {
                let bucket = |token: usize| {
                    let at = (row * time + token) * hashes * half + hash * half;
                    let values = &turned[at..at + half];
                    let mut best = (0, f32::NEG_INFINITY);
                    for (index, value) in values
                        .iter()
                        .copied()
                        .chain(values.iter().map(|v| -v))
                        .enumerate()
                    {
                        if value > best.1 {
                            best = (index, value);
                        }
                    }
                    best.0
                };
                let keys: Vec<usize> = (0..padded)
                    .map(|token| if token < time { bucket(token) } else { buckets })
                    .collect();
                let mut order: Vec<usize> = (0..padded).collect();
                order.sort_by_key(|token| keys[*token]);
                all.push(order);
            }
        }
        all
    }

    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let (heads, width, hashes) = (self.config.heads, self.head_dim, self.config.hashes);
        let device = x.device();
        let rows = batch * heads;
        meter::add(batch as u64 * self.mixing_flops(time));
        let split = |linear: &Linear| {
            split_heads(linear.forward(x.clone()), heads)
                .swap_dims(1, 2)
                .reshape([rows, time, width])
        };
        let (q, v) = (split(&self.qk_proj), split(&self.v_proj));
        // Unit length; the small number is the reference's, in the same place.
        let released = self.config.lra_compat;
        let k = match released {
            true => q.clone().mul_scalar((width as f32).sqrt()),
            false => l2_normalise(q.clone(), 1e-6 * width as f32),
        };
        let (chunk, count, padded) = self.chunks(time);
        let rounds = if count == 1 { 1 } else { hashes };
        let orders = match count {
            1 => vec![(0..time).collect(); rows],
            _ => self.sorted(&q, time, padded),
        };
        let pad = |x: Tensor<3>| {
            match padded > time {
                true => Tensor::cat(
                    vec![x, Tensor::zeros([rows, padded - time, width], &device)],
                    1,
                ),
                false => x,
            }
            .reshape([rows * padded, width])
        };
        let (q, k, v) = (pad(q), pad(k), pad(v));
        // All rounds' chunks of a row one after another; the first looks back at the last.
        let chunks = rounds * count;
        let span = if count == 1 { chunk } else { 2 * chunk };
        let (mut own, mut seen, mut add, mut keep) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in 0..rows {
            let line: Vec<usize> = orders[row * rounds..(row + 1) * rounds].concat();
            for index in 0..chunks {
                let mine = &line[index * chunk..(index + 1) * chunk];
                let before = (index + chunks - 1) % chunks;
                let before = match count {
                    1 => &[][..],
                    _ => &line[before * chunk..(before + 1) * chunk],
                };
                let theirs: Vec<usize> = before.iter().chain(mine).copied().collect();
                for query in mine {
                    for key in &theirs {
                        let value = match (*key >= time, key == query) {
                            (true, _) => NOBODY,
                            (_, true) if !released => SELF,
                            _ => 0.0,
                        };
                        add.push(value);
                        keep.push(if value == 0.0 { 1.0f32 } else { 0.0 });
                    }
                }
                own.extend(mine.iter().map(|token| row * padded + token));
                seen.extend(theirs.iter().map(|token| row * padded + token));
            }
        }
        let gather = |x: Tensor<2>, places: &[usize], length: usize| {
            x.select(0, indices(places.iter().copied(), &device))
                .reshape([rows * chunks, length, width])
        };
        let shaped = |values: &[f32]| {
            Tensor::<1>::from_data(values, &device).reshape([rows * chunks, chunk, span])
        };
        let dots = gather(q, &own, chunk).matmul(gather(k, &seen, span).swap_dims(1, 2));
        let dots = dots * shaped(&keep) + shaped(&add);
        let top = dots.clone().detach().max_dim(2);
        let sum = (dots.clone() - top.clone()).exp().sum_dim(2);
        let normaliser = top + sum.log();
        let o = softmax(dots).matmul(gather(v, &seen, span));
        // Back to the order of time, a round after the other.
        let mut back = vec![0; rows * rounds * padded];
        for (round, order) in orders.iter().enumerate() {
            for (place, token) in order.iter().enumerate() {
                back[round * padded + token] = round * padded + place;
            }
        }
        let back = indices(back.into_iter(), &device);
        let total = rows * rounds * padded;
        let o = o.reshape([total, width]).select(0, back.clone());
        let o = o.reshape([rows, rounds, padded, width]);
        let z = normaliser.reshape([total]).select(0, back);
        let z = z.reshape([rows, rounds, padded]).swap_dims(1, 2);
        let shares = softmax(z)
            .swap_dims(1, 2)
            .reshape([rows, rounds, padded, 1]);
        let o = (o * shares)
            .sum_dim(1)
            .reshape([batch, heads, padded, width]);
        let o = o.narrow(2, 0, time).swap_dims(1, 2);
        let o = join_heads(o);
        match &self.o_proj {
            Some(o_proj) => o_proj.forward(o),
            None => o,
        }
    }

    /// Tokens of a chunk, chunks, and tokens with padding.
    fn chunks(&self, time: usize) -> (usize, usize, usize) {
        let chunk = self.config.chunk;
        match time <= chunk {
            true => (time, 1, time),
            false => {
                let count = time.div_ceil(chunk);
                (chunk, count, count * chunk)
            }
        }
    }

    /// Operations beside those of linear layers.
    fn mixing_flops(&self, time: usize) -> u64 {
        let ReformerConfig {
            heads,
            buckets,
            hashes,
            ..
        } = self.config;
        let (chunk, count, padded) = self.chunks(time);
        let per_head = match count {
            1 => 4 * time * time,
            _ => hashes * (time * buckets + 8 * padded * chunk),
        };
        (heads * per_head * self.head_dim) as u64
    }
}

impl TokenMixer for Reformer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| Ok(self.dense(x)))
    }

    fn cost(&self, time: usize) -> Cost {
        let mut layers = vec![&self.qk_proj, &self.v_proj];
        layers.extend(&self.o_proj);
        let mut cost = linear_cost(&layers, time);
        cost.flops += self.mixing_flops(time);
        cost
    }
}
