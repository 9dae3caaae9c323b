//! Nystromformer: softmax attention through a few landmarks.
//!
//! Xiong et al. (2021), arXiv 2102.03902. Landmark queries and keys are means over `m` segments;
//! `F = softmax(Q K'ᵀ) [time, m]`, `A = softmax(Q' K'ᵀ) [m, m]`, `B = softmax(Q' Kᵀ) [m, time]`, with queries and keys scaled by
//! `head_dim^(-1/4)`; `y = F Z (B V) + conv(V)`, where Z is the pseudo-inverse of A after a fixed number of steps of
//! `Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` from `Aᵀ / max column sum`. The means see the whole sequence: not
//! causal, no state.

use anyformer_ops::activation::softmax;
use anyformer_ops::conv::{MAX_WIDTH, causal_conv1d, conv_flops};
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

/// Means over `count` segments of `[batch, heads, time, width]`; the first `time % count` are one token longer.
fn segment_means(x: Tensor<4>, count: usize) -> Tensor<4> {
    let [batch, heads, time, width] = x.dims();
    let (short, longer) = (time / count, time % count);
    let means = |x: Tensor<4>, count: usize, length: usize| {
        let x: Tensor<5> = x.reshape([batch, heads, count, length, width]);
        x.mean_dim(3).reshape([batch, heads, count, width])
    };
    let split = longer * (short + 1);
    let mut parts = Vec::new();
    if longer > 0 {
        parts.push(means(x.clone().narrow(2, 0, split), longer, short + 1));
    }
    parts.push(means(
        x.narrow(2, split, time - split),
        count - longer,
        short,
    ));
    Tensor::cat(parts, 2)
}

/// The pseudo-inverse of row-stochastic matrices `[batch, heads, m, m]` after `steps` steps.
fn pseudo_inverse(a: Tensor<4>, steps: usize) -> Tensor<4> {
    let m = a.dims()[2];
    let identity = |factor: f32| {
        Tensor::<2>::eye(m, &a.device())
            .mul_scalar(factor)
            .unsqueeze()
    };
    let largest = a.clone().sum_dim(2).max_dim(3);
    let mut z = a.clone().swap_dims(2, 3) / largest;
    for _ in 0..steps {
        let az = a.clone().matmul(z.clone());
        let inner = identity(7.0) - az.clone();
        let inner = identity(15.0) - az.clone().matmul(inner);
        let inner = identity(13.0) - az.matmul(inner);
        z = z.matmul(inner).mul_scalar(0.25);
    }
    z
}

impl Nystromformer {
    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let m = self.config.landmarks;
        meter::add(self.mixing_flops(time) * batch as u64);
        let [q, k, values] = self.projections.split(&x);
        let scale = (self.head_dim as f32).powf(-0.25);
        let q = q.swap_dims(1, 2).mul_scalar(scale);
        let k = k.swap_dims(1, 2).mul_scalar(scale);
        let v = values.clone().swap_dims(1, 2);
        let weights = |q: Tensor<4>, k: Tensor<4>| softmax(q.matmul(k.swap_dims(2, 3)));
        let o = match time <= m {
            true => weights(q, k).matmul(v),
            false => {
                let (few_q, few_k) = (segment_means(q.clone(), m), segment_means(k.clone(), m));
                let inverse = pseudo_inverse(
                    weights(few_q.clone(), few_k.clone()),
                    self.config.iterations,
                );
                let gathered = weights(few_q, k).matmul(v);
                weights(q, few_k).matmul(inverse.matmul(gathered))
            }
        };
        let mut o = o.swap_dims(1, 2);
        if let Some(conv) = &self.conv {
            o = o + self.convolve(values, conv);
        }
        self.projections.join(o)
    }

    /// Taps of the convolution in runs that the kernel takes: where each starts and how many it has.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let taps = self.config.conv;
        let starts = (0..taps).step_by(MAX_WIDTH);
        starts.map(move |start| (start, MAX_WIDTH.min(taps - start)))
    }

    /// The convolution around each token: causal convolutions of the padded values, a run of taps each.
    fn convolve(&self, values: Tensor<4>, weight: &Param) -> Tensor<4> {
        let [batch, time, heads, head_dim] = values.dims();
        let taps = self.config.conv;
        let weight: Tensor<3> = weight.tensor::<2>().unsqueeze_dim(1);
        let weight = weight
            .expand([heads, head_dim, taps])
            .reshape([self.dim, taps]);
        let border = Tensor::zeros([batch, taps / 2, self.dim], &values.device());
        let padded = Tensor::cat(vec![border.clone(), join_heads(values), border], 1);
        let parts = self.runs().map(|(start, width)| {
            let piece = padded.clone().narrow(1, start, time + width - 1);
            let weight = weight.clone().narrow(1, start, width);
            let (y, _) = causal_conv1d(piece, weight, None, false, None, None);
            y.narrow(1, width - 1, time)
        });
        let none = Tensor::zeros([batch, time, self.dim], &padded.device());
        split_heads(parts.fold(none, |sum, part| sum + part), heads)
    }

    /// Operations beside those of layers and the convolution.
    fn mixing_flops(&self, time: usize) -> u64 {
        let m = self.config.landmarks;
        if time <= m {
            return 4 * (time * time * self.dim) as u64;
        }
        let inverse = 8 * self.config.iterations * self.config.heads * m * m * m;
        ((8 * time * m + 4 * m * m) * self.dim + inverse) as u64
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
            flops: self
                .runs()
                .map(|(_, width)| conv_flops(time + width - 1, self.dim, width))
                .sum(),
            state_bytes: 0,
        };
        let mixing = Cost {
            flops: self.mixing_flops(time),
            ..Cost::default()
        };
        self.projections.cost(time) + conv + mixing
    }
}
