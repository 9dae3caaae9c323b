//! Longformer: a window of neighbours for every token, and a few global tokens that see and are seen by all.
//!
//! Beltagy et al. (2020), arXiv 2004.05150. Token i attends to `|i - j| <= window` and to the global tokens in one softmax;
//! a global token attends to all tokens through projections of its own (`q_global`, `k_global`, `v_global`). Global are the
//! first `globals` tokens of a sequence (a class token, a question).

use std::ops::Range;
use std::sync::Arc;

use anyformer_ops::attention::{AttentionOptions, Plan, attention_flops, flash_attention};
use anyformer_ops::lengths::cumulative;
use anyformer_ops::{Linear, Tensor};
use serde::{Deserialize, Serialize};

use crate::block_sparse::Plans;
use crate::card::{
    Card, ConfigError, Direction, Knob, TokenEntry, WEIGHT_DROPOUT, chance, head_dim, read, resolve,
};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, indices, linear_cost, split_heads};

/// Queries that share a list of keys.
const BLOCK: usize = 64;

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LongformerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Neighbours seen on each side, in tokens.
    pub window: usize,
    /// Global tokens at the start of each sequence.
    pub globals: usize,
    /// Biases on all projections.
    pub bias: bool,
    /// Chance with which a weight of attention is dropped in training.
    pub dropout: f64,
}

impl Default for LongformerConfig {
    fn default() -> Self {
        LongformerConfig {
            heads: 4,
            window: 64,
            globals: 1,
            bias: true,
            dropout: 0.0,
        }
    }
}

static CARD: Card = Card {
    name: "longformer",
    title: "Longformer",
    paper: "Beltagy, Peters, Cohan: Longformer: The Long-Document Transformer (2020), arXiv 2004.05150",
    equation: "local i: softmax over |i - j| <= window and j global, of q_i . k_j / sqrt(head_dim)\nglobal i: softmax over all j, of Q_g x_i . K_g x_j / sqrt(head_dim), values V_g x_j",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "Linear in time. The published attention_window is twice this window. No dilation. Its causal form has no global tokens and is the mixer `local`.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "window",
            doc: "neighbours seen on each side, in tokens",
        },
        Knob {
            name: "globals",
            doc: "global tokens at the start of each sequence; 0 leaves their projections out",
        },
        Knob {
            name: "bias",
            doc: "biases on all projections",
        },
        WEIGHT_DROPOUT,
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<LongformerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: LongformerConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        chance(&CARD, config.dropout)?;
        if config.window == 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "window must be at least 1".into(),
            });
        }
        let global = |name: &str| Linear::new(builder, name, dim, dim, config.bias);
        Ok(Box::new(Longformer {
            projections: Projections::new(builder, dim, config.heads, config.bias),
            global: (config.globals > 0).then(|| ["q_global", "k_global", "v_global"].map(global)),
            plans: Plans::default(),
            head_dim,
            config,
        }))
    },
};

struct Longformer {
    projections: Projections,
    plans: Plans,
    global: Option<[Linear; 3]>,
    head_dim: usize,
    config: LongformerConfig,
}

impl Longformer {
    fn plan(&self, time: usize) -> Plan {
        let LongformerConfig {
            window, globals, ..
        } = self.config;
        let keys = |_: usize, queries: Range<usize>| {
            let near = queries.start.saturating_sub(window)..time.min(queries.end + window);
            // Last, so that the keys of the window lie together in their tiles.
            vec![near.clone(), 0..globals.min(near.start)]
        };
        let sees = |_: usize, i: usize, j: usize| j < globals || i.abs_diff(j) <= window;
        Plan::new(time, 1, BLOCK, keys, sees)
    }

    /// Outputs of the global tokens, those of all sequences end to end: `[1, count, heads, head_dim]`.
    fn global(
        &self,
        x: &Tensor<3>,
        [q, k, v]: &[Linear; 3],
        offsets: &Arc<Vec<usize>>,
        context: &Context,
    ) -> Tensor<4> {
        let [batch, time, dim] = x.dims();
        let heads = self.config.heads;
        let project = |linear: &Linear, x: Tensor<3>| split_heads(linear.forward(x), heads);
        let x = x.clone().reshape([1, batch * time, dim]);
        let counts = offsets
            .windows(2)
            .map(|ends| self.config.globals.min(ends[1] - ends[0]));
        let counts: Vec<usize> = counts.collect();
        let places = offsets.iter().zip(&counts);
        let places = places.flat_map(|(from, count)| *from..from + count);
        let rows = x.clone().select(1, indices(places, &x.device()));
        let options = AttentionOptions {
            q_offsets: Some(Arc::new(cumulative(counts.iter().copied()))),
            k_offsets: Some(offsets.clone()),
            ..context.attention(self.config.dropout, 1)
        };
        flash_attention(
            project(q, rows),
            project(k, x.clone()),
            project(v, x),
            &options,
        )
    }
}

impl TokenMixer for Longformer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        if state.is_some() {
            return Err(RunError::CannotStream(CARD.name));
        }
        let [batch, time, _] = x.dims();
        let parts = self.projections.split(&x);
        let mut o = self
            .plans
            .attend(parts, context, self.config.dropout, |time| self.plan(time));
        if let Some(layers) = &self.global {
            let offsets = context.sequences(batch, time);
            let all = self.global(&x, layers, &offsets, context);
            let [_, _, heads, head_dim] = o.dims();
            let local = o.reshape([1, batch * time, heads, head_dim]);
            let (mut pieces, mut taken) = (Vec::new(), 0);
            for ends in offsets.windows(2) {
                let globals = self.config.globals.min(ends[1] - ends[0]);
                let rest = ends[0] + globals..ends[1];
                if globals > 0 {
                    pieces.push(all.clone().narrow(1, taken, globals));
                    taken += globals;
                }
                if !rest.is_empty() {
                    pieces.push(local.clone().narrow(1, rest.start, rest.len()));
                }
            }
            let mut joined = Tensor::cat(pieces, 1);
            if taken == batch * time {
                // No local result counts; every parameter keeps a gradient.
                joined = joined + local.mul_scalar(0.0);
            }
            o = joined.reshape([batch, time, heads, head_dim]);
        }
        Ok((self.projections.join(o), None))
    }

    fn cost(&self, time: usize) -> Cost {
        let heads = self.config.heads;
        let globals = self.config.globals.min(time);
        let mut cost = self.projections.cost(time);
        let plan = self.plans.of(time, || self.plan(time));
        cost.flops += plan.flops(heads, self.head_dim, self.head_dim);
        if let Some([q, k, v]) = &self.global {
            let rows = [0, globals];
            cost = cost + linear_cost(&[q], globals) + linear_cost(&[k, v], time);
            cost.flops += attention_flops(&rows, &[0, time], heads, self.head_dim, false, None);
        }
        cost
    }
}
