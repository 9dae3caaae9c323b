//! Linformer: keys and values of a whole sequence are projected to a fixed number of rows before attention.
//!
//! Wang et al. (2020), arXiv 2006.04768: `K' = Eᵀ K`, `V' = Fᵀ V` with E, F `[max_time, k]`, `o = softmax(q K'ᵀ / sqrt(d)) V'`. A
//! shorter sequence uses the first rows of E and F. The projection mixes the future in: not causal, no state.

use anyformer_ops::activation::softmax;
use anyformer_ops::{Init, Linear, Param, Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{each_sequence, split_heads};

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
            heads, k, max_time, ..
        } = self.config;
        if time > max_time {
            return Err(RunError::TooLong {
                mixer: CARD.name,
                limit: max_time,
                got: time,
            });
        }
        meter::add(self.mixing_flops(time) * batch as u64);
        let project = |linear: &Linear, table: &Param| {
            let rows = table.tensor::<2>().slice([0..time]).transpose();
            let rows = rows.unsqueeze::<3>().expand([batch, k, time]);
            let x = rows.matmul(linear.forward(x.clone()));
            split_heads(x, self.width / self.head_dim)
                .swap_dims(1, 2)
                .expand([batch, heads, k, self.head_dim])
        };
        let keys = project(&self.k_proj, &self.proj_k);
        let values = match (&self.v_proj, &self.proj_v) {
            (Some(linear), Some(table)) => project(linear, table),
            _ => keys.clone(),
        };
        let q = split_heads(self.q_proj.forward(x.clone()), heads).swap_dims(1, 2);
        let scores = q.matmul(keys.swap_dims(2, 3));
        let weights = softmax(scores.mul_scalar((self.head_dim as f32).powf(-0.5)));
        let o = weights.matmul(values).swap_dims(1, 2);
        Ok(self.o_proj.forward(o.reshape([batch, time, dim])))
    }

    fn mixing_flops(&self, time: usize) -> u64 {
        let projections = if self.config.share_kv { 1 } else { 2 };
        let (k, heads) = (self.config.k, self.config.heads);
        let per_token = 2 * projections * k * self.width + 4 * k * heads * self.head_dim;
        (time * per_token) as u64
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
        let linear = [
            Some(&self.q_proj),
            Some(&self.k_proj),
            self.v_proj.as_ref(),
            Some(&self.o_proj),
        ];
        let weights: usize = linear
            .iter()
            .flatten()
            .map(|part| part.weight.count())
            .sum();
        let tables = self.proj_k.count() + self.proj_v.as_ref().map_or(0, Param::count);
        let bias = self.o_proj.weight.shape()[0];
        Cost {
            params: (weights + tables + bias) as u64,
            flops: 2 * (weights * time) as u64 + self.mixing_flops(time),
            state_bytes: 0,
        }
    }
}
