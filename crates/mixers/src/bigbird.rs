//! BigBird: blocks of tokens attend to their neighbours, to the first and last block, and to a few random blocks.
//!
//! Zaheer et al. (2020), arXiv 2007.14062, internal global blocks (ITC). A query block i sees key blocks
//! `{0, i - 1, i, i + 1, last}` and `random` others per head; the first and the last query block see everything. The random
//! blocks are a fixed function of (seed, head, query block, key block): those with the smallest hashes. Nothing is stored,
//! and a longer sequence keeps most choices of a shorter one.

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

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct BigbirdConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Tokens of a block.
    pub block: usize,
    /// Random key blocks of each query block.
    pub random: usize,
    /// Seed of the random blocks; give each layer its own.
    pub seed: u32,
    /// Biases on all four projections.
    pub bias: bool,
    /// Chance with which a weight of attention is dropped in training.
    pub dropout: f64,
}

impl Default for BigbirdConfig {
    fn default() -> Self {
        BigbirdConfig {
            heads: 4,
            block: 64,
            random: 3,
            seed: 0,
            bias: true,
            dropout: 0.0,
        }
    }
}

static CARD: Card = Card {
    name: "bigbird",
    title: "BigBird (block sparse)",
    paper: "Zaheer et al.: Big Bird: Transformers for Longer Sequences (NeurIPS 2020), arXiv 2007.14062",
    equation: "softmax attention of query block i to key blocks {0, i-1, i, i+1, last} and `random` others\nblocks 0 and last attend to all",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "Linear in time: at most 5 + random key blocks per query block. Equal to full attention up to about 5 + random blocks. Global tokens are the sequence's own first and last block. The last block makes it bidirectional: it cannot be causal or streamed. Random blocks come from a hash, not from the released code's generator, whose plan differs from run to run of its library.",
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
            name: "random",
            doc: "random key blocks of each query block",
        },
        Knob {
            name: "seed",
            doc: "seed of the random blocks; give each layer its own",
        },
        Knob {
            name: "bias",
            doc: "biases on all four projections",
        },
        WEIGHT_DROPOUT,
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<BigbirdConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: BigbirdConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        chance(&CARD, config.dropout)?;
        if config.block == 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "block must be at least 1".into(),
            });
        }
        Ok(Box::new(Bigbird {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            plans: Plans::default(),
            head_dim,
            config,
        }))
    },
};

/// SplitMix64 (Steele, Lea, Flood, 2014) of a place in the plan.
fn hash(seed: u32, head: usize, query: usize, key: usize) -> u64 {
    let place = ((head as u64) << 42) ^ ((query as u64) << 21) ^ key as u64;
    let z = (u64::from(seed) << 48 ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Bigbird {
    projections: Projections,
    plans: Plans,
    head_dim: usize,
    config: BigbirdConfig,
}

impl Bigbird {
    fn plan(&self, time: usize) -> Plan {
        let BigbirdConfig {
            heads,
            block,
            random,
            seed,
            ..
        } = self.config;
        let blocks = time.div_ceil(block);
        let keys = |head: usize, queries: Range<usize>| {
            let query = queries.start / block;
            if query == 0 || query + 1 == blocks {
                return vec![0..time];
            }
            let fixed = |key: &usize| *key == 0 || key + 1 == blocks || query.abs_diff(*key) <= 1;
            let (mut list, mut others): (Vec<usize>, Vec<usize>) = (0..blocks).partition(fixed);
            others.sort_by_key(|key| hash(seed, head, query, *key));
            list.extend(others.into_iter().take(random));
            list.sort_unstable();
            let tokens = |key: usize| key * block..time.min((key + 1) * block);
            list.into_iter().map(tokens).collect()
        };
        Plan::new(time, heads, block, keys, |_, _, _| true)
    }
}

impl TokenMixer for Bigbird {
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
