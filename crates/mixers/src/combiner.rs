//! Combiner: full attention at the cost of a sparse pattern, tokens that are not seen one by one being seen as regions.
//!
//! Ren et al. (2021), arXiv 2107.05768. A query has direct keys and regions in one softmax; a region's key is the entrywise
//! maximum of its keys, its value the softmax attention of its maximal query over its own tokens. Every allowed token so
//! has a weight above zero. Patterns, for segments (rows) of `segment` tokens:
//! - fixed: the own segment directly, every earlier segment as a region;
//! - logsparse: the token itself, and the past as the blocks of its position's binary digits;
//! - axial: the own row directly, each other row as the row attention of the token in the same column;
//! - mixture: the own row and column directly; other columns above, and earlier rows to the left and to the right, as
//!   regions.

use anyformer_ops::activation::softmax;
use anyformer_ops::{Device, Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, each_sequence, indices};

/// Which tokens are direct and which form regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// Segments.
    #[default]
    Fixed,
    /// Blocks of powers of two.
    Logsparse,
    /// Rows, by column.
    Axial,
    /// Rows and columns.
    Mixture,
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct CombinerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Which tokens are direct and which form regions.
    pub pattern: Pattern,
    /// Tokens of a segment or row; near the root of the length.
    pub segment: usize,
    /// Look back only; logsparse and mixture know no other way.
    pub causal: bool,
}

impl Default for CombinerConfig {
    fn default() -> Self {
        CombinerConfig {
            heads: 4,
            pattern: Pattern::Fixed,
            segment: 32,
            causal: true,
        }
    }
}

static CARD: Card = Card {
    name: "combiner",
    title: "Combiner (fixed, logsparse, axial, mixture)",
    paper: "Ren et al.: Combiner: Full Attention Transformer with Sparse Computation Cost (NeurIPS 2021), arXiv 2107.05768",
    equation: "o_i = softmax over direct j of q_i . k_j and regions r of q_i . k_r, values v_j and v_r\nk_r = max_j k_j, v_r = softmax_j(max(q) . k_j) v_j, j in r",
    direction: Direction::Either,
    streams: false,
    state: "none",
    notes: "About time^1.5 at a segment near the root (fixed, axial, mixture), time log time (logsparse). The bidirectional fixed and axial forms see the own segment both directly and as a region, as released. Axial rows are keyed by the token in the same column without the released extra projection; mixture takes true running maxima (the TensorFlow code sums instead). The logsparse blocks hold for every length; the released code loses the past of the last token at lengths 2^n + 1. Decoding would need all keys; it is not offered.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "pattern",
            doc: "fixed, logsparse, axial or mixture",
        },
        Knob {
            name: "segment",
            doc: "tokens of a segment or row; near the root of the length",
        },
        Knob {
            name: "causal",
            doc: "look back only; logsparse and mixture know no other way",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<CombinerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: CombinerConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        let impossible = |message: &str| ConfigError::Impossible {
            mixer: CARD.name,
            message: message.into(),
        };
        if config.segment == 0 {
            return Err(impossible("segment must be at least 1"));
        }
        if !config.causal && matches!(config.pattern, Pattern::Logsparse | Pattern::Mixture) {
            return Err(impossible(
                "logsparse and mixture look back only; set causal = true or take fixed or axial",
            ));
        }
        Ok(Box::new(Combiner {
            projections: Projections::new(builder, dim, config.heads, false),
            head_dim,
            config,
        }))
    },
};

struct Combiner {
    projections: Projections,
    head_dim: usize,
    config: CombinerConfig,
}

/// Added to the logit of a pair that is not seen.
const FORBIDDEN: f32 = -1e30;

/// A mask of shape `[1, a, b, c]`, zero where `sees` holds.
fn mask(
    [a, b, c]: [usize; 3],
    device: &Device,
    sees: impl Fn(usize, usize, usize) -> bool,
) -> Tensor<4> {
    let free = |at: usize| sees(at / (b * c), at / c % b, at % c);
    let values: Vec<f32> = (0..a * b * c)
        .map(|at| if free(at) { 0.0 } else { FORBIDDEN })
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape([1, a, b, c])
}

fn dots(q: Tensor<4>, k: Tensor<4>) -> Tensor<4> {
    q.matmul(k.swap_dims(2, 3))
}

/// The maximum over the second-last dimension, which is kept.
fn top(x: Tensor<4>) -> Tensor<4> {
    x.max_dim(2)
}

/// The running maximum over the second-last dimension of what came strictly before; zeros where nothing did.
fn running(x: Tensor<4>) -> Tensor<4> {
    let [_, _, count, _] = x.dims();
    let mut all = vec![x.clone().narrow(2, 0, 1).zeros_like()];
    let mut held: Option<Tensor<4>> = None;
    for at in 0..count - 1 {
        let next = x.clone().narrow(2, at, 1);
        let most = match held {
            None => next,
            Some(held) => held.max_pair(next),
        };
        all.push(most.clone());
        held = Some(most);
    }
    Tensor::cat(all, 2)
}

/// Rows by columns of one head each, `[heads of the batch, rows, columns, head_dim]`.
struct Grid {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    rows: usize,
    columns: usize,
    time: usize,
    causal: bool,
}

impl Grid {
    fn mask(&self, shape: [usize; 3], sees: impl Fn(usize, usize, usize) -> bool) -> Tensor<4> {
        mask(shape, &self.q.device(), sees)
    }

    /// Whether a place holds a token.
    fn real(&self, row: usize, column: usize) -> bool {
        row * self.columns + column < self.time
    }

    fn fixed(&self) -> Tensor<4> {
        let (n, s) = (self.rows, self.columns);
        let [heads, _, _, width] = self.q.dims();
        // Places without a token have the least of all keys and queries.
        let empty = self.mask([n, s, 1], |row, column, _| self.real(row, column));
        let (key, query) = (
            top(self.k.clone() + empty.clone()),
            top(self.q.clone() + empty.clone()),
        );
        let inner = dots(query, self.k.clone()) + empty.reshape([1, n, 1, s]);
        let value = softmax(inner)
            .matmul(self.v.clone())
            .reshape([heads, 1, n, width]);
        let local = dots(self.q.clone(), self.k.clone())
            + self.mask([n, s, s], |row, i, j| {
                self.real(row, j) && (j <= i || !self.causal)
            });
        let flat = self.q.clone().reshape([heads, 1, n * s, width]);
        let far = dots(flat, key.reshape([heads, 1, n, width])).reshape([heads, n, s, n])
            + self.mask([n, 1, n], |row, _, other| other < row || !self.causal);
        let weights = softmax(Tensor::cat(vec![local, far], 3));
        let own = weights.clone().narrow(3, 0, s).matmul(self.v.clone());
        let far = weights.narrow(3, s, n).reshape([heads, 1, n * s, n]);
        own + far.matmul(value).reshape([heads, n, s, width])
    }

    /// `[heads, rows, columns, ..]` with rows and columns changed over.
    fn turned(x: &Tensor<4>) -> Tensor<4> {
        x.clone().swap_dims(1, 2)
    }

    fn axial(&self) -> Tensor<4> {
        let (n, s) = (self.rows, self.columns);
        let row = dots(self.q.clone(), self.k.clone());
        let real = self.mask([n, 1, s], |row, _, j| self.real(row, j));
        let whole = softmax(row.clone() + real).matmul(self.v.clone());
        let local = row
            + self.mask([n, s, s], |row, i, j| {
                self.real(row, j) && (j <= i || !self.causal)
            });
        let column = dots(Self::turned(&self.q), Self::turned(&self.k));
        let far = column
            + self.mask([s, n, n], |column, row, other| match self.causal {
                true => other < row,
                false => self.real(other, column),
            });
        let weights = softmax(Tensor::cat(vec![local, Self::turned(&far)], 3));
        let own = weights.clone().narrow(3, 0, s).matmul(self.v.clone());
        let far = Self::turned(&weights.narrow(3, s, n)).matmul(Self::turned(&whole));
        own + Self::turned(&far)
    }

    fn mixture(&self) -> Tensor<4> {
        let (n, s) = (self.rows, self.columns);
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Self::turned);
        // Columns above: [heads, columns, rows, ..] summed up to each row, seen from each row as [heads, rows, columns, ..].
        let above = self.mask([1, n, n], |_, row, other| other < row);
        let inner = softmax(dots(running(q.clone()), k.clone()) + above.clone());
        let columns = Self::turned(&inner.matmul(v.clone()));
        let column_keys = Self::turned(&running(k.clone()));
        let others =
            dots(self.q.clone(), column_keys) + self.mask([n, s, s], |row, i, j| row > 0 && i != j);
        // Earlier rows, to the left and to the right of the own column.
        let side = |backwards: bool| {
            let flip = |x: &Tensor<4>| match backwards {
                true => x.clone().flip([2]),
                false => x.clone(),
            };
            let [q, k, v] = [&self.q, &self.k, &self.v].map(flip);
            let before = self.mask([1, s, s], |_, i, j| j < i);
            let values = softmax(dots(running(q), k.clone()) + before).matmul(v);
            [flip(&running(k)), flip(&values)].map(|x| Self::turned(&x))
        };
        let sides = [side(false), side(true)];
        let last = [0, s - 1];
        let far = [0, 1].map(|at| {
            let seen = self.mask([s, n, n], |column, row, other| {
                other < row && column != last[at]
            });
            Self::turned(&(dots(q.clone(), sides[at][0].clone()) + seen))
        });
        let own = dots(self.q.clone(), self.k.clone()) + self.mask([1, s, s], |_, i, j| j <= i);
        let up = Self::turned(&(dots(q, k) + above));
        let [left, right] = far;
        let weights = softmax(Tensor::cat(vec![own, up, others, left, right], 3));
        let part = |start: usize, length: usize| weights.clone().narrow(3, start, length);
        let across = |start: usize, values: Tensor<4>| {
            Self::turned(&Self::turned(&part(start, n)).matmul(values))
        };
        let [[_, left], [_, right]] = sides;
        part(0, s).matmul(self.v.clone())
            + across(s, v)
            + part(s + n, s).matmul(columns)
            + across(2 * s + n, left)
            + across(2 * s + 2 * n, right)
    }
}

/// Levels of a sequence: blocks of 1, 2, 4 … tokens that end before its last token.
fn levels(time: usize) -> usize {
    (time - 1).checked_ilog2().map_or(0, |log| log as usize + 1)
}

/// The past as blocks of powers of two; all `[heads, time, head_dim]`.
fn logsparse(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> Tensor<3> {
    let [heads, time, width] = q.dims();
    let device = q.device();
    let product = |a: Tensor<3>, b: Tensor<3>| (a * b).sum_dim(2);
    let mut logits = vec![product(q.clone(), k.clone())];
    let mut values = vec![v.clone()];
    for level in 0..levels(time) {
        let size = 1 << level;
        let count = time / size;
        let blocks = |x: &Tensor<3>| {
            let whole = x.clone().narrow(1, 0, count * size);
            whole.reshape([heads, count, size, width])
        };
        let (keys, sums) = match level {
            0 => (k.clone(), v.clone()),
            _ => {
                let inner = softmax(dots(top(blocks(&q)), blocks(&k)));
                let flat = |x: Tensor<4>| x.reshape([heads, count, width]);
                (flat(top(blocks(&k))), flat(inner.matmul(blocks(&v))))
            }
        };
        let set = |token: usize| token >> level & 1 == 1;
        let places = (0..time).map(|token| if set(token) { token / size - 1 } else { 0 });
        let places = indices(places, &device);
        let absent: Vec<f32> = (0..time)
            .map(|token| if set(token) { 0.0 } else { FORBIDDEN })
            .collect();
        let absent = Tensor::<1>::from_data(absent.as_slice(), &device).reshape([1, time, 1]);
        logits.push(product(q.clone(), keys.select(1, places.clone())) + absent);
        values.push(sums.select(1, places));
    }
    let weights = softmax(Tensor::cat(logits, 2));
    let none = v.zeros_like();
    values
        .into_iter()
        .enumerate()
        .fold(none, |sum, (at, value)| {
            sum + weights.clone().narrow(2, at, 1) * value
        })
}

impl Combiner {
    /// Tokens of a row, and rows.
    fn shape(&self, time: usize) -> (usize, usize) {
        let columns = self.config.segment.min(time.max(1));
        (columns, time.div_ceil(columns))
    }

    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let (heads, width) = (batch * self.config.heads, self.head_dim);
        meter::add(batch as u64 * self.mixing_flops(time));
        let (device, scale) = (x.device(), (width as f32).powf(-0.5));
        let [q, k, v] = self
            .projections
            .split(&x)
            .map(|part| part.swap_dims(1, 2).reshape([heads, time, width]));
        let q = q.mul_scalar(scale);
        let (columns, rows) = self.shape(time);
        let o = if self.config.pattern == Pattern::Logsparse {
            logsparse(q, k, v)
        } else {
            let cut = |x: Tensor<3>| {
                let missing = rows * columns - time;
                let x = match missing {
                    0 => x,
                    _ => Tensor::cat(vec![x, Tensor::zeros([heads, missing, width], &device)], 1),
                };
                x.reshape([heads, rows, columns, width])
            };
            let grid = Grid {
                q: cut(q),
                k: cut(k),
                v: cut(v),
                rows,
                columns,
                time,
                causal: self.config.causal,
            };
            let o = match self.config.pattern {
                Pattern::Axial => grid.axial(),
                Pattern::Mixture => grid.mixture(),
                Pattern::Fixed | Pattern::Logsparse => grid.fixed(),
            };
            o.reshape([heads, rows * columns, width]).narrow(1, 0, time)
        };
        let o = o.reshape([batch, self.config.heads, time, width]);
        self.projections.join(o.swap_dims(1, 2))
    }

    /// Operations beside those of the projections.
    fn mixing_flops(&self, time: usize) -> u64 {
        let (s, n) = self.shape(time);
        let (row, column) = (n * s * s, s * n * n);
        let pairs = match self.config.pattern {
            Pattern::Fixed => 2 * n * s + 2 * row + 2 * column,
            Pattern::Axial => 3 * row + 2 * column,
            Pattern::Mixture => 8 * row + 8 * column,
            Pattern::Logsparse => {
                let inner = |level: usize| 2 * (time >> level << level);
                let levels = levels(time);
                (1..levels).map(inner).sum::<usize>() + 2 * time * (levels + 1)
            }
        };
        2 * (self.config.heads * pairs * self.head_dim) as u64
    }
}

impl TokenMixer for Combiner {
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
