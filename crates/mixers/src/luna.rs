//! Luna: attention packed into a short learned sequence and unpacked from it.
//!
//! Ma et al. (2021), arXiv 2106.01540: `P' = Attn(p, x)` with the `length` rows p as queries, then `y = Attn(x, P')`; both
//! are softmax attentions, the first without an output layer. Here p is a parameter of each layer; in the paper the packed
//! rows of one layer are the p of the next, which a mixer in a block of its own cannot hand on.

use std::sync::Arc;

use anyformer_ops::attention::{AttentionOptions, attention_flops, flash_attention};
use anyformer_ops::{Init, Linear, Param, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{
    Card, ConfigError, Direction, Knob, TokenEntry, WEIGHT_DROPOUT, chance, head_dim, read, resolve,
};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{join_heads, linear_cost, split_heads};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LunaConfig {
    /// Heads of both attentions; divides `dim`.
    pub heads: usize,
    /// Rows of the packed sequence.
    pub length: usize,
    /// Biases on all projections.
    pub bias: bool,
    /// Chance with which a weight of attention is dropped in training.
    pub dropout: f64,
}

impl Default for LunaConfig {
    fn default() -> Self {
        LunaConfig {
            heads: 4,
            length: 16,
            bias: true,
            dropout: 0.0,
        }
    }
}

static CARD: Card = Card {
    name: "luna",
    title: "Luna (linear unified nested attention)",
    paper: "Ma et al.: Luna: Linear Unified Nested Attention (NeurIPS 2021), arXiv 2106.01540",
    equation: "P' = softmax(Q_p p (K_p x)^T / sqrt(head_dim)) V_p x\ny = softmax(Q x (K P')^T / sqrt(head_dim)) V P'",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "Linear in time. The packed rows start afresh in every layer from a learned p, where the paper hands them on; keys and values have projections of their own (the released tie_kv shares them). Packing sees the whole sequence: not causal, no state; the paper's causal variant with another activation is not here.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads of both attentions; divides dim",
        },
        Knob {
            name: "length",
            doc: "rows of the packed sequence",
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
    resolve: |options| resolve::<LunaConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: LunaConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        chance(&CARD, config.dropout)?;
        if config.length == 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "length must be at least 1".into(),
            });
        }
        let linear = |name: &str| Linear::new(builder, name, dim, dim, config.bias);
        Ok(Box::new(Luna {
            packed: builder.param("p", &[config.length, dim], Init::Normal(1.0)),
            pack: ["pack_q_proj", "pack_k_proj", "pack_v_proj"].map(linear),
            unpack: ["q_proj", "k_proj", "v_proj"].map(linear),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, config.bias),
            head_dim,
            config,
        }))
    },
};

struct Luna {
    packed: Param,
    pack: [Linear; 3],
    unpack: [Linear; 3],
    o_proj: Linear,
    head_dim: usize,
    config: LunaConfig,
}

impl TokenMixer for Luna {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        if state.is_some() {
            return Err(RunError::CannotStream(CARD.name));
        }
        let [batch, time, dim] = x.dims();
        let LunaConfig { heads, length, .. } = self.config;
        // All sequences end to end, whether they come packed or as a batch.
        let tokens = context.sequences(batch, time);
        let rows = Arc::new((0..tokens.len()).map(|row| row * length).collect());
        let x = x.reshape([1, batch * time, dim]);
        let heads_of =
            |linear: &Linear, x: &Tensor<3>| split_heads(linear.forward(x.clone()), heads);
        let attend = |[q, k, v]: [Tensor<4>; 3],
                      q_offsets: &Arc<Vec<usize>>,
                      k_offsets: &Arc<Vec<usize>>,
                      part: u32| {
            let options = AttentionOptions {
                q_offsets: Some(q_offsets.clone()),
                k_offsets: Some(k_offsets.clone()),
                ..context.attention(self.config.dropout, part)
            };
            join_heads(flash_attention(q, k, v, &options))
        };
        let [q, k, v] = &self.pack;
        let p: Tensor<3> = self.packed.tensor::<2>().unsqueeze();
        let queries = heads_of(q, &p).repeat_dim(1, tokens.len() - 1);
        let packed = attend(
            [queries, heads_of(k, &x), heads_of(v, &x)],
            &rows,
            &tokens,
            0,
        );
        let [q, k, v] = &self.unpack;
        let parts = [heads_of(q, &x), heads_of(k, &packed), heads_of(v, &packed)];
        let y = self.o_proj.forward(attend(parts, &tokens, &rows, 1));
        Ok((y.reshape([batch, time, dim]), None))
    }

    fn cost(&self, time: usize) -> Cost {
        let (length, heads) = (self.config.length, self.config.heads);
        let ([pack_q, pack_k, pack_v], [q, k, v]) = (&self.pack, &self.unpack);
        let mut cost = linear_cost(&[pack_k, pack_v, q, &self.o_proj], time)
            + linear_cost(&[pack_q, k, v], length);
        cost.params += self.packed.count() as u64;
        for (queries, keys) in [(length, time), (time, length)] {
            let (queries, keys) = ([0, queries], [0, keys]);
            cost.flops += attention_flops(&queries, &keys, heads, self.head_dim, false, None);
        }
        cost
    }
}
