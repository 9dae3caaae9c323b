//! Sparse Transformer: causal attention to a near stretch and to a sparse set of far tokens.
//!
//! Child et al. (2019), arXiv 1904.10509, both patterns as the union of their two sets, with stride l:
//! - strided: `i - l <= j <= i`, or `(i - j) mod l = 0`;
//! - fixed: `j div l = i div l`, or `j mod l >= l - c`: the last c tokens of every stretch carry it on.

use anyformer_ops::Tensor;
use serde::{Deserialize, Serialize};

use crate::block_sparse::Plan;
use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, each_sequence};

/// Which far tokens are seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// Those at multiples of the stride before the token.
    Strided,
    /// The last tokens of every stretch.
    #[default]
    Fixed,
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct SparseConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Which far tokens are seen.
    pub pattern: Pattern,
    /// Tokens of a stretch; near the root of the length.
    pub stride: usize,
    /// Tokens at the end of a stretch that later ones see (fixed); divides the stride.
    pub summary: usize,
    /// Biases on all four projections.
    pub bias: bool,
}

impl Default for SparseConfig {
    fn default() -> Self {
        SparseConfig {
            heads: 4,
            pattern: Pattern::Fixed,
            stride: 64,
            summary: 8,
            bias: false,
        }
    }
}

static CARD: Card = Card {
    name: "sparse",
    title: "Sparse Transformer (strided, fixed)",
    paper: "Child, Gray, Radford, Sutskever: Generating Long Sequences with Sparse Transformers (2019), arXiv 1904.10509",
    equation: "o_i = softmax attention over j <= i with\nstrided: i - j <= l or (i - j) mod l = 0\nfixed: j div l = i div l or j mod l >= l - c",
    direction: Direction::Causal,
    streams: false,
    state: "none",
    notes: "About time^1.5 at a stride near the root. Both sets of a pattern are merged in every head. Blocks of tokens are computed whole and masked, so the strided pattern costs several times its pairs. Decoding would need a cache of all keys; it is not offered.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "pattern",
            doc: "strided or fixed",
        },
        Knob {
            name: "stride",
            doc: "tokens of a stretch; near the root of the length",
        },
        Knob {
            name: "summary",
            doc: "tokens at the end of a stretch that later ones see (fixed); divides the stride",
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
    resolve: |options| resolve::<SparseConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: SparseConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        let (stride, summary) = (config.stride, config.summary);
        if stride == 0 || summary == 0 || stride % summary != 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "summary must divide stride and both be at least 1, got {summary} and {stride}"
                ),
            });
        }
        Ok(Box::new(Sparse {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            head_dim,
            config,
        }))
    },
};

struct Sparse {
    projections: Projections,
    head_dim: usize,
    config: SparseConfig,
}

impl Sparse {
    fn sees(&self, i: usize, j: usize) -> bool {
        let (l, c) = (self.config.stride, self.config.summary);
        j <= i
            && match self.config.pattern {
                Pattern::Strided => i - j <= l || (i - j).is_multiple_of(l),
                Pattern::Fixed => j / l == i / l || j % l >= l - c,
            }
    }

    fn plan(&self, time: usize) -> Plan {
        let (l, c) = (self.config.stride, self.config.summary);
        match self.config.pattern {
            // A block lies in one stretch, and in its summary or outside.
            Pattern::Fixed => Plan::new(c, self.config.heads, time, |_, query, _| {
                let seen = |key: &usize| self.sees(query * c, key * c) || *key == query;
                (0..=query).filter(seen).collect()
            }),
            Pattern::Strided => {
                let block = l.div_ceil(8);
                Plan::new(block, self.config.heads, time, |_, query, _| {
                    // Distances between two blocks are `apart - block + 1 ..= apart + block - 1`.
                    let seen = |key: &usize| {
                        let apart = (query - key) * block;
                        let (least, most) = ((apart + 1).saturating_sub(block), apart + block - 1);
                        least <= l || most / l * l >= least
                    };
                    (0..=query).filter(seen).collect()
                })
            }
        }
    }
}

impl TokenMixer for Sparse {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| {
            let plan = self.plan(x.dims()[1]);
            let o = plan.attend(self.projections.split(&x), |i, j| self.sees(i, j));
            Ok(self.projections.join(o))
        })
    }

    fn cost(&self, time: usize) -> Cost {
        let mut cost = self.projections.cost(time);
        cost.flops += self.plan(time).flops(self.head_dim);
        cost
    }
}
