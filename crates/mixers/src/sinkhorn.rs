//! Sinkhorn attention: every block of tokens looks at itself and at a soft sorting of all blocks.
//!
//! Tay et al. (2020), arXiv 2002.11296. With block means `q_i`, `k_j` of queries and keys, `R_ij = q_i . k_j / sqrt(head_dim)`
//! becomes a doubly stochastic S by steps that take the log-sum-exp of each row, then of each column, off `R / temperature`.
//! Block i attends in one softmax to its own tokens and to the sorted ones `sum_j S_ij block_j`.
//!
//! The causal form: `q_i` is the mean of the queries up to the first of block i, only blocks `j < i` are sorted, a column's sum runs down to
//! row i only, rows are balanced last, and within its block a token looks back.

use std::sync::Arc;

use anyformer_ops::attention::AttentionOptions;
use anyformer_ops::embedding::summed;
use anyformer_ops::sinkhorn::balance;
use anyformer_ops::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{
    Card, ConfigError, Direction, Knob, TokenEntry, WEIGHT_DROPOUT, chance, head_dim, read, resolve,
};
use crate::groups::{Lines, Seen, Whole, WholeMixer, rows};
use crate::mixer::{Context, Cost};
use crate::parts::Projections;

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
    /// Look back only.
    pub causal: bool,
    /// What the code released with Long Range Arena computes; see [`Sinkhorn::released`].
    pub lra_compat: bool,
    /// Chance with which a weight of attention is dropped in training.
    pub dropout: f64,
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
            causal: false,
            lra_compat: false,
            dropout: 0.0,
        }
    }
}

static CARD: Card = Card {
    name: "sinkhorn",
    title: "Sinkhorn Transformer",
    paper: "Tay, Bahri, Yang, Metzler, Juan: Sparse Sinkhorn Attention (ICML 2020), arXiv 2002.11296",
    equation: "S = sinkhorn(mean(Q_i) . mean(K_j) / (sqrt(head_dim) temperature))\no = softmax(Q_i [K_i, sum_j S_ij K_j]^T / sqrt(head_dim)) [V_i, sum_j S_ij V_j]",
    direction: Direction::Either,
    streams: false,
    state: "none",
    notes: "Linear in time for a fixed block, plus the square of the number of blocks. Blocks are scored by the product of their mean queries and keys, which needs no table of the length; the paper maps sums of inputs by a learned layer. No Gumbel noise: the same input gives the same output. The causal form keeps the paper's masks and sums columns only as far as the row at hand, because a column's whole sum would look ahead. The code released with Long Range Arena cuts strided blocks and sorts nothing (the sorted keys of all blocks are their sum): lra_compat.",
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
            name: "causal",
            doc: "look back only: blocks are sorted among those before them, columns balanced by their sums so far",
        },
        Knob {
            name: "lra_compat",
            doc: "what the code released with Long Range Arena computes: strided blocks, no sorting, two attentions added",
        },
        WEIGHT_DROPOUT,
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
        chance(&CARD, config.dropout)?;
        if config.causal && (config.cut > 0 || config.lra_compat) {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "causal has neither cut nor lra_compat, which look at all blocks".into(),
            });
        }
        Ok(Box::new(WholeMixer(Sinkhorn {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            head_dim,
            config,
        })))
    },
};

struct Sinkhorn {
    projections: Projections,
    head_dim: usize,
    config: SinkhornConfig,
}

/// Blocks of a sequence: tokens of one, and how many.
fn blocks(block: usize, time: usize) -> (usize, usize) {
    let block = block.min(time.max(1));
    (block, time.div_ceil(block))
}

/// Blocks of several sequences, padded to one number of them.
struct Layout<'a> {
    lines: Lines<'a>,
    block: usize,
    /// The most blocks of a sequence.
    count: usize,
}

impl Layout<'_> {
    /// `[lines, blocks, block * width]` of rows `[tokens * heads, width]`, zeros behind the last token.
    fn padded(&self, x: &Tensor<2>) -> Tensor<3> {
        let (width, count) = (x.dims()[1], self.lines.count());
        let padded = self.lines.padded(x, self.count * self.block, 0.0);
        padded.reshape([count, self.count, self.block * width])
    }

    /// A number for each pair of blocks, `[lines, blocks, blocks]`: `value(row, column)`.
    fn each_pair(&self, device: &Device, value: impl Fn(usize, usize) -> f32) -> Tensor<3> {
        let (lines, count) = (self.lines.count(), self.count);
        let values: Vec<f32> = (0..count * count)
            .map(|at| value(at / count, at % count))
            .collect();
        let values = Tensor::<1>::from_data(values.as_slice(), device);
        values
            .reshape([1, count, count])
            .expand([lines, count, count])
    }
}

impl Sinkhorn {
    /// The sorting matrices `[lines, blocks, blocks]` from block means of the queries and keys.
    fn sorting(&self, layout: &Layout, q: &Tensor<2>, k: &Tensor<2>) -> Tensor<3> {
        let (width, device) = (self.head_dim, q.device());
        let lines = layout.lines.count();
        let (count, block) = (layout.count, layout.block);
        let mean = |x: &Tensor<2>| {
            let blocks = layout.padded(x).reshape([lines * count, block, width]);
            blocks.mean_dim(1).reshape([lines, count, width])
        };
        let causal = self.config.causal;
        let queries = match causal {
            false => mean(q),
            true => {
                // The mean of all queries up to the first of the block.
                let share = |row: usize| 1.0 / (row * block + 1) as f32;
                let before = layout.each_pair(&device, |row, column| match column < row {
                    true => block as f32 * share(row),
                    false => 0.0,
                });
                let shares: Vec<f32> = (0..count).map(share).collect();
                let shares = Tensor::<1>::from_data(shares.as_slice(), &device);
                let first = layout.padded(q).narrow(2, 0, width);
                before.matmul(mean(q)) + first * shares.reshape([1, count, 1])
            }
        };
        let scale = (width as f32).powf(-0.5) / self.config.temperature as f32;
        let scores = queries.matmul(mean(k).swap_dims(1, 2)).mul_scalar(scale);
        let own = (0..lines).map(|line| blocks(block, layout.lines.time(line)).1);
        balance(
            scores,
            &Arc::new(own.collect()),
            self.config.iterations,
            causal,
        )
    }

    /// What the released code computes. Block i holds the tokens t with t mod blocks = i; what is called sorted is, by the
    /// released contraction, the sum of all blocks whatever the sorting: its weights add up to one. The attention to the
    /// block and that to the sum are added.
    fn released(
        &self,
        layout: &Layout,
        [q, k, v]: [&Tensor<2>; 3],
        context: &Context,
    ) -> Tensor<2> {
        let (mut own, mut all) = (Seen::default(), Seen::default());
        let mut sums = vec![0u32; q.dims()[0]];
        for line in 0..layout.lines.count() {
            let time = layout.lines.time(line);
            let (block, count) = blocks(layout.block, time);
            let row = |token: usize| layout.lines.row(line, token);
            for token in 0..time {
                sums[row(token)] = (line * layout.block + token / count) as u32;
            }
            for first in 0..count {
                let tokens = || (first..time).step_by(count).map(row);
                own.keys.push(tokens());
                own.queries.push(tokens());
                all.queries.push(tokens());
                all.keys
                    .push((0..block).map(|place| line * layout.block + place));
            }
        }
        let rows = layout.lines.count() * layout.block;
        let sums = Arc::new(sums);
        let [all_k, all_v] = [k, v].map(|x| summed(x.clone(), sums.clone(), rows));
        let options = |part: u32| context.attention(self.config.dropout, part);
        own.attend_rows([q, k, v], options(0)) + all.attend_rows([q, &all_k, &all_v], options(1))
    }
}

impl Whole for Sinkhorn {
    fn name(&self) -> &'static str {
        CARD.name
    }

    fn all(&self, x: Tensor<3>, offsets: &[usize], context: &Context) -> Tensor<3> {
        let [q, k, v] = self.projections.split(&x).map(rows);
        let (heads, width, tokens) = (self.config.heads, self.head_dim, x.dims()[1]);
        let lines = Lines { offsets, heads };
        let (block, count) = blocks(self.config.block, lines.longest());
        let layout = Layout {
            lines,
            block,
            count,
        };
        let o = if self.config.lra_compat {
            self.released(&layout, [&q, &k, &v], context)
        } else {
            let sorting = self.sorting(&layout, &q, &k);
            // Sorted rows come first, then the tokens' own.
            let behind = lines.count() * count * block;
            let sorted = |x: &Tensor<2>| {
                let blocks = sorting.clone().matmul(layout.padded(x));
                Tensor::cat(vec![blocks.reshape([behind, width]), x.clone()], 0)
            };
            let mut seen = Seen::default();
            for line in 0..lines.count() {
                let time = lines.time(line);
                let (size, own) = blocks(block, time);
                let row = |token: usize| lines.row(line, token);
                let mixed =
                    |at: usize| (line * count + at) * block..(line * count + at) * block + size;
                if self.config.cut > 0 {
                    seen.queries.push((0..time).map(row));
                    seen.keys
                        .push((0..self.config.cut.min(own)).flat_map(mixed));
                    continue;
                }
                for at in 0..own {
                    let tokens = || (at * size..time.min((at + 1) * size)).map(row);
                    // The first block has none before it.
                    let none = self.config.causal && at == 0;
                    let mixed = if none { 0..0 } else { mixed(at) };
                    seen.queries.push(tokens());
                    seen.keys
                        .push(mixed.chain(tokens().map(|row| behind + row)));
                }
            }
            let options = AttentionOptions {
                causal: self.config.causal,
                ..context.attention(self.config.dropout, 0)
            };
            seen.attend_rows([&q, &sorted(&k), &sorted(&v)], options)
        };
        self.projections.join(o.reshape([1, tokens, heads, width]))
    }

    fn layers(&self, time: usize) -> Cost {
        self.projections.cost(time)
    }

    fn own_flops(&self, time: usize) -> u64 {
        let (block, count) = blocks(self.config.block, time);
        let sorting = match self.config.lra_compat {
            true => 0,
            false => 2 * count * count * self.head_dim * (1 + 2 * block),
        };
        (self.config.heads * sorting) as u64
    }

    fn counted_flops(&self, time: usize) -> u64 {
        let SinkhornConfig {
            heads,
            causal,
            cut,
            lra_compat,
            ..
        } = self.config;
        let (block, count) = blocks(self.config.block, time);
        let pairs: usize = match (lra_compat, cut) {
            (false, 1..) => time * cut.min(count) * block,
            _ => (0..count)
                .map(|at| {
                    let own = match lra_compat {
                        true => (time - at).div_ceil(count),
                        false => block.min(time - at * block),
                    };
                    match causal {
                        true if at == 0 => own * (own + 1) / 2,
                        true => own * block + own * (own + 1) / 2,
                        false => own * (block + own),
                    }
                })
                .sum(),
        };
        (4 * heads * pairs * self.head_dim) as u64
    }
}
