//! Longformer: a window of neighbours for every token, and a few global tokens that see and are seen by all.
//!
//! Beltagy et al. (2020), arXiv 2004.05150. Token i attends to `|i - j| <= window` and to the global tokens in one softmax;
//! a global token attends to all tokens through projections of its own (`q_global`, `k_global`, `v_global`). Global are the
//! first `globals` tokens of a sequence (a class token, a question).

use anyformer_ops::attention::{AttentionOptions, attention_flops, flash_attention};
use anyformer_ops::{Linear, Tensor};
use serde::{Deserialize, Serialize};

use crate::block_sparse::Plan;
use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{Projections, each_sequence, linear_cost, split_heads};

/// Most tokens of a block.
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
}

impl Default for LongformerConfig {
    fn default() -> Self {
        LongformerConfig {
            heads: 4,
            window: 64,
            globals: 1,
            bias: true,
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
            head_dim,
            config,
        }))
    },
};

struct Longformer {
    projections: Projections,
    global: Option<[Linear; 3]>,
    head_dim: usize,
    config: LongformerConfig,
}

impl Longformer {
    fn plan(&self, time: usize) -> Plan {
        let LongformerConfig {
            heads,
            window,
            globals,
            ..
        } = self.config;
        let block = window.min(BLOCK);
        Plan::new(block, heads, time, |_, query, blocks| {
            let first = (query * block).saturating_sub(window) / block;
            let last = ((query + 1) * block - 1 + window) / block;
            let near = first..(last + 1).min(blocks);
            let global = 0..globals.div_ceil(block).min(first);
            global.chain(near).collect()
        })
    }

    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let LongformerConfig {
            heads,
            window,
            globals,
            ..
        } = self.config;
        let parts = self.projections.split(&x);
        let sees = |i: usize, j: usize| j < globals || i.abs_diff(j) <= window;
        let mut o = self.plan(time).attend(parts, sees);
        if let Some([q, k, v]) = &self.global {
            let globals = globals.min(time);
            let project = |linear: &Linear, x: Tensor<3>| split_heads(linear.forward(x), heads);
            let all = flash_attention(
                project(q, x.clone().narrow(1, 0, globals)),
                project(k, x.clone()),
                project(v, x),
                &AttentionOptions::default(),
            );
            // Local results of the global rows are multiplied by zero, so that every parameter keeps a gradient.
            let local: Vec<f32> = (0..time)
                .map(|i| f32::from(u8::from(i >= globals)))
                .collect();
            let local = Tensor::<1>::from_data(local.as_slice(), &o.device());
            let rest = Tensor::zeros([batch, time - globals, heads, self.head_dim], &o.device());
            let all = match time > globals {
                true => Tensor::cat(vec![all, rest], 1),
                false => all,
            };
            o = o * local.reshape([1, time, 1, 1]) + all;
        }
        self.projections.join(o)
    }
}

impl TokenMixer for Longformer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| Ok(self.dense(x)))
    }

    fn cost(&self, time: usize) -> Cost {
        let heads = self.config.heads;
        let globals = self.config.globals.min(time);
        let mut cost = self.projections.cost(time);
        cost.flops += self.plan(time).flops(self.head_dim);
        if let Some([q, k, v]) = &self.global {
            let rows = [0, globals];
            cost = cost + linear_cost(&[q], globals) + linear_cost(&[k, v], time);
            cost.flops += attention_flops(&rows, &[0, time], heads, self.head_dim, false, None);
        }
        cost
    }
}
