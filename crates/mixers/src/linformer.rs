//! Linformer: keys and values of a whole sequence are projected to a fixed number of rows before attention.
//!
//! Wang et al. (2020), arXiv 2006.04768: `K' = Eᵀ K`, `V' = Fᵀ V` with E, F `[max_time, k]`, `o = softmax(q K'ᵀ / sqrt(d)) V'`. A
//! shorter sequence uses the first rows of E and F. The projection mixes the future in: not causal, no state.
//!
//! `Eᵀ (X W)` is computed as `(Eᵀ X) W`: keys and values of the whole length are never made.

use anyformer_ops::attention::{AttentionOptions, attention_flops, flash_attention};
use anyformer_ops::linear::across_rows;
use anyformer_ops::{Init, Linear, Param, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{each_sequence, join_heads, linear_cost, split_heads};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LinformerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Rows to which a sequence is projected.
    pub k: usize,
    /// Longest sequence.
    pub max_time: usize,
    /// Values are the projected keys.
    pub share_kv: bool,
    /// One key and value head for all query heads.
    pub one_kv_head: bool,
}

impl Default for LinformerConfig {
    fn default() -> Self {
        LinformerConfig {
            heads: 4,
            k: 64,
            max_time: 2048,
            share_kv: false,
            one_kv_head: false,
        }
    }
}

static CARD: Card = Card {
    name: "linformer",
    title: "Linformer",
    paper: "Wang, Li, Khabsa, Fang, Ma: Linformer: Self-Attention with Linear Complexity (2020), arXiv 2006.04768",
    equation: "K' = E^T K, V' = F^T V, E and F [max_time, k]\no_i = softmax(q_i K'^T / sqrt(head_dim)) V'",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "Linear in time with a fixed maximum length. Not causal and cannot be made so: the projection mixes all positions.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "k",
            doc: "rows to which a sequence is projected",
        },
        Knob {
            name: "max_time",
            doc: "longest sequence in tokens",
        },
        Knob {
            name: "share_kv",
            doc: "values are the projected keys",
        },
        Knob {
            name: "one_kv_head",
            doc: "one key and value head for all query heads",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<LinformerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: LinformerConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        if config.k == 0 || config.max_time == 0 {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: "k and max_time must be at least 1".into(),
            });
        }
        let width = if config.one_kv_head { head_dim } else { dim };
        let table = |name: &str| {
            let deviation = (config.k as f32).powf(-0.5);
            builder.param(name, &[config.max_time, config.k], Init::Normal(deviation))
        };
        let linear = |name: &str, output| Linear::new(builder, name, dim, output, false);
        Ok(Box::new(Linformer {
            q_proj: linear("q_proj", dim),
            k_proj: linear("k_proj", width),
            v_proj: (!config.share_kv).then(|| linear("v_proj", width)),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, true),
            proj_k: table("proj_k"),
            proj_v: (!config.share_kv).then(|| table("proj_v")),
            head_dim,
            width,
            config,
        }))
    },
};

struct Linformer {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Option<Linear>,
    o_proj: Linear,
    proj_k: Param,
    proj_v: Option<Param>,
    head_dim: usize,
    width: usize,
    config: LinformerConfig,
}

impl Linformer {
    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Result<Tensor<3>, RunError> {
        let [batch, time, dim] = x.dims();
        let LinformerConfig {
            heads, max_time, ..
        } = self.config;
        if time > max_time {
            return Err(RunError::TooLong {
                mixer: CARD.name,
                limit: max_time,
                got: time,
            });
        }
        // [batch, k, dim] of the tokens, then the layer over them.
        let project = |linear: &Linear, table: &Param| {
            let table = table.tensor::<2>();
            let table = match time == max_time {
                true => table,
                false => table.slice([0..time]),
            };
            let rows = (0..batch).map(|row| {
                let x = x.clone().narrow(0, row, 1).reshape([time, dim]);
                across_rows(table.clone(), x).unsqueeze::<3>()
            });
            let few = Tensor::cat(rows.collect(), 0);
            split_heads(linear.forward(few), self.width / self.head_dim)
        };
        let keys = project(&self.k_proj, &self.proj_k);
        let values = match (&self.v_proj, &self.proj_v) {
            (Some(linear), Some(table)) => project(linear, table),
            _ => keys.clone(),
        };
        let q = split_heads(self.q_proj.forward(x.clone()), heads);
        let o = flash_attention(q, keys, values, &AttentionOptions::default());
        Ok(self.o_proj.forward(join_heads(o)))
    }
}

impl TokenMixer for Linformer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| self.dense(x))
    }

    fn cost(&self, time: usize) -> Cost {
        let (k, heads) = (self.config.k, self.config.heads);
        let few = match &self.v_proj {
            Some(v_proj) => linear_cost(&[&self.k_proj, v_proj], k),
            None => linear_cost(&[&self.k_proj], k),
        };
        let tables = 1 + usize::from(self.proj_v.is_some());
        let dim = self.q_proj.weight.shape()[1];
        let attention = attention_flops(&[0, time], &[0, k], heads, self.head_dim, false, None);
        let own = Cost {
            params: (tables * self.proj_k.count()) as u64,
            flops: 2 * (tables * time * k * dim) as u64 + attention,
            state_bytes: 0,
        };
        linear_cost(&[&self.q_proj, &self.o_proj], time) + few + own
    }
}
