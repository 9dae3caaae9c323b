//! Sparse Transformer: causal attention to a near stretch and to a sparse set of far tokens.
//!
//! Child et al. (2019), arXiv 1904.10509, both patterns as the union of their two sets, with stride l:
//! - strided: `i - l <= j <= i`, or `(i - j) mod l = 0`;
//! - fixed: `j div l = i div l`, or `j mod l >= l - c`: the last c tokens of every stretch carry it on.

use std::ops::Range;

use anyformer_ops::Tensor;
use anyformer_ops::attention::Plan;
use serde::{Deserialize, Serialize};

use crate::block_sparse::Plans;
use crate::card::{
    Card, ConfigError, Direction, Knob, TokenEntry, WEIGHT_DROPOUT, chance, head_dim, read, resolve,
};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::Projections;

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

/// Queries that share a list of keys in the fixed pattern.
const FIXED_BLOCK: usize = 64;
/// In the strided one, whose far keys differ from query to query: each query pays for those of its block.
const STRIDED_BLOCK: usize = 16;

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
    /// Chance with which a weight of attention is dropped in training.
    pub dropout: f64,
    /// Look back only; otherwise the first token, a class token, sees all and is seen by all, and the others look back.
    pub causal: bool,
    /// What the code released with Long Range Arena sees: the first place of a stretch is a summary too (fixed).
    pub lra_compat: bool,
}

impl Default for SparseConfig {
    fn default() -> Self {
        SparseConfig {
            heads: 4,
            pattern: Pattern::Fixed,
            stride: 64,
            summary: 8,
            bias: false,
            dropout: 0.0,
            causal: true,
            lra_compat: false,
        }
    }
}

static CARD: Card = Card {
    name: "sparse",
    title: "Sparse Transformer (strided, fixed)",
    paper: "Child, Gray, Radford, Sutskever: Generating Long Sequences with Sparse Transformers (2019), arXiv 1904.10509",
    equation: "o_i = softmax attention over j <= i with\nstrided: i - j <= l or (i - j) mod l = 0\nfixed: j div l = i div l or j mod l >= l - c",
    direction: Direction::Either,
    streams: false,
    state: "none",
    notes: "About time^1.5 at a stride near the root. Both sets of a pattern are merged in every head. Keys are gathered for 16 (strided) or 64 (fixed) queries at a time and masked, so the strided pattern costs several times its pairs. Decoding would need a cache of all keys; it is not offered.",
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
        WEIGHT_DROPOUT,
        Knob {
            name: "causal",
            doc: "look back only; otherwise the first token, a class token, sees all and is seen by all, the others look back from behind it",
        },
        Knob {
            name: "lra_compat",
            doc: "what the code released with Long Range Arena sees: the first place of a stretch is a summary too (fixed); its stride is 50, its summary 10",
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
        chance(&CARD, config.dropout)?;
        let (stride, summary) = (config.stride, config.summary);
        if config.lra_compat && config.pattern != Pattern::Fixed {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "lra_compat is of the fixed pattern; set pattern = fixed".into(),
            });
        }
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
            plans: Plans::default(),
            head_dim,
            config,
        }))
    },
};

struct Sparse {
    projections: Projections,
    plans: Plans,
    head_dim: usize,
    config: SparseConfig,
}

impl Sparse {
    /// The pattern, of places in it.
    fn follows(&self, i: usize, j: usize) -> bool {
        let (l, c) = (self.config.stride, self.config.summary);
        let first = self.config.lra_compat && j.is_multiple_of(l);
        j <= i
            && match self.config.pattern {
                Pattern::Strided => i - j <= l || (i - j).is_multiple_of(l),
                Pattern::Fixed => j / l == i / l || j % l >= l - c || first,
            }
    }

    /// Tokens before the pattern begins.
    fn before(&self) -> usize {
        usize::from(!self.config.causal)
    }

    fn sees(&self, i: usize, j: usize) -> bool {
        let before = self.before();
        i < before || j < before || self.follows(i - before, j - before)
    }

    /// Places that those of a block follow, and others with them.
    fn places(&self, Range { start, end }: Range<usize>) -> Vec<Range<usize>> {
        let (l, c) = (self.config.stride, self.config.summary);
        let mut list = Vec::new();
        match self.config.pattern {
            Pattern::Fixed => {
                let stretch = start / l;
                for end in (1..=stretch).map(|stretch| stretch * l) {
                    if self.config.lra_compat {
                        list.push(end - l..end - l + 1);
                    }
                    list.push(end - c..end);
                }
                list.push(stretch * l..end);
            }
            Pattern::Strided => {
                // Each multiple of the stride sees the block moved back by it, down to those that touch the neighbours.
                let near = start.saturating_sub(l);
                let far = (2..=end / l).rev().map(|times| {
                    let back = times * l;
                    start.saturating_sub(back)..near.min(end.saturating_sub(back))
                });
                list.extend(far);
                list.push(near..end);
            }
        }
        list
    }

    fn plan(&self, time: usize) -> Plan {
        let before = self.before();
        let block = match self.config.pattern {
            Pattern::Fixed => FIXED_BLOCK,
            Pattern::Strided => STRIDED_BLOCK,
        };
        let keys = |_: usize, queries: Range<usize>| {
            if queries.start < before {
                return vec![0..time];
            }
            let places = self.places(queries.start - before..queries.end - before);
            let moved = places.into_iter();
            let moved = moved.map(|places| places.start + before..places.end + before);
            let mut list: Vec<Range<usize>> = std::iter::once(0..before).chain(moved).collect();
            list.retain(|keys| keys.start < keys.end);
            apart(list)
        };
        Plan::new(time, 1, block, keys, |_, i, j| self.sees(i, j))
    }
}

/// Ranges in order of their starts, those that overlap made one.
fn apart(ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

impl TokenMixer for Sparse {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        if state.is_some() {
            return Err(RunError::CannotStream(CARD.name));
        }
        let parts = self.projections.split(&x);
        let o = self
            .plans
            .attend(parts, context, self.config.dropout, |time| self.plan(time));
        Ok((self.projections.join(o), None))
    }

    fn cost(&self, time: usize) -> Cost {
        let mut cost = self.projections.cost(time);
        let plan = self.plans.of(time, || self.plan(time));
        cost.flops += plan.flops(self.config.heads, self.head_dim, self.head_dim);
        cost
    }
}
