//! Routing attention: tokens attend within clusters of like content.
//!
//! Roy et al. (2020), arXiv 2003.05997. Each head has `clusters` directions. A direction takes the `time / clusters` queries
//! and as many keys that point most along it (a token may be in several clusters or in none); softmax attention runs inside
//! each cluster, and a token's output is the mean over its clusters.

use anyformer_ops::activation::softmax;
use anyformer_ops::{Builder, Init, Param, Tensor, meter, tensor_values};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, each_sequence, indices};

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
    /// Biases on all four projections.
    pub bias: bool,
}

impl Default for RoutingConfig {
    fn default() -> Self {
        RoutingConfig {
            heads: 4,
            clusters: 4,
            iterations: 1,
            bias: false,
        }
    }
}

static CARD: Card = Card {
    name: "routing",
    title: "Routing Transformer",
    paper: "Roy, Saffar, Vaswani, Grangier: Efficient Content-Based Sparse Attention with Routing Transformers (TACL 2021), arXiv 2003.05997",
    equation: "cluster c = the time / clusters queries, and keys, with the largest q . mu_c / |q|\no_i = mean over the clusters of i of softmax_j(q_i . k_j / sqrt(head_dim)) v_j, j in the cluster",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "About time^1.5 with clusters near the root of the length. A token in no cluster gets nothing. The directions are random unit vectors, moved by k-means steps over the sequence at hand; the paper moves them by a running mean over training, and adds a loss that pulls tokens to them, which are not here. Choosing the largest sees the whole sequence, so there is no honest causal form. The paper's heads of local attention are the mixer `local` in other layers.",
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
            doc: "biases on all four projections",
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
        if config.clusters == 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "clusters must be at least 1".into(),
            });
        }
        Ok(Box::new(Routing::new(dim, head_dim, config, builder)))
    },
};

struct Routing {
    projections: Projections,
    /// `[heads, clusters, head_dim]`, not trained.
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
        Routing {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            means: builder.buffer("means", &shape, directions),
            head_dim,
            config,
        }
    }

    /// Tokens of a cluster.
    fn window(&self, time: usize) -> usize {
        time.div_ceil(self.config.clusters)
    }

    /// The tokens of every cluster of one head, `[clusters * window]`, from queries and keys `[time, head_dim]` of unit
    /// length.
    fn members(&self, parts: [&[f32]; 2], means: &[f32]) -> [Vec<usize>; 2] {
        let (width, clusters) = (self.head_dim, self.config.clusters);
        let mut means = means.to_vec();
        for _ in 0..self.config.iterations {
            let mut sums = vec![0.0; means.len()];
            for token in parts.iter().flat_map(|part| part.chunks(width)) {
                let along = |cluster: usize| dot(token, &means[cluster * width..][..width]);
                let nearest = (0..clusters).max_by(|a, b| along(*a).total_cmp(&along(*b)));
                let at = nearest.unwrap_or(0) * width;
                let sum = &mut sums[at..at + width];
                sum.iter_mut()
                    .zip(token)
                    .for_each(|(sum, value)| *sum += value);
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
            let window = self.window(part.len() / width);
            let mut all = Vec::with_capacity(clusters * window);
            for mean in means.chunks(width) {
                let along: Vec<f32> = part.chunks(width).map(|token| dot(token, mean)).collect();
                let mut order: Vec<usize> = (0..along.len()).collect();
                order.sort_by(|a, b| along[*b].total_cmp(&along[*a]));
                all.extend(&order[..window]);
            }
            all
        })
    }

    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let (heads, width) = (self.config.heads, self.head_dim);
        let (clusters, window) = (self.config.clusters, self.window(time));
        meter::add(batch as u64 * self.mixing_flops(time));
        let device = x.device();
        let rows = batch * heads;
        let [q, k, v] = self
            .projections
            .split(&x)
            .map(|part| part.swap_dims(1, 2).reshape([rows * time, width]));
        let values = |x: &Tensor<2>| {
            let mut values = tensor_values(x.clone());
            unit(&mut values, width);
            values
        };
        let (hosts_q, hosts_k) = (values(&q), values(&k));
        let means = self.means.values();
        let (mut queries, mut keys) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let own = row * time * width..(row + 1) * time * width;
            let head = row % heads;
            let means = &means[head * clusters * width..][..clusters * width];
            let [mine, theirs] = self.members([&hosts_q[own.clone()], &hosts_k[own]], means);
            queries.extend(mine.into_iter().map(|token| row * time + token));
            keys.extend(theirs.into_iter().map(|token| row * time + token));
        }
        let gather = |x: Tensor<2>, places: &[usize]| {
            x.select(0, indices(places.iter().copied(), &device))
                .reshape([rows * clusters, window, width])
        };
        let scale = (width as f32).powf(-0.5);
        let logits = gather(q.mul_scalar(scale), &queries).matmul(gather(k, &keys).swap_dims(1, 2));
        let o = softmax(logits).matmul(gather(v, &keys));
        // The mean over a token's clusters: its places are gathered one rank at a time, a row of zeros where it has fewer.
        let mut places: Vec<Vec<usize>> = vec![Vec::new(); rows * time];
        for (place, token) in queries.iter().enumerate() {
            places[*token].push(place);
        }
        let most = places.iter().map(Vec::len).max().unwrap_or(0);
        let count = queries.len();
        let flat = o.reshape([count, width]);
        let flat = Tensor::cat(vec![flat, Tensor::zeros([1, width], &device)], 0);
        let mut sum = Tensor::zeros([rows * time, width], &device);
        for rank in 0..most {
            let at = places
                .iter()
                .map(|places| places.get(rank).copied().unwrap_or(count));
            sum = sum + flat.clone().select(0, indices(at, &device));
        }
        let shares: Vec<f32> = places
            .iter()
            .map(|places| 1.0 / (places.len() as f32 + 1e-5))
            .collect();
        let shares = Tensor::<1>::from_data(shares.as_slice(), &device).reshape([rows * time, 1]);
        let o = (sum * shares).reshape([batch, heads, time, width]);
        self.projections.join(o.swap_dims(1, 2))
    }

    /// Operations beside those of the projections: k-means, choosing, attention.
    fn mixing_flops(&self, time: usize) -> u64 {
        let RoutingConfig {
            heads,
            clusters,
            iterations,
            ..
        } = self.config;
        let choosing = 2 * 2 * time * clusters * self.head_dim * (iterations + 1);
        let attention = 4 * clusters * self.window(time).pow(2) * self.head_dim;
        (heads * (choosing + attention)) as u64
    }
}

impl TokenMixer for Routing {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| Ok(self.dense(x)))
    }

    fn cost(&self, time: usize) -> Cost {
        let mut cost = self.projections.cost(time);
        cost.flops += self.mixing_flops(time);
        cost
    }
}
