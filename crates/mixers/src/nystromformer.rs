//! Nystromformer: softmax attention through a few landmarks.
//!
//! Xiong et al. (2021), arXiv 2102.03902. Landmark queries and keys are means over `m` segments;
//! `F = softmax(Q K'ᵀ) [time, m]`, `A = softmax(Q' K'ᵀ) [m, m]`, `B = softmax(Q' Kᵀ) [m, time]`, with queries and keys scaled by
//! `head_dim^(-1/4)`; `y = F Z (B V) + conv(V)`, where Z is the pseudo-inverse of A after a fixed number of steps of
//! `Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` from `Aᵀ / max column sum`. The means see the whole sequence: not
//! causal, no state.

use std::sync::Arc;

use anyformer_ops::activation::softmax;
use anyformer_ops::attention::{AttentionOptions, attention_flops, flash_attention};
use anyformer_ops::conv::{conv_around, conv_flops};
use anyformer_ops::inverse::{inverse_flops, iterative_inverse};
use anyformer_ops::pool::segment_means;
use anyformer_ops::{Init, Param, Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, each_sequence, join_heads, split_heads};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct NystromformerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Landmarks; a sequence that is no longer gets exact attention.
    pub landmarks: usize,
    /// Steps of the pseudo-inverse.
    pub iterations: usize,
    /// Width in tokens of the convolution over the values; odd, 0 for none.
    pub conv: usize,
    /// Biases on all four projections.
    pub bias: bool,
}

impl Default for NystromformerConfig {
    fn default() -> Self {
        NystromformerConfig {
            heads: 4,
            landmarks: 64,
            iterations: 6,
            conv: 35,
            bias: true,
        }
    }
}

static CARD: Card = Card {
    name: "nystromformer",
    title: "Nystromformer",
    paper: "Xiong et al.: Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention (AAAI 2021), arXiv 2102.03902",
    equation: "F = softmax(Q K'^T), A = softmax(Q' K'^T), B = softmax(Q' K^T), Q' and K' means of segments\ny = F pinv(A) (B V) + conv(V)",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "Linear in time. Six steps do not reach the pseudo-inverse; models trained with six need six. The inverse starts from each matrix's own largest column sum (the released code's default takes one over the whole batch, which ties the rows of a batch together). A length that the landmarks do not divide has segments that differ by one token.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "landmarks",
            doc: "landmarks; a sequence that is no longer gets exact attention",
        },
        Knob {
            name: "iterations",
            doc: "steps of the pseudo-inverse",
        },
        Knob {
            name: "conv",
            doc: "width in tokens of the convolution over the values; odd, 0 for none",
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
    resolve: |options| resolve::<NystromformerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: NystromformerConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        if config.landmarks == 0 || (config.conv > 0 && config.conv.is_multiple_of(2)) {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "expected at least one landmark and an odd conv or 0, got {} and {}",
                    config.landmarks, config.conv
                ),
            });
        }
        let conv = (config.conv > 0).then(|| {
            builder.at("conv").param(
                "weight",
                &[config.heads, config.conv],
                Init::FanIn(config.conv),
            )
        });
        Ok(Box::new(Nystromformer {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            conv,
            dim,
            head_dim,
            config,
        }))
    },
};

struct Nystromformer {
    projections: Projections,
    conv: Option<Param>,
    dim: usize,
    head_dim: usize,
    config: NystromformerConfig,
}

/// Where each of `count` segments of each of `batch` sequences begins; the first `time % count` are one token longer.
fn segments(batch: usize, time: usize, count: usize) -> Vec<usize> {
    let (short, longer) = (time / count, time % count);
    let start = |at: usize| at % count * short + (at % count).min(longer) + at / count * time;
    (0..=batch * count).map(start).collect()
}

impl Nystromformer {
    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, dim] = x.dims();
        let (m, heads) = (self.config.landmarks, self.config.heads);
        let [q, k, values] = self.projections.split(&x);
        let attend = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| {
            flash_attention(q, k, v, &AttentionOptions::default())
        };
        let mut o = match time <= m {
            true => attend(q, k, values.clone()),
            false => {
                let bounds = Arc::new(segments(batch, time, m));
                let few = |x: &Tensor<4>| {
                    let means = segment_means(join_heads(x.clone()), bounds.clone());
                    split_heads(means.reshape([batch, m, dim]), heads)
                };
                let (few_q, few_k) = (few(&q), few(&k));
                let gathered = attend(few_q.clone(), k, values.clone());
                // [batch * heads, m, ..]
                let flat =
                    |x: Tensor<4>| x.swap_dims(1, 2).reshape([batch * heads, m, self.head_dim]);
                meter::add((batch * self.landmark_flops()) as u64);
                let scale = (self.head_dim as f32).powf(-0.5);
                let scores = flat(few_q).matmul(flat(few_k.clone()).swap_dims(1, 2));
                let inverse =
                    iterative_inverse(softmax(scores.mul_scalar(scale)), self.config.iterations);
                let seen = inverse
                    .matmul(flat(gathered))
                    .reshape([batch, heads, m, self.head_dim]);
                attend(q, few_k, seen.swap_dims(1, 2))
            }
        };
        if let Some(conv) = &self.conv {
            let around = conv_around(join_heads(values), conv.tensor::<2>(), None);
            o = o + split_heads(around, heads);
        }
        self.projections.join(o)
    }

    /// Operations of the landmarks' scores and of the product with their inverse.
    fn landmark_flops(&self) -> usize {
        4 * self.config.landmarks * self.config.landmarks * self.dim
    }

    /// Operations beside those of layers and the convolution.
    fn mixing_flops(&self, time: usize) -> u64 {
        let (m, heads) = (self.config.landmarks, self.config.heads);
        let attend = |queries: usize, keys: usize| {
            let (queries, keys) = ([0, queries], [0, keys]);
            attention_flops(&queries, &keys, heads, self.head_dim, false, None)
        };
        if time <= m {
            return attend(time, time);
        }
        let inverse = heads as u64 * inverse_flops(m, self.config.iterations);
        attend(m, time) + attend(time, m) + self.landmark_flops() as u64 + inverse
    }
}

impl TokenMixer for Nystromformer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| Ok(self.dense(x)))
    }

    fn cost(&self, time: usize) -> Cost {
        let conv = Cost {
            params: self.conv.as_ref().map_or(0, Param::count) as u64,
            flops: conv_flops(time, self.dim, self.config.conv),
            state_bytes: 0,
        };
        let mixing = Cost {
            flops: self.mixing_flops(time),
            ..Cost::default()
        };
        self.projections.cost(time) + conv + mixing
    }
}
