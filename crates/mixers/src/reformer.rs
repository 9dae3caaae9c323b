//! Reformer: attention within buckets of a locality-sensitive hash.
//!
//! Kitaev et al. (2020), arXiv 2001.04451. Queries and keys are one projection, keys at unit length. A hash is the largest
//! entry of `[x R, -x R]` for a random R `[head_dim, buckets / 2]`. Tokens are sorted by bucket, cut into chunks, and attend
//! to their chunk and the one before, to themselves only if to nothing else. Several rounds with different R are weighted
//! by their softmax normalisers.

use std::sync::Arc;

use anyformer_ops::activation::softmax;
use anyformer_ops::attention::AttentionOptions;
use anyformer_ops::norm::l2_normalise;
use anyformer_ops::recompute::decided;
use anyformer_ops::{Init, Linear, Param, Tensor, tensor_values};
use serde::{Deserialize, Serialize};

use crate::card::{
    Card, ConfigError, Direction, Knob, Preset, TokenEntry, WEIGHT_DROPOUT, chance, head_dim, read,
    resolve,
};
use crate::groups::{Seen, Whole, WholeMixer, rows, take};
use crate::mixer::{Context, Cost};
use crate::parts::{linear_cost, split_heads};

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
    /// Chance with which a weight of attention is dropped in training.
    pub dropout: f64,
}

impl Default for ReformerConfig {
    fn default() -> Self {
        ReformerConfig {
            heads: 4,
            chunk: 32,
            buckets: 16,
            hashes: 2,
            lra_compat: false,
            dropout: 0.0,
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
    notes: "Time grows as time log time. A sequence of one chunk gets plain attention with shared queries and keys. Places in neighbouring buckets that share a chunk see each other, as in transformers. The bucket of a later token moves earlier ones between chunks, so a causal mask would not make it causal; it has none. The paper's reversible layers and chunked feed-forward are switches of the model: reversible = true, ff_chunks. The code released with Long Range Arena leaves out the unit length and multiplies where it should divide by sqrt(head_dim): lra_compat.",
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
        WEIGHT_DROPOUT,
    ],
    presets: &[Preset {
        name: "reformer-lra",
        model: r#"{"dim":256,"layers":4,"mixers":[{"name":"reformer","heads":4,"chunk":64,"buckets":64,"hashes":2}],"channel":{"name":"mlp","hidden":1024},"positions":"sinusoid","reversible":true,"ff_chunks":8,"reads":{"tokens":{"vocab":257}},"gives":{"class":{"classes":2}}}"#,
    }],
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
            dropout,
        } = config;
        chance(&CARD, dropout)?;
        if chunk == 0 || hashes == 0 || buckets < 2 || !buckets.is_multiple_of(2) {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "chunk and hashes must be at least 1 and buckets even, got {chunk}, {hashes} and {buckets}"
                ),
            });
        }
        let shape = [heads, head_dim, hashes, buckets / 2];
        Ok(Box::new(WholeMixer(Reformer {
            qk_proj: Linear::new(builder, "query_key", dim, dim, false),
            v_proj: Linear::new(builder, "value", dim, dim, false),
            o_proj: (!lra_compat).then(|| Linear::residual(builder, "o_proj", dim, dim, false)),
            rotations: builder.buffer("rotations", &shape, Init::Normal(1.0)),
            head_dim,
            config,
        })))
    },
};

struct Reformer {
    qk_proj: Linear,
    v_proj: Linear,
    o_proj: Option<Linear>,
    /// `[heads, head_dim, hashes, buckets / 2]`, not trained.
    rotations: Param,
    head_dim: usize,
    config: ReformerConfig,
}

/// Chunks of a sequence: tokens of one, and how many.
fn chunks(chunk: usize, time: usize) -> (usize, usize) {
    match time <= chunk {
        true => (time, 1),
        false => (chunk, time.div_ceil(chunk)),
    }
}

impl Reformer {
    /// The bucket of every row `[tokens * heads]` in every round, `[rows, hashes]`: made once, because rounding may turn it.
    fn buckets(&self, q: &Tensor<2>) -> Arc<Vec<u32>> {
        let ReformerConfig {
            heads,
            buckets,
            hashes,
            ..
        } = self.config;
        decided(|| {
            let half = buckets / 2;
            let (width, tokens) = (self.head_dim, q.dims()[0] / heads);
            let rotations = self.rotations.tensor::<4>();
            let rotations = rotations.reshape([heads, width, hashes * half]).detach();
            let q = q.clone().detach().reshape([tokens, heads, width]);
            let turned = tensor_values(q.swap_dims(0, 1).matmul(rotations));
            let row = |row: usize| {
                let at = (row % heads * tokens + row / heads) * hashes * half;
                turned[at..at + hashes * half]
                    .chunks_exact(half)
                    .map(nearest)
            };
            (0..tokens * heads).flat_map(row).collect()
        })
    }

    /// Pairs of a sequence that attention computes in one head, all rounds together.
    fn pairs(&self, time: usize) -> usize {
        match chunks(self.config.chunk, time) {
            (_, 1) => time * time,
            (chunk, count) => {
                let size = |at: usize| chunk.min(time - at * chunk);
                let before = |at: usize| size((at + count - 1) % count);
                let round: usize = (0..count)
                    .map(|at| size(at) * (size(at) + before(at)))
                    .sum();
                self.config.hashes * round
            }
        }
    }
}

/// The place of the largest of `[x, -x]`, the first of equals.
fn nearest(x: &[f32]) -> u32 {
    let both = x.iter().copied().chain(x.iter().map(|x| -x));
    let mut best = (0, f32::NEG_INFINITY);
    for (at, value) in both.enumerate() {
        if value > best.1 {
            best = (at, value);
        }
    }
    best.0 as u32
}

impl Whole for Reformer {
    fn name(&self) -> &'static str {
        CARD.name
    }

    fn all(&self, x: Tensor<3>, offsets: &[usize], context: &Context) -> Tensor<3> {
        let ReformerConfig {
            heads,
            hashes,
            lra_compat: released,
            ..
        } = self.config;
        let tokens = x.dims()[1];
        let width = self.head_dim;
        let split = |linear: &Linear| rows(split_heads(linear.forward(x.clone()), heads));
        let (q, v) = (split(&self.qk_proj), split(&self.v_proj));
        // Unit length; the small number is the reference's, in the same place.
        let k = match released {
            true => q.clone(),
            false => l2_normalise(q.clone(), 1e-6 * width as f32),
        };
        let mut seen = Seen {
            own_last: !released,
            ..Seen::default()
        };
        // Where each row's result of each round stands among the queries.
        let mut places = vec![0u32; tokens * heads * hashes];
        let cut = |time: usize| chunks(self.config.chunk, time);
        let sorts = offsets.windows(2).any(|ends| cut(ends[1] - ends[0]).1 > 1);
        let buckets = sorts.then(|| self.buckets(&q));
        for ends in offsets.windows(2) {
            let time = ends[1] - ends[0];
            let (chunk, count) = cut(time);
            for head in 0..heads {
                let row = |token: usize| (ends[0] + token) * heads + head;
                let rounds = if count == 1 { 1 } else { hashes };
                // All rounds' chunks one after another; the first looks back at the last.
                let mut line: Vec<Vec<usize>> = Vec::with_capacity(rounds * count);
                for round in 0..rounds {
                    let mut order: Vec<usize> = (0..time).map(row).collect();
                    if let (Some(buckets), true) = (&buckets, count > 1) {
                        order.sort_by_key(|row| buckets[row * hashes + round]);
                    }
                    for (place, row) in order.iter().enumerate() {
                        let place = (seen.queries.rows.len() + round * time + place) as u32;
                        // One round stands for all.
                        let to = if count == 1 {
                            0..hashes
                        } else {
                            round..round + 1
                        };
                        places[row * hashes..][to].fill(place);
                    }
                    line.extend(order.chunks(chunk).map(<[usize]>::to_vec));
                }
                for at in 0..line.len() {
                    let before = match count {
                        1 => &[][..],
                        _ => &line[(at + line.len() - 1) % line.len()],
                    };
                    seen.queries.push(line[at].iter().copied());
                    seen.keys.push(before.iter().chain(&line[at]).copied());
                }
            }
        }
        let options = AttentionOptions {
            scale: Some(match released {
                true => (width as f32).sqrt(),
                false => 1.0,
            }),
            ..context.attention(self.config.dropout, 0)
        };
        let (o, sums) = seen.attend_with_sums([&q, &k, &v], options);
        let (rows, places) = (tokens * heads, Arc::new(places));
        let o = take(&o, &places);
        let o = match hashes {
            1 => o,
            _ => {
                let count = sums.dims()[0];
                let sums = take(&sums.reshape([count, 1]), &places).reshape([rows, hashes]);
                let shares = softmax(sums).reshape([rows, hashes, 1]);
                (o.reshape([rows, hashes, width]) * shares)
                    .sum_dim(1)
                    .reshape([rows, width])
            }
        };
        let o = o.reshape([1, tokens, heads * width]);
        match &self.o_proj {
            Some(o_proj) => o_proj.forward(o),
            None => o,
        }
    }

    fn layers(&self, time: usize) -> Cost {
        let mut layers = vec![&self.qk_proj, &self.v_proj];
        layers.extend(&self.o_proj);
        linear_cost(&layers, time)
    }

    fn own_flops(&self, time: usize) -> u64 {
        let ReformerConfig {
            heads,
            buckets,
            hashes,
            ..
        } = self.config;
        let hashing = match chunks(self.config.chunk, time) {
            (_, 1) => 0,
            _ => hashes * time * buckets * self.head_dim * heads,
        };
        hashing as u64
    }

    fn counted_flops(&self, time: usize) -> u64 {
        (4 * self.config.heads * self.pairs(time) * self.head_dim) as u64
    }
}
