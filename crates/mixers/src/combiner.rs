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

mod grid;

use anyformer_ops::attention::{AttentionOptions, joined};
use anyformer_ops::norm::layer_norm;
use anyformer_ops::{Builder, Init, Linear, Param, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::groups::{Lines, Seen, Whole, WholeMixer, rows};
use crate::mixer::{Context, Cost};
use crate::parts::{Projections, join_heads, linear_cost, split_heads};
use grid::{Grid, levels, logsparse};

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

/// What stands for an earlier row of the axial pattern in each column.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowSummary {
    /// The key of the row's token there.
    #[default]
    None,
    /// The mean of the row's keys under that token's attention.
    Wsum,
    /// A layer over what that token's attention gave, the token itself added, a norm, and a layer to keys.
    Proj,
    /// The same over the mean of the keys.
    WsumProj,
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
    /// Of the axial pattern: what stands for a row in a column.
    pub row_summary: RowSummary,
}

impl Default for CombinerConfig {
    fn default() -> Self {
        CombinerConfig {
            heads: 4,
            pattern: Pattern::Fixed,
            segment: 32,
            causal: true,
            row_summary: RowSummary::None,
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
    notes: "About time^1.5 at a segment near the root (fixed, axial, mixture), time log time (logsparse). The bidirectional fixed and axial forms see the own segment both directly and as a region, as released. Mixture takes true running maxima (the TensorFlow code sums instead). The logsparse blocks hold for every length; the released code loses the past of the last token at lengths 2^n + 1. Decoding would need all keys; it is not offered.",
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
        Knob {
            name: "row_summary",
            doc: "of the axial pattern, what stands for an earlier row in a column: none (the key of its token there), wsum (the keys under that token's attention), proj, wsum_proj (the released layer and norm over the attention's result, or over wsum)",
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
        if config.row_summary != RowSummary::None && config.pattern != Pattern::Axial {
            return Err(impossible("row_summary is of the axial pattern"));
        }
        let projects = matches!(config.row_summary, RowSummary::Proj | RowSummary::WsumProj);
        Ok(Box::new(WholeMixer(Combiner {
            projections: Projections::new(builder, dim, config.heads, false),
            summary: projects.then(|| Summary::new(builder, dim)),
            head_dim,
            config,
        })))
    },
};

/// From what a row's attention gave to a key.
struct Summary {
    hidden: Linear,
    weight: Param,
    bias: Param,
    key: Linear,
}

impl Summary {
    fn new(builder: &Builder, dim: usize) -> Self {
        let at = builder.at("row_summary");
        let norm = at.at("norm");
        Summary {
            hidden: Linear::new(&at, "hidden", dim, dim, false),
            weight: norm.param_no_decay("weight", &[dim], Init::Ones),
            bias: norm.param_no_decay("bias", &[dim], Init::Zeros),
            key: Linear::new(&at, "key", dim, dim, false),
        }
    }

    /// `key(norm(x + hidden(given)))`, all `[1, tokens, dim]`.
    fn forward(&self, x: &Tensor<3>, given: Tensor<3>) -> Tensor<3> {
        let sum = x.clone() + self.hidden.forward(given);
        let (weight, bias) = (self.weight.tensor::<1>(), self.bias.tensor::<1>());
        self.key.forward(layer_norm(sum, weight, Some(bias), 1e-5))
    }

    fn cost(&self, time: usize) -> Cost {
        let mut cost = linear_cost(&[&self.hidden, &self.key], time);
        cost.params += (self.weight.count() + self.bias.count()) as u64;
        cost
    }
}

struct Combiner {
    projections: Projections,
    summary: Option<Summary>,
    head_dim: usize,
    config: CombinerConfig,
}

/// Added to the logit of a pair that is not seen.
const FORBIDDEN: f32 = -1e30;

/// Heads of tokens, `[tokens * heads, head_dim]`, cut into rows of `columns`.
struct Cut<'a> {
    lines: Lines<'a>,
    columns: usize,
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
}

impl Cut<'_> {
    /// Tokens of a row of a line.
    fn tokens(&self, line: usize, row: usize) -> std::ops::Range<usize> {
        row * self.columns..self.lines.time(line).min((row + 1) * self.columns)
    }

    fn rows_of(&self, line: usize) -> usize {
        self.lines.time(line).div_ceil(self.columns)
    }

    /// Every row of every line.
    fn each_row(&self) -> impl Iterator<Item = (usize, usize)> + use<'_> {
        (0..self.lines.count()).flat_map(|line| (0..self.rows_of(line)).map(move |row| (line, row)))
    }

    /// The tokens of a column of a line from the first row to before the last of `rows`.
    fn column(&self, line: usize, column: usize, rows: usize) -> impl Iterator<Item = usize> {
        (0..rows).map(move |row| self.lines.row(line, row * self.columns + column))
    }

    /// The own segment directly; each earlier one, or each, as a region: all in one softmax.
    fn fixed(&self, causal: bool) -> Tensor<2> {
        let (width, s, count) = (self.q.dims()[1], self.columns, self.lines.count());
        let n = self.lines.longest().div_ceil(s);
        // Places without a token have the least of all keys and queries.
        let most = |x: &Tensor<2>| {
            let padded = self.lines.padded(x, n * s, FORBIDDEN);
            padded
                .reshape([count * n, s, width])
                .max_dim(1)
                .reshape([count * n, width])
        };
        let mut inner = Seen::default();
        for line in 0..count {
            for row in 0..n {
                inner.queries.push([line * n + row]);
                let tokens = self.tokens(line, row.min(self.rows_of(line)));
                inner
                    .keys
                    .push(tokens.map(|token| self.lines.row(line, token)));
            }
        }
        let values = inner.attend(
            [&most(&self.q), &self.k, &self.v],
            AttentionOptions::default(),
        );
        let behind = count * n;
        let keys = Tensor::cat(vec![most(&self.k), self.k.clone()], 0);
        let values = Tensor::cat(vec![values, self.v.clone()], 0);
        let mut seen = Seen::default();
        for (line, row) in self.each_row() {
            let tokens = || {
                self.tokens(line, row)
                    .map(|token| self.lines.row(line, token))
            };
            let far = if causal { row } else { self.rows_of(line) };
            seen.queries.push(tokens());
            let regions = (0..far).map(|row| line * n + row);
            seen.keys
                .push(regions.chain(tokens().map(|row| behind + row)));
        }
        let options = AttentionOptions {
            causal,
            ..AttentionOptions::default()
        };
        seen.attend_rows([&self.q, &keys, &values], options)
    }

    /// Attention within each row: looking both ways, or back only, with the logarithms of the sums.
    fn in_rows(&self, k: &Tensor<2>, v: &Tensor<2>, causal: bool) -> (Tensor<2>, Tensor<1>) {
        let mut seen = Seen::default();
        for (line, row) in self.each_row() {
            let tokens = || {
                self.tokens(line, row)
                    .map(|token| self.lines.row(line, token))
            };
            seen.queries.push(tokens());
            seen.keys.push(tokens());
        }
        self.summed(seen, k, v, causal)
    }

    /// Outputs and the logarithms of sums `[tokens * heads]` in the order of the tokens.
    fn summed(
        &self,
        seen: Seen,
        k: &Tensor<2>,
        v: &Tensor<2>,
        causal: bool,
    ) -> (Tensor<2>, Tensor<1>) {
        let options = AttentionOptions {
            causal,
            ..AttentionOptions::default()
        };
        seen.attend_rows_with_sums([&self.q, k, v], options)
    }

    /// The own row directly; each earlier row, or each, by what `key` makes of its token in the same column: its own key,
    /// the row's keys and values under its attention.
    fn axial(
        &self,
        causal: bool,
        key: impl FnOnce([Tensor<2>; 2]) -> Tensor<2>,
        weighs_keys: bool,
    ) -> Tensor<2> {
        let both_ways = self.in_rows(&self.k, &self.v, false);
        let whole = both_ways.0.clone();
        let given = match weighs_keys {
            true => self.in_rows(&self.k, &self.k, false).0,
            false => whole.clone(),
        };
        let keys = key([self.k.clone(), given]);
        let mut seen = Seen::default();
        for line in 0..self.lines.count() {
            for column in 0..self.columns.min(self.lines.time(line)) {
                let rows = (self.lines.time(line) - column).div_ceil(self.columns);
                seen.queries.push(self.column(line, column, rows));
                // Without its last row, so that each token sees the rows before its own.
                let seen_rows = if causal { rows - 1 } else { rows };
                seen.keys.push(self.column(line, column, seen_rows));
            }
        }
        let near = match causal {
            true => self.in_rows(&self.k, &self.v, true),
            false => both_ways,
        };
        if seen.keys.rows.is_empty() {
            // With one row nobody reads a summary: its gradient is zero, not absent.
            return near.0 + keys.mean_dim(0) * 0.0;
        }
        let far = self.summed(seen, &keys, &whole, causal);
        joined(vec![near, far])
    }
}

impl Whole for Combiner {
    fn name(&self) -> &'static str {
        CARD.name
    }

    fn all(&self, x: Tensor<3>, offsets: &[usize], _: &Context) -> Tensor<3> {
        let CombinerConfig {
            heads,
            pattern,
            segment,
            causal,
            row_summary,
        } = self.config;
        let (width, tokens) = (self.head_dim, x.dims()[1]);
        let [q, k, v] = self.projections.split(&x).map(rows);
        let lines = Lines { offsets, heads };
        let columns = segment.min(lines.longest());
        let cut = Cut {
            lines,
            columns,
            q,
            k,
            v,
        };
        let o = match pattern {
            Pattern::Fixed => cut.fixed(causal),
            Pattern::Axial => {
                let key = |[own, given]: [Tensor<2>; 2]| match (&self.summary, row_summary) {
                    (Some(summary), _) => {
                        let given = given.reshape([1, tokens, heads, width]);
                        rows(split_heads(summary.forward(&x, join_heads(given)), heads))
                    }
                    (None, RowSummary::Wsum) => given,
                    (None, _) => own,
                };
                let weighs_keys = matches!(row_summary, RowSummary::Wsum | RowSummary::WsumProj);
                cut.axial(causal, key, weighs_keys)
            }
            Pattern::Logsparse | Pattern::Mixture => {
                let count = lines.longest().div_ceil(columns);
                // Both look back only: nobody sees the places behind the last token.
                let padded = |x: &Tensor<2>| lines.padded(x, count * columns, 0.0);
                let q = padded(&cut.q).mul_scalar((width as f32).powf(-0.5));
                let (k, v) = (padded(&cut.k), padded(&cut.v));
                let o = match pattern {
                    Pattern::Logsparse => logsparse(q, k, v),
                    _ => {
                        let shape = [lines.count(), count, columns, width];
                        let [q, k, v] = [q, k, v].map(|x| x.reshape(shape));
                        let grid = Grid {
                            q,
                            k,
                            v,
                            rows: count,
                            columns,
                        };
                        grid.mixture()
                            .reshape([lines.count(), count * columns, width])
                    }
                };
                lines.rows(o)
            }
        };
        self.projections.join(o.reshape([1, tokens, heads, width]))
    }

    fn layers(&self, time: usize) -> Cost {
        let cost = self.projections.cost(time);
        match &self.summary {
            Some(summary) => cost + summary.cost(time),
            None => cost,
        }
    }

    fn own_flops(&self, time: usize) -> u64 {
        let s = self.config.segment.min(time.max(1));
        let n = time.div_ceil(s);
        let (row, column) = (n * s * s, s * n * n);
        let pairs = match self.config.pattern {
            Pattern::Fixed | Pattern::Axial => 0,
            Pattern::Mixture => 8 * row + 8 * column,
            Pattern::Logsparse => {
                let inner = |level: usize| 2 * (time >> level << level);
                let levels = levels(time);
                (1..levels).map(inner).sum::<usize>() + 2 * time * (levels + 1)
            }
        };
        2 * (self.config.heads * pairs * self.head_dim) as u64
    }

    fn counted_flops(&self, time: usize) -> u64 {
        let CombinerConfig {
            heads,
            causal,
            row_summary,
            ..
        } = self.config;
        let s = self.config.segment.min(time.max(1));
        let n = time.div_ceil(s);
        let size = |row: usize| s.min(time - row * s);
        let both: usize = (0..n).map(|row| size(row).pow(2)).sum();
        let own = match causal {
            true => (0..n).map(|row| size(row) * (size(row) + 1) / 2).sum(),
            false => both,
        };
        let pairs: usize = match self.config.pattern {
            Pattern::Fixed => {
                let far = |row: usize| size(row) * if causal { row } else { n };
                time + own + (0..n).map(far).sum::<usize>()
            }
            Pattern::Axial => {
                let rows = |column: usize| (time - column).div_ceil(s);
                let far = |rows: usize| {
                    if causal {
                        rows * (rows - 1) / 2
                    } else {
                        rows * rows
                    }
                };
                let summaries = match row_summary {
                    RowSummary::Wsum | RowSummary::WsumProj => 2,
                    _ => 1,
                };
                // Both ways the own row is what its summary is made of.
                let own = if causal { own } else { 0 };
                summaries * both + own + (0..s).map(|column| far(rows(column))).sum::<usize>()
            }
            Pattern::Mixture | Pattern::Logsparse => 0,
        };
        (4 * heads * pairs * self.head_dim) as u64
    }
}
