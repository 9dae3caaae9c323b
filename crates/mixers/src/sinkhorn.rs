//! Sinkhorn attention: every block of tokens looks at itself and at a soft sorting of all blocks.
//!
//! Tay et al. (2020), arXiv 2002.11296. With block means `q_i`, `k_j` of queries and keys, `R_ij = q_i . k_j / sqrt(head_dim)`
//! becomes a doubly stochastic S by steps that take the log-sum-exp of each row, then of each column, off `R / temperature`.
//! Block i attends in one softmax to its own tokens and to the sorted ones `sum_j S_ij block_j`.

use anyformer_ops::activation::softmax;
use anyformer_ops::{Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, each_sequence};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct SinkhornConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Tokens of a block.
    pub block: usize,
    /// Steps of the normalisation.
    pub iterations: usize,
    /// Divides the scores of blocks.
    pub temperature: f64,
    /// Biases on all four projections.
    pub bias: bool,
    /// SortCut: every token attends to the first so many sorted blocks only; 0: to its own block and its sorted one.
    pub cut: usize,
    /// What the code released with Long Range Arena computes; see [`Sinkhorn::released`].
    pub lra_compat: bool,
}

impl Default for SinkhornConfig {
    fn default() -> Self {
        SinkhornConfig {
            heads: 4,
            block: 32,
            iterations: 7,
            temperature: 0.75,
            bias: false,
            cut: 0,
            lra_compat: false,
        }
    }
}

static CARD: Card = Card {
    name: "sinkhorn",
    title: "Sinkhorn Transformer",
    paper: "Tay, Bahri, Yang, Metzler, Juan: Sparse Sinkhorn Attention (ICML 2020), arXiv 2002.11296",
    equation: "S = sinkhorn(mean(Q_i) . mean(K_j) / (sqrt(head_dim) temperature))\no = softmax(Q_i [K_i, sum_j S_ij K_j]^T / sqrt(head_dim)) [V_i, sum_j S_ij V_j]",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "Linear in time for a fixed block, plus the square of the number of blocks. Blocks are scored by the product of their mean queries and keys, which needs no table of the length; the paper maps sums of inputs by a learned layer. No Gumbel noise: the same input gives the same output. The causal form is not here. The code released with Long Range Arena cuts strided blocks and sorts nothing (the sorted keys of all blocks are their sum): lra_compat.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "block",
            doc: "tokens of a block",
        },
        Knob {
            name: "iterations",
            doc: "steps of the normalisation",
        },
        Knob {
            name: "temperature",
            doc: "divides the scores of blocks",
        },
        Knob {
            name: "bias",
            doc: "biases on all four projections",
        },
        Knob {
            name: "cut",
            doc: "SortCut: attend to the first so many sorted blocks only; 0: to one's own block and its sorted one",
        },
        Knob {
            name: "lra_compat",
            doc: "what the code released with Long Range Arena computes: strided blocks, no sorting, two attentions added",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<SinkhornConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: SinkhornConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        if config.block == 0 || config.temperature <= 0.0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "block must be at least 1 and temperature above 0".into(),
            });
        }
        Ok(Box::new(Sinkhorn {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            head_dim,
            config,
        }))
    },
};

struct Sinkhorn {
    projections: Projections,
    head_dim: usize,
    config: SinkhornConfig,
}

/// Takes the log-sum-exp along `axis` off.
fn normalise(x: Tensor<3>, axis: usize) -> Tensor<3> {
    let top = x.clone().detach().max_dim(axis);
    let sum = (x.clone() - top.clone()).exp().sum_dim(axis);
    x - top - sum.log()
}

impl Sinkhorn {
    /// Tokens of a block, and blocks.
    fn blocks(&self, time: usize) -> (usize, usize) {
        let block = self.config.block.min(time.max(1));
        (block, time.div_ceil(block))
    }

    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let (heads, width) = (self.config.heads, self.head_dim);
        let (block, count) = self.blocks(time);
        meter::add(batch as u64 * self.mixing_flops(time));
        let device = x.device();
        let rows = batch * heads;
        let strided = self.config.lra_compat;
        // [rows, blocks, block, head_dim]
        let cut = |x: Tensor<4>| {
            let mut x = x.swap_dims(1, 2);
            if count * block > time {
                let rest = Tensor::zeros([batch, heads, count * block - time, width], &device);
                x = Tensor::cat(vec![x, rest], 2);
            }
            match strided {
                true => x.reshape([rows, block, count, width]).swap_dims(1, 2),
                false => x.reshape([rows, count, block, width]),
            }
        };
        let [q, k, v] = self.projections.split(&x).map(cut);
        let scale = (width as f32).powf(-0.5);
        if strided {
            let o = self.released(q.mul_scalar(scale), k, v, time);
            let o = o
                .swap_dims(1, 2)
                .reshape([batch, heads, count * block, width]);
            return self.projections.join(o.narrow(2, 0, time).swap_dims(1, 2));
        }
        let mean = |x: &Tensor<4>| x.clone().mean_dim(2).reshape([rows, count, width]);
        let scores = mean(&q).matmul(mean(&k).swap_dims(1, 2));
        let mut sorting = scores.mul_scalar(scale / self.config.temperature as f32);
        for _ in 0..self.config.iterations {
            sorting = normalise(normalise(sorting, 2), 1);
        }
        let sorting = sorting.exp();
        let sorted = |x: &Tensor<4>| {
            let flat = x.clone().reshape([rows, count, block * width]);
            sorting
                .clone()
                .matmul(flat)
                .reshape([rows, count, block, width])
        };
        if self.config.cut > 0 {
            let kept = self.config.cut.min(count);
            let first = |x: &Tensor<4>| {
                sorted(x)
                    .narrow(1, 0, kept)
                    .reshape([rows, kept * block, width])
            };
            let q = q.mul_scalar(scale).reshape([rows, count * block, width]);
            let o = softmax(q.matmul(first(&k).swap_dims(1, 2))).matmul(first(&v));
            let o = o.reshape([batch, heads, count * block, width]);
            return self.projections.join(o.narrow(2, 0, time).swap_dims(1, 2));
        }
        let keys = Tensor::cat(vec![k.clone(), sorted(&k)], 2);
        let values = Tensor::cat(vec![v.clone(), sorted(&v)], 2);
        let mut logits = q.mul_scalar(scale).matmul(keys.swap_dims(2, 3));
        if count * block > time {
            // Places past the end of the last block; the sorted ones are mixed from full blocks.
            let masked = (0..count * 2 * block).map(|at| {
                let (row, place) = (at / (2 * block), at % (2 * block));
                if place < block && row * block + place >= time {
                    -1e30
                } else {
                    0.0
                }
            });
            let masked: Vec<f32> = masked.collect();
            let masked = Tensor::<1>::from_data(masked.as_slice(), &device);
            logits = logits + masked.reshape([1, count, 1, 2 * block]);
        }
        let o = softmax(logits).matmul(values);
        let o = o
            .reshape([batch, heads, count * block, width])
            .narrow(2, 0, time);
        self.projections.join(o.swap_dims(1, 2))
    }

    /// The released form over `[rows, blocks, block, head_dim]`, queries scaled. Block i holds the tokens t with t mod blocks = i;
    /// what is called sorted is, by the released contraction, the sum of all blocks whatever the sorting: its weights add
    /// up to one. The attention to the block and that to the sum are added.
    fn released(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, time: usize) -> Tensor<4> {
        let [rows, count, block, width] = q.dims();
        let attend = |k: Tensor<4>, v: Tensor<4>, past: Option<Tensor<4>>| {
            let logits = q.clone().matmul(k.swap_dims(2, 3));
            let logits = match past {
                Some(past) => logits + past,
                None => logits,
            };
            softmax(logits).matmul(v)
        };
        let past = (count * block > time).then(|| {
            let value = |at: usize| match at % block * count + at / block >= time {
                true => -1e30,
                false => 0.0,
            };
            let values: Vec<f32> = (0..count * block).map(value).collect();
            Tensor::<1>::from_data(values.as_slice(), &q.device()).reshape([1, count, 1, block])
        });
        let all = |x: &Tensor<4>| x.clone().sum_dim(1).expand([rows, count, block, width]);
        attend(k.clone(), v.clone(), past) + attend(all(&k), all(&v), None)
    }

    /// Operations beside those of the projections.
    fn mixing_flops(&self, time: usize) -> u64 {
        let (block, count) = self.blocks(time);
        let heads = self.config.heads;
        if self.config.lra_compat {
            return (8 * heads * count * block * block * self.head_dim) as u64;
        }
        if self.config.cut > 0 {
            let kept = self.config.cut.min(count);
            let sorting = count * count * self.head_dim * (1 + 2 * block);
            let mixing = 2 * count * block * kept * block * self.head_dim;
            return 2 * (heads * (sorting + mixing)) as u64;
        }
        let per_head = count * count * self.head_dim * (1 + 2 * block)
            + 4 * count * block * block * self.head_dim;
        2 * (self.config.heads * per_head) as u64
    }
}

impl TokenMixer for Sinkhorn {
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
