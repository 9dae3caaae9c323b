//! Performer: softmax attention estimated by positive random features.
//!
//! Choromanski et al. (2021), arXiv 2009.14794. With `x' = x / head_dim^(1/4)` and W `[features, head_dim]` of orthogonal
//! rows, `phi(x) = features^(-1/2) (exp(W x' - |x'|²/2 - c) + eps)`; then `o = phi(q) (sum phi(k)ᵀ v) / (phi(q) . sum phi(k))`.
//!
//! The stabiliser `c` of a query is its own largest `W q'`. That of the keys is the largest over the sequence in the
//! bidirectional form; in the causal form it is zero, since a maximum over positions would look ahead. It cancels in the
//! quotient except through eps. State: `kv [sequences, heads, features, head_dim]` and `z [sequences, heads, features]`.

use anyformer_ops::feature_attention::FeatureMap;
use anyformer_ops::param::normal;
use anyformer_ops::{Init, Linear, Param, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::additive::{self, Additive};
use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer, Training};
use crate::parts::{join_heads, split_heads};

/// Added to each feature of the ReLU kernels.
const RELU_EPS: f32 = 1e-3;

/// The kernel that the features estimate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// `exp(q . k / sqrt(head_dim))`.
    #[default]
    Softmax,
    /// `phi(x) = max(W x, 0) + 0.001`: the generalised kernel of the paper.
    Relu,
    /// `phi(x) = max(x, 0) + 0.001` without a random matrix: what the code released with Long Range Arena runs by default.
    LraCompat,
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PerformerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Random features; 0 takes `head_dim ln(head_dim)`.
    pub nb_features: usize,
    /// The kernel that the features estimate.
    pub kernel: Kernel,
    /// Look back only.
    pub causal: bool,
    /// Added to each feature of the softmax kernel.
    pub eps: f64,
    /// Passes of training after which the random matrix is drawn anew; 0: never.
    pub redraw: u64,
}

impl Default for PerformerConfig {
    fn default() -> Self {
        PerformerConfig {
            heads: 4,
            nb_features: 0,
            kernel: Kernel::Softmax,
            causal: true,
            eps: 1e-4,
            redraw: 0,
        }
    }
}

static CARD: Card = Card {
    name: "performer",
    title: "Performer (FAVOR+)",
    paper: "Choromanski et al.: Rethinking Attention with Performers (ICLR 2021), arXiv 2009.14794",
    equation: "phi(x) = m^(-1/2) (exp(W x' - |x'|^2 / 2 - c) + eps), x' = x / head_dim^(1/4)\no_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j))",
    direction: Direction::Either,
    streams: true,
    state: "constant",
    notes: "The random matrix is saved with the model; redraw draws it anew in training. The causal form has no stabiliser on the keys, because a maximum over positions looks ahead; released implementations have one and so peek at the future through eps.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "nb_features",
            doc: "random features; 0 takes head_dim ln(head_dim)",
        },
        Knob {
            name: "kernel",
            doc: "softmax, relu (the generalised kernel), or lra_compat (relu without a random matrix, the default of the code released with Long Range Arena)",
        },
        Knob {
            name: "causal",
            doc: "look back only",
        },
        Knob {
            name: "eps",
            doc: "added to each feature of the softmax kernel",
        },
        Knob {
            name: "redraw",
            doc: "passes of training after which the random matrix is drawn anew, as 1000; 0: never",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<PerformerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: PerformerConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        if !(config.eps >= 0.0 && config.eps.is_finite()) {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!("eps must be at least 0, got {}", config.eps),
            });
        }
        let plain = config.kernel == Kernel::LraCompat;
        if plain && config.redraw > 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "lra_compat has no random matrix to redraw; set redraw = 0".into(),
            });
        }
        let features = match config.nb_features {
            _ if plain => head_dim,
            0 => ((head_dim as f64 * (head_dim as f64).ln()) as usize).max(1),
            given => given,
        };
        let linear = |name: &str| Linear::new(builder, name, dim, dim, false);
        Ok(Box::new(Performer {
            q_proj: linear("q_proj"),
            k_proj: linear("k_proj"),
            v_proj: linear("v_proj"),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, false),
            projection: (!plain).then(|| {
                let rows = move |rng: &mut ChaCha8Rng, _| orthogonal_rows(rng, features, head_dim);
                let shape = [features, head_dim];
                builder.buffer("projection_matrix", &shape, Init::With(Box::new(rows)))
            }),
            dim,
            head_dim,
            features,
            config,
        }))
    },
};

/// Rows in blocks of `dim` orthogonal directions, each as long as a fresh normal vector.
fn orthogonal_rows(rng: &mut ChaCha8Rng, rows: usize, dim: usize) -> Vec<f32> {
    let mut all: Vec<f32> = Vec::with_capacity(rows * dim);
    let mut block: Vec<Vec<f64>> = Vec::new();
    while all.len() < rows * dim {
        if block.len() == dim {
            block.clear();
        }
        let mut row: Vec<f64> = (0..dim).map(|_| f64::from(normal(rng))).collect();
        // Gram and Schmidt, twice for accuracy.
        for _ in 0..2 {
            for held in &block {
                let dot: f64 = row.iter().zip(held).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(held).for_each(|(a, b)| *a -= dot * b);
            }
        }
        let length = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        row.iter_mut().for_each(|v| *v /= length);
        let fresh = (0..dim)
            .map(|_| f64::from(normal(rng)).powi(2))
            .sum::<f64>()
            .sqrt();
        all.extend(row.iter().map(|v| (v * fresh) as f32));
        block.push(row);
    }
    all
}

struct Performer {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    /// Absent where features need none.
    projection: Option<Param>,
    dim: usize,
    head_dim: usize,
    features: usize,
    config: PerformerConfig,
}

impl Performer {
    /// Draws the random matrix anew in the passes of training that begin with it. Another run of the block in the same pass draws
    /// the same.
    fn redraw(&self, context: &Context) {
        let (Some(training), Some(projection)) = (context.training, &self.projection) else {
            return;
        };
        let Training { seed, nth } = training;
        if self.config.redraw == 0 || nth == 0 || !nth.is_multiple_of(self.config.redraw) {
            return;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ nth.rotate_left(32));
        rng.set_stream(context.layer as u64 + 1);
        let rows = orthogonal_rows(&mut rng, self.features, self.head_dim);
        projection.update(|held| *held = rows);
    }

    fn map(&self) -> FeatureMap {
        let Some(projection) = &self.projection else {
            return FeatureMap::Relu { add: RELU_EPS };
        };
        let rows = projection.tensor::<2>();
        match self.config.kernel {
            Kernel::Relu | Kernel::LraCompat => FeatureMap::RandomRelu {
                rows,
                add: RELU_EPS,
            },
            Kernel::Softmax => FeatureMap::RandomExp {
                rows,
                eps: self.config.eps as f32,
            },
        }
    }
}

impl TokenMixer for Performer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        self.redraw(context);
        let parts = [&self.q_proj, &self.k_proj, &self.v_proj];
        let parts = parts.map(|linear| split_heads(linear.forward(x.clone()), self.config.heads));
        let additive = Additive {
            map: self.map(),
            scale: 1.0,
            normalise: true,
            causal: self.config.causal,
        };
        let refusal = "bidirectional performer";
        let (o, next) = additive.attend(parts, context, state, refusal)?;
        Ok((self.o_proj.forward(join_heads(o)), next))
    }

    fn cost(&self, time: usize) -> Cost {
        let (heads, width) = (self.config.heads, self.head_dim + 1);
        let weights = 4 * self.dim * self.dim;
        let features = match &self.projection {
            Some(matrix) => 4 * (time * heads * matrix.count()) as u64,
            None => 0,
        };
        let layers = Cost {
            params: weights as u64,
            flops: 2 * (weights * time) as u64 + features,
            state_bytes: 0,
        };
        layers + additive::cost(self.config.causal, time, heads, self.features, width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_block_are_orthogonal() {
        let rows = orthogonal_rows(&mut ChaCha8Rng::seed_from_u64(1), 8, 5);
        let dot =
            |a: usize, b: usize| -> f32 { (0..5).map(|i| rows[a * 5 + i] * rows[b * 5 + i]).sum() };
        assert!(dot(0, 4).abs() < 1e-5 && dot(5, 7).abs() < 1e-5);
        assert!(dot(0, 0) > 0.0);
    }

    /// The mean over many draws of `phi(q) . phi(k)` is `exp(q . k / sqrt(d))`, and more features come closer.
    #[test]
    fn features_estimate_the_softmax_kernel() {
        let (q, k) = ([0.3f64, -0.5, 0.8, 0.1], [0.2f64, 0.4, 0.5, -0.7]);
        let scale = 4f64.powf(-0.25);
        let exact = q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / 2.0;
        let estimate = |features: usize, seed: u64| {
            let rows = orthogonal_rows(&mut ChaCha8Rng::seed_from_u64(seed), features, 4);
            let phi = |x: &[f64; 4], row: &[f32]| {
                let dot: f64 = x
                    .iter()
                    .zip(row)
                    .map(|(a, b)| a * scale * f64::from(*b))
                    .sum();
                let half = x.iter().map(|a| (a * scale).powi(2)).sum::<f64>() / 2.0;
                (dot - half).exp()
            };
            let sum: f64 = rows.chunks(4).map(|row| phi(&q, row) * phi(&k, row)).sum();
            sum / features as f64
        };
        let spread = |features| {
            let errors = (0..200).map(|seed| (estimate(features, seed) - exact.exp()).powi(2));
            (errors.sum::<f64>() / 200.0).sqrt()
        };
        assert!(spread(64) < 0.6 * spread(8), "{} {}", spread(64), spread(8));
        let mean = (0..400).map(|seed| estimate(16, seed)).sum::<f64>() / 400.0;
        assert!((mean - exact.exp()).abs() < 0.05);
    }
}
