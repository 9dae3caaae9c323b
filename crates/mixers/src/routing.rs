//! Routing attention: tokens attend within clusters of like content.
//!
//! Roy et al. (2020), arXiv 2003.05997. Each head has `clusters` directions. A direction takes the `time / clusters` queries
//! and as many keys that point most along it (a token may be in several clusters or in none); softmax attention runs inside
//! each cluster, and a token's output is the mean over its clusters.
//!
//! The causal form: each token takes the direction along which its query points most, and attends to the tokens of the same
//! direction before it (the paper's section 4.1); no later token changes that.

mod follow;

use std::sync::Arc;

use anyformer_ops::attention::AttentionOptions;
use anyformer_ops::nearest::{dot_products, largest};
use anyformer_ops::norm::l2_normalise;
use anyformer_ops::recompute::decided;
use anyformer_ops::{Builder, Init, Linear, Param, Tensor, meter, tensor_values};
use serde::{Deserialize, Serialize};

use crate::card::{
    Card, ConfigError, Direction, Knob, TokenEntry, WEIGHT_DROPOUT, chance, head_dim, read, resolve,
};
use crate::groups::{Lines, Seen, Whole, WholeMixer, mean_by, rows};
use crate::mixer::{Context, Cost};
use crate::parts::{linear_cost, split_heads};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct RoutingConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Clusters of a head; near the root of the length.
    pub clusters: usize,
    /// Steps of k-means over the sequence's own queries and keys, from the seeded directions.
    pub iterations: usize,
    /// Biases on all projections.
    pub bias: bool,
    /// Look back only.
    pub causal: bool,
    /// In the causal form, tokens of its cluster that a token looks back at, itself counted; 0: all of them.
    pub window: usize,
    /// Chance with which a weight of attention is dropped in training.
    pub dropout: f64,
    /// How much of a direction stays in each pass of training, the rest following the tokens nearest to it; 0: all of it.
    pub decay: f64,
    /// Factor of the loss that pulls tokens to the direction nearest to them.
    pub commitment: f64,
}

impl Default for RoutingConfig {
    fn default() -> Self {
        RoutingConfig {
            heads: 4,
            clusters: 4,
            iterations: 1,
            bias: false,
            causal: false,
            window: 0,
            dropout: 0.0,
            decay: 0.0,
            commitment: 0.0,
        }
    }
}

static CARD: Card = Card {
    name: "routing",
    title: "Routing Transformer",
    paper: "Roy, Saffar, Vaswani, Grangier: Efficient Content-Based Sparse Attention with Routing Transformers (TACL 2021), arXiv 2003.05997",
    equation: "cluster c = the time / clusters queries, and keys, with the largest q . mu_c / |q|\no_i = mean over the clusters of i of softmax_j(q_i . k_j / sqrt(head_dim)) v_j, j in the cluster",
    direction: Direction::Either,
    streams: false,
    state: "none",
    notes: "About time^1.5 with clusters near the root of the length. A token in no cluster gets nothing. The directions are random unit vectors, moved by k-means steps over the sequence at hand (iterations); by decay they follow the tokens through training as in the paper, whose loss that pulls tokens to them is commitment. Clusters that choose their tokens see the whole sequence. The causal form follows the paper's definition instead of its released choice: a token belongs to the cluster that it points along most, keys are the queries at unit length, a token sees itself only where it has no other, and k-means over the sequence is not run. Its cost is that of clusters of one size. The paper's heads of local attention are the mixer `local` in other layers.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "clusters",
            doc: "clusters of a head; near the root of the length",
        },
        Knob {
            name: "iterations",
            doc: "steps of k-means over the sequence, from the seeded directions",
        },
        Knob {
            name: "bias",
            doc: "biases on all projections",
        },
        Knob {
            name: "causal",
            doc: "look back only: each token takes its nearest cluster and sees those there before it; keys are queries of unit length, and no k-means is run",
        },
        Knob {
            name: "window",
            doc: "with causal, tokens of its cluster that a token looks back at, itself counted; 0: all",
        },
        WEIGHT_DROPOUT,
        Knob {
            name: "decay",
            doc: "how much of a direction stays in each pass of training, the rest following the tokens nearest to it, as 0.999; 0: directions stay",
        },
        Knob {
            name: "commitment",
            doc: "factor of the loss that pulls tokens to the direction nearest to them, as 1e-4",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<RoutingConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: RoutingConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        let impossible = |message: &str| {
            Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: message.into(),
            })
        };
        chance(&CARD, config.dropout)?;
        if !(0.0..1.0).contains(&(config.decay as f32)) {
            return impossible("decay must be at least 0 and below 1");
        }
        if !(config.commitment >= 0.0 && config.commitment.is_finite()) {
            return impossible("commitment must be at least 0");
        }
        if config.clusters == 0 {
            return impossible("clusters must be at least 1");
        }
        if !config.causal && config.window > 0 {
            return impossible("window is of the causal form; set causal = true or window = 0");
        }
        let mixer = Routing::new(dim, head_dim, config, builder);
        Ok(Box::new(WholeMixer(mixer)))
    },
};

struct Routing {
    q_proj: Linear,
    /// Of queries that are not keys too.
    k_proj: Option<Linear>,
    v_proj: Linear,
    o_proj: Linear,
    /// `[heads, clusters, head_dim]`.
    means: Param,
    head_dim: usize,
    config: RoutingConfig,
}

/// Rows of unit length.
fn unit(values: &mut [f32], width: usize) {
    for row in values.chunks_mut(width) {
        let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        row.iter_mut().for_each(|value| *value /= length.max(1e-12));
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The direction along which each of the rows points most.
fn nearest(rows: &[f32], means: &[f32], width: usize) -> Vec<u32> {
    let along = dot_products(rows, means, width);
    let best = |along: &[f32]| {
        let best = along.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(cluster, _)| cluster as u32)
    };
    along.chunks_exact(means.len() / width).map(best).collect()
}

impl Routing {
    fn new(dim: usize, head_dim: usize, config: RoutingConfig, builder: &Builder) -> Self {
        let directions = Init::With(Box::new(move |rng, count| {
            let mut values: Vec<f32> = (0..count)
                .map(|_| anyformer_ops::param::normal(rng))
                .collect();
            unit(&mut values, head_dim);
            values
        }));
        let shape = [config.heads, config.clusters, head_dim];
        let linear = |name: &str| Linear::new(builder, name, dim, dim, config.bias);
        Routing {
            q_proj: linear("q_proj"),
            k_proj: (!config.causal).then(|| linear("k_proj")),
            v_proj: linear("v_proj"),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, config.bias),
            means: builder.buffer("means", &shape, directions),
            head_dim,
            config,
        }
    }

    /// Tokens of a cluster, where it takes as many as any other.
    fn window(&self, time: usize) -> usize {
        time.div_ceil(self.config.clusters)
    }

    /// The tokens of every cluster of one head, `[clusters * window]`, from queries and keys `[time, head_dim]` of unit
    /// length.
    fn members(&self, parts: [&[f32]; 2], means: &[f32]) -> [Vec<u32>; 2] {
        let width = self.head_dim;
        let mut means = means.to_vec();
        for _ in 0..self.config.iterations {
            let mut sums = vec![0.0; means.len()];
            for part in parts {
                let nearest = nearest(part, &means, width);
                for (token, cluster) in part.chunks(width).zip(nearest) {
                    let sum = &mut sums[cluster as usize * width..][..width];
                    sum.iter_mut()
                        .zip(token)
                        .for_each(|(sum, value)| *sum += value);
                }
            }
            unit(&mut sums, width);
            for (mean, sum) in means.chunks_mut(width).zip(sums.chunks(width)) {
                // A cluster without a token stays where it is.
                if dot(sum, sum) > 0.5 {
                    mean.copy_from_slice(sum);
                }
            }
        }
        parts.map(|part| {
            let time = part.len() / width;
            largest(&dot_products(&means, part, width), time, self.window(time))
        })
    }

    /// The cluster whose direction of its head each row `[tokens * heads, head_dim]` points along most.
    fn nearest_of_all(&self, values: &[f32], means: &[f32]) -> Vec<u32> {
        let (heads, width) = (self.config.heads, self.head_dim);
        let (size, tokens) = (self.config.clusters * width, values.len() / (heads * width));
        let mut chosen = vec![0; heads * tokens];
        for head in 0..heads {
            let rows = self.head(values, &[0, tokens], head);
            let nearest = nearest(&rows, &means[head * size..][..size], width);
            for (token, cluster) in nearest.into_iter().enumerate() {
                chosen[token * heads + head] = cluster;
            }
        }
        chosen
    }

    /// Rows of one head of one sequence, `[time, head_dim]`, out of `[tokens * heads, head_dim]`.
    fn head(&self, values: &[f32], ends: &[usize], head: usize) -> Vec<f32> {
        let (heads, width) = (self.config.heads, self.head_dim);
        let row = |token: usize| &values[(token * heads + head) * width..][..width];
        (ends[0]..ends[1]).flat_map(row).copied().collect()
    }

    /// The clusters that take their tokens: in every head of every sequence the members of its queries, then of its keys.
    fn choose(&self, q: &Tensor<2>, k: &Tensor<2>, offsets: &[usize]) -> Arc<Vec<u32>> {
        decided(|| {
            let width = self.head_dim;
            let values = [q, k].map(|x| {
                let mut values = tensor_values(x.clone());
                unit(&mut values, width);
                values
            });
            let means = self.means.values();
            let lines = offsets.len() * self.config.heads - self.config.heads;
            let line = |line: usize| {
                let (sequence, head) = (line / self.config.heads, line % self.config.heads);
                let ends = &offsets[sequence..sequence + 2];
                let [q, k] = [0, 1].map(|part| self.head(&values[part], ends, head));
                let size = self.config.clusters * width;
                let [mut mine, theirs] = self.members([&q, &k], &means[head * size..][..size]);
                mine.extend(theirs);
                mine
            };
            let lines: Vec<Vec<u32>> = (0..lines).map(line).collect();
            lines.concat()
        })
    }

    /// Clusters take the tokens nearest to them; a token's result is the mean over its clusters.
    fn taken(
        &self,
        [q, k, v]: [&Tensor<2>; 3],
        offsets: &[usize],
        options: AttentionOptions,
    ) -> Tensor<2> {
        let (heads, clusters) = (self.config.heads, self.config.clusters);
        let chosen = self.choose(q, k, offsets);
        let mut seen = Seen::default();
        let mut rest = &chosen[..];
        for ends in offsets.windows(2) {
            let window = self.window(ends[1] - ends[0]);
            for head in 0..heads {
                let row = |token: &u32| (ends[0] + *token as usize) * heads + head;
                let (now, later) = rest.split_at(2 * clusters * window);
                let (queries, keys) = now.split_at(clusters * window);
                rest = later;
                for (queries, keys) in queries.chunks(window).zip(keys.chunks(window)) {
                    seen.queries.push(queries.iter().map(row));
                    seen.keys.push(keys.iter().map(row));
                }
            }
        }
        let to = seen.queries.rows.clone();
        let o = seen.attend([q, k, v], options);
        mean_by(o, to, q.dims()[0])
    }

    /// Every token takes the cluster nearest to it and looks back at the tokens there.
    fn joined(
        &self,
        [q, k, v]: [&Tensor<2>; 3],
        offsets: &[usize],
        options: AttentionOptions,
    ) -> Tensor<2> {
        let (heads, clusters) = (self.config.heads, self.config.clusters);
        let chosen =
            decided(|| self.nearest_of_all(&tensor_values(q.clone()), &self.means.values()));
        let mut seen = Seen {
            own_last: true,
            ..Seen::default()
        };
        let lines = Lines { offsets, heads };
        for line in 0..lines.count() {
            let mut members = vec![Vec::new(); clusters];
            for row in (0..lines.time(line)).map(|token| lines.row(line, token)) {
                members[chosen[row] as usize].push(row);
            }
            for members in members.into_iter().filter(|members| !members.is_empty()) {
                seen.queries.push(members.iter().copied());
                seen.keys.push(members);
            }
        }
        let options = AttentionOptions {
            causal: true,
            window: (self.config.window > 0).then_some(self.config.window),
            ..options
        };
        // What a cluster holds is not known before: the mixer says what it costs on average.
        meter::apart(|| seen.attend_rows([q, k, v], options))
    }
}

impl Whole for Routing {
    fn name(&self) -> &'static str {
        CARD.name
    }

    fn all(&self, x: Tensor<3>, offsets: &[usize], context: &Context) -> Tensor<3> {
        let (heads, tokens) = (self.config.heads, x.dims()[1]);
        let split = |linear: &Linear| rows(split_heads(linear.forward(x.clone()), heads));
        let (q, v) = (split(&self.q_proj), split(&self.v_proj));
        let options = context.attention(self.config.dropout, 0);
        let o = match &self.k_proj {
            Some(k_proj) => {
                let k = split(k_proj);
                let o = self.taken([&q, &k, &v], offsets, options);
                self.follow(&[&q, &k], context);
                o
            }
            None => {
                let k = l2_normalise(q.clone(), 1e-12);
                let o = self.joined([&q, &k, &v], offsets, options);
                self.follow(&[&q], context);
                o
            }
        };
        self.o_proj
            .forward(o.reshape([1, tokens, heads * self.head_dim]))
    }

    fn layers(&self, time: usize) -> Cost {
        let mut layers = vec![&self.q_proj, &self.v_proj, &self.o_proj];
        layers.extend(&self.k_proj);
        linear_cost(&layers, time)
    }

    /// Choosing and attention; where tokens choose, as if clusters were of one size.
    fn own_flops(&self, time: usize) -> u64 {
        let RoutingConfig {
            heads,
            clusters,
            iterations,
            causal,
            ..
        } = self.config;
        if causal {
            let size = self.window(time);
            let back = match self.config.window {
                0 => size,
                window => window.min(size),
            };
            let choosing = 2 * time * clusters * self.head_dim;
            return (heads * (choosing + 4 * time * back * self.head_dim)) as u64;
        }
        let choosing = 2 * 2 * time * clusters * self.head_dim * (iterations + 1);
        (heads * choosing) as u64
    }

    fn counted_flops(&self, time: usize) -> u64 {
        let RoutingConfig {
            heads,
            clusters,
            causal,
            ..
        } = self.config;
        match causal {
            true => 0,
            false => (4 * heads * clusters * self.window(time).pow(2) * self.head_dim) as u64,
        }
    }
}
