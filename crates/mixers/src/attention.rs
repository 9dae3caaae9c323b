//! Softmax attention: multi-head, grouped-query, multi-query and sparse-query in one mixer.
//!
//! Vaswani et al. (2017), arXiv 1706.03762; grouped queries: Ainslie et al. (2023), arXiv 2305.13245; fewer query heads
//! than `dim / head_dim`: Filipek, Sparse Query Attention (2025), arXiv 2510.01817. Rotary positions: Su et al. (2021),
//! arXiv 2104.09864, half-split layout (stretched: [`crate::rotary`]); a norm per head on queries and keys: Henry et al.
//! (2020), arXiv 2010.04245, RMS as in Qwen3; linear biases: Press et al. (2022), arXiv 2108.12409.
//!
//! Shapes: q `[batch, time, query_heads, head_dim]`, k and v `[batch, time, kv_heads, head_dim]`; query head `i` reads
//! key head `i / (query_heads / kv_heads)`. With fewer query heads than key heads (reverse SQA) the query heads are
//! repeated as `q0 q1 … q0 q1 …`. The state is the cache of keys (rotated) and values, `[tokens, kv_heads, head_dim]`,
//! sequences end to end; a window keeps the last `window - 1` of each, and its sinks under names of their own.

mod heads;
mod knobs;
mod paged;
mod rows;
mod sinks;

use std::sync::Arc;

use anyformer_ops::adapter::{is_tracked, on_cpu};
use anyformer_ops::attention::{AttentionOptions, attention_flops, flash_attention};
use anyformer_ops::cache::Element;
use anyformer_ops::lengths::cumulative;
use anyformer_ops::{Builder, Linear, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{
    Card, ConfigError, Direction, Preset, TokenEntry, chance, head_dim, read, resolve,
};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{HeadNorm, join_heads, linear_cost, split_heads};
pub use crate::positions::{Position, Terms};
use crate::positions::{Scheme, Shape, XPOS_LIMIT, xpos};
use crate::rotary::{RopeScaling, Rotary};
pub use heads::Variant;
pub use paged::Kept;
use rows::{behind, last};

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct AttentionConfig {
    /// Nominal heads; `head_dim` is `dim / heads` unless given.
    pub heads: usize,
    /// Query heads; 0 takes `heads`.
    pub query_heads: usize,
    /// Key and value heads; 0 takes the query heads.
    pub kv_heads: usize,
    /// Features per head; 0 takes `dim / heads`.
    pub head_dim: usize,
    /// A published choice of head counts instead of the two above.
    pub variant: Variant,
    /// Look back only.
    pub causal: bool,
    /// Keys nearer than this many tokens, the token itself counted; 0 for all.
    pub window: usize,
    /// First tokens that are seen beside the window, however long ago they were.
    pub sinks: usize,
    /// How positions are known.
    pub position: Position,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Features of a head that turn, from the first on; 0 turns all.
    pub rope_dim: usize,
    /// How the rotary frequencies are stretched to longer texts.
    pub rope_scaling: RopeScaling,
    /// Buckets of `t5`, and of `disentangled` on each side; 0 there: none, a vector for each distance.
    pub position_buckets: usize,
    /// Tokens from which on `t5` and `disentangled` have one bucket.
    pub position_distance: usize,
    /// Terms of `disentangled`.
    pub position_terms: Terms,
    /// Whether `disentangled` projects places by the layer's own projections of queries and keys.
    pub position_shared: bool,
    /// Whether the vectors of `disentangled` pass a layer norm first.
    pub position_norm: bool,
    /// Tokens that `rerope` and `self_extend` treat as rotary positions do.
    pub position_window: usize,
    /// How much slower positions go beyond; 0 with `rerope`: they stop.
    pub position_group: usize,
    /// Biases on all four projections.
    pub bias: bool,
    /// Biases on queries, keys and values, whatever `bias` says.
    pub qkv_bias: bool,
    /// An RMS norm per head on queries and keys, before they turn.
    pub qk_norm: bool,
    /// Added to the mean square in that norm, or the variance in that of places.
    pub norm_eps: f64,
    /// How keys and values are kept from token to token: in bf16 they take half the memory.
    pub cache: Kept,
    /// Chance with which a weight is dropped in training.
    pub dropout: f64,
}

impl Default for AttentionConfig {
    fn default() -> Self {
        AttentionConfig {
            heads: 4,
            query_heads: 0,
            kv_heads: 0,
            head_dim: 0,
            variant: Variant::Explicit,
            causal: true,
            window: 0,
            sinks: 0,
            position: Position::Rope,
            rope_base: 10_000.0,
            rope_dim: 0,
            rope_scaling: RopeScaling::None,
            position_buckets: 32,
            position_distance: 128,
            position_terms: Terms::Both,
            position_shared: true,
            position_norm: false,
            position_window: 512,
            position_group: 0,
            bias: false,
            qkv_bias: false,
            qk_norm: false,
            norm_eps: 1e-6,
            cache: Kept::F32,
            dropout: 0.0,
        }
    }
}

pub(crate) use knobs::KNOBS;

static CARD: Card = Card {
    name: "attention",
    title: "Softmax attention (MHA, GQA, MQA, SQA)",
    paper: "Vaswani et al.: Attention Is All You Need (2017), arXiv 1706.03762; Ainslie et al.: GQA (2023), arXiv 2305.13245; Filipek: Sparse Query Attention (2025), arXiv 2510.01817",
    equation: "o_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim) + mask) v_j",
    direction: Direction::Either,
    streams: true,
    state: "grows with time: keys and values of every token",
    notes: "Exact, computed in blocks with memory linear in time. Time is quadratic; the state is what the other mixers try to shrink. Fewer kv_heads shrink the state, fewer query_heads the time.",
    knobs: KNOBS,
    presets: &[Preset {
        name: "sqat-mm",
        model: r#"{"dim":256,"layers":8,"mixers":[{"name":"attention","heads":16,"variant":"sqa"}],"channel":{"name":"swiglu","hidden":768},"reads":{"tokens":{"vocab":10000}},"gives":{"next_token":{"tied":false}},"max_time":1024}"#,
    }],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<AttentionConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: AttentionConfig = read(&CARD, options)?;
        Ok(Box::new(Attention::new(&CARD, dim, &config, builder)?))
    },
};

/// The built mixer.
pub(crate) struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    causal: bool,
    window: Option<usize>,
    sinks: usize,
    rotary: Option<Rotary>,
    decays: bool,
    scheme: Option<Scheme>,
    qk_norm: Option<[HeadNorm; 2]>,
    scale: Option<f32>,
    slopes: Option<Arc<Vec<f32>>>,
    cache: Element,
    dropout: f64,
}

impl Attention {
    pub(crate) fn new(
        card: &'static Card,
        dim: usize,
        config: &AttentionConfig,
        builder: &Builder,
    ) -> Result<Self, ConfigError> {
        let impossible = |message: String| {
            Err(ConfigError::Impossible {
                mixer: card.name,
                message,
            })
        };
        let head_dim = match config.head_dim {
            0 => head_dim(card, dim, config.heads)?,
            given => given,
        };
        let (query_heads, kv_heads) = heads::counts(config);
        let (large, small) = (query_heads.max(kv_heads), query_heads.min(kv_heads));
        if small == 0 || large % small != 0 {
            return impossible(format!(
                "{query_heads} query heads and {kv_heads} kv_heads: one must divide the other"
            ));
        }
        let turned = match config.rope_dim {
            0 => head_dim,
            given => given,
        };
        if turned > head_dim {
            return impossible(format!(
                "rope_dim {turned} is more than the head_dim {head_dim}"
            ));
        }
        let rotary = match config.position {
            Position::Rope | Position::Xpos => {
                match Rotary::new(config.rope_base, turned, config.rope_scaling.clone()) {
                    Ok(rotary) => Some(rotary),
                    Err(message) => return impossible(message),
                }
            }
            _ => None,
        };
        let score_factor = rotary.as_ref().map_or(1.0, Rotary::score_factor);
        if score_factor != 1.0 && turned != head_dim {
            return impossible(format!(
                "yarn multiplies turned features only, which needs rope_dim {turned} to be head_dim {head_dim}"
            ));
        }
        let decays = config.position == Position::Xpos;
        if decays && (!config.causal || turned != head_dim) {
            return impossible("xpos looks back only and turns whole heads: rope_dim 0".into());
        }
        let shape = Shape {
            heads: large,
            head_dim,
            causal: config.causal,
            window: (config.window > 0).then_some(config.window),
            buckets: config.position_buckets,
            distance: config.position_distance,
            near: config.position_window,
            group: config.position_group,
            base: config.rope_base,
            dim,
            square: query_heads == kv_heads,
            terms: config.position_terms,
            shared: config.position_shared,
            norm: config.position_norm,
            eps: config.norm_eps as f32,
            bias: config.bias || config.qkv_bias,
            builder,
        };
        let scheme = match Scheme::new(config.position, &shape) {
            Ok(scheme) => scheme,
            Err(message) => return impossible(message),
        };
        let plain = matches!(config.position, Position::Rope | Position::None);
        if config.sinks > 0 && !(config.causal && config.window > 0 && plain) {
            return impossible(
                "sinks stand beside a window that looks back, with rotary positions or none: set window and causal = true"
                    .into(),
            );
        }
        let qk_norm = config.qk_norm.then(|| {
            ["q_norm", "k_norm"]
                .map(|name| HeadNorm::new(builder, name, head_dim, config.norm_eps as f32))
        });
        let needs_matrix = matches!(
            config.position,
            Position::Fire | Position::Disentangled | Position::Rerope | Position::SelfExtend
        );
        if config.dropout > 0.0 && needs_matrix {
            return impossible(
                "dropout is not for positions that need the whole matrix of scores; take others, or dropout 0".into(),
            );
        }
        let cache = match config.cache {
            Kept::F32 => Element::F32,
            Kept::Bf16 if scheme.is_some() => {
                return impossible("cache bf16 needs positions that are not in the scores".into());
            }
            Kept::Bf16 => Element::Bf16,
        };
        let qkv_bias = shape.bias;
        let scale = match &scheme {
            Some(scheme) => scheme.scale(head_dim),
            None if score_factor != 1.0 => Some((score_factor / (head_dim as f64).sqrt()) as f32),
            None => None,
        };
        let slopes = (config.position == Position::Alibi).then(|| Arc::new(alibi_slopes(large)));
        Ok(Attention {
            q_proj: Linear::new(builder, "q_proj", dim, query_heads * head_dim, qkv_bias),
            k_proj: Linear::new(builder, "k_proj", dim, kv_heads * head_dim, qkv_bias),
            v_proj: Linear::new(builder, "v_proj", dim, kv_heads * head_dim, qkv_bias),
            o_proj: Linear::residual(builder, "o_proj", large * head_dim, dim, config.bias),
            query_heads,
            kv_heads,
            head_dim,
            causal: config.causal,
            window: (config.window > 0).then_some(config.window),
            sinks: config.sinks,
            rotary,
            decays,
            scheme,
            qk_norm,
            scale,
            slopes,
            cache,
            dropout: chance(card, config.dropout)?,
        })
    }

    fn attend(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        options: &AttentionOptions,
    ) -> Tensor<4> {
        match &self.scheme {
            Some(scheme) => scheme.attend([&self.q_proj, &self.k_proj], q, k, v, options),
            None => flash_attention(q, k, v, options),
        }
    }

    /// Heads of the output: the larger of the two counts.
    fn heads(&self) -> usize {
        self.query_heads.max(self.kv_heads)
    }

    /// Tokens of a sequence that the cache keeps for the window after `time` tokens; at least one, so that no tensor is empty.
    fn kept_of_window(&self, time: usize) -> usize {
        self.window
            .map_or(time, |window| time.min((window - 1).max(1)))
    }
}

/// Slopes of linear biases for `heads` heads: `2^(-8h/n)`, and between powers of two the odd slopes of the next power.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let of = |count: usize, h: usize| 2f64.powf(-8.0 * h as f64 / count as f64) as f32;
    let power = if heads.is_power_of_two() {
        heads
    } else {
        heads.next_power_of_two() / 2
    };
    let first = (1..=power).map(|h| of(power, h));
    let rest = (0..heads - power).map(|h| of(2 * power, 2 * h + 1));
    first.chain(rest).collect()
}

impl TokenMixer for Attention {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        if state.is_some() && !self.causal {
            return Err(RunError::CannotStream("bidirectional attention"));
        }
        let [batch, time, _] = x.dims();
        let mut q = split_heads(self.q_proj.forward(x.clone()), self.query_heads);
        let mut k = split_heads(self.k_proj.forward(x.clone()), self.kv_heads);
        let v = split_heads(self.v_proj.forward(x), self.kv_heads);
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            (q, k) = (q_norm.forward(q), k_norm.forward(k));
        }
        // Queries as they stand to the sinks.
        let mut far = (self.sinks > 0).then(|| q.clone());
        if let Some(rotary) = &self.rotary {
            let positions = context.positions(batch, time, state);
            if let Some(far) = &mut far {
                let places = self.sink_positions(&positions);
                let sequences = context.sequences(batch, time);
                [*far] = rotary.turn([far.clone()], &places, &sequences);
            }
            [q, k] = rotary.turn([q, k], &positions, &context.sequences(batch, time));
            if self.decays {
                if let Some(far) = positions.iter().find(|at| **at >= XPOS_LIMIT) {
                    return Err(RunError::TooLong {
                        mixer: "attention with position xpos",
                        limit: XPOS_LIMIT,
                        got: far + 1,
                    });
                }
                [q, k] = xpos(q, k, &positions);
            }
        }
        if self.query_heads < self.kv_heads {
            let repeated = |x: Tensor<4>| x.repeat_dim(2, self.kv_heads / self.query_heads);
            (q, far) = (repeated(q), far.map(repeated));
        }
        let mut options = AttentionOptions {
            causal: self.causal,
            window: self.window,
            alibi: self.slopes.clone(),
            scale: self.scale,
            q_offsets: context.offsets.clone(),
            k_offsets: context.offsets.clone(),
            ..context.attention(self.dropout, 0)
        };
        if let Some(far) = far {
            let all = [q, far, k, v];
            let (y, next) = self.with_sinks(all, &options, context, state);
            return Ok((self.o_proj.forward(join_heads(y)), next));
        }
        let streams = self.causal && (context.keep_state || state.is_some());
        if !streams {
            let y = self.attend(q, k, v, &options);
            return Ok((self.o_proj.forward(join_heads(y)), None));
        }
        if self.scheme.is_none() && on_cpu(&q) && !is_tracked(&q) {
            let (y, next) = self.paged([q, k, v], options, context, state);
            return Ok((self.o_proj.forward(join_heads(y)), next));
        }
        let new = context.sequences(batch, time);
        let flat = |x: Tensor<4>| {
            let [_, _, heads, head_dim] = x.dims();
            x.reshape([1, batch * time, heads, head_dim])
        };
        let (mut k, mut v) = (flat(k), flat(v));
        let mut all = new.clone();
        if let Some(state) = state {
            let held = cumulative(state.times.iter().map(|time| self.kept(*time)));
            all = Arc::new(held.iter().zip(new.iter()).map(|(a, b)| a + b).collect());
            k = behind(state.get("k"), k, &held, &new);
            v = behind(state.get("v"), v, &held, &new);
        }
        options.q_offsets = Some(new);
        options.k_offsets = Some(all.clone());
        let y = self.attend(flat(q), k.clone(), v.clone(), &options);
        let y = y.reshape([batch, time, self.heads() * self.head_dim]);
        let y = self.o_proj.forward(y);
        let next = context.keep_state.then(|| {
            let times = context.times_after(batch, time, state);
            let held: Vec<usize> = times.iter().map(|time| self.kept(*time)).collect();
            State::new(times)
                .with_rows("k", last(k, &all, &held), held.clone())
                .with_rows("v", last(v, &all, &held), held)
        });
        Ok((y, next))
    }

    fn cost(&self, time: usize) -> Cost {
        let projections = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        let linear = linear_cost(&projections, time);
        let norms = self.qk_norm.iter().flatten().map(HeadNorm::count);
        let sinks = time.min(self.sinks);
        let attention = attention_flops(
            &[0, time],
            &[0, time - sinks],
            self.heads(),
            self.head_dim,
            self.causal,
            self.window,
        );
        // Each query sees the sinks that it does not stand before.
        let to_sinks = sinks * (sinks + 1) / 2 + sinks * (time - sinks);
        let attention = attention + (4 * to_sinks * self.heads() * self.head_dim) as u64;
        let scheme = self.scheme.as_ref();
        let places = scheme.map_or(0, |scheme| scheme.flops(time, self.head_dim));
        let cache = match self.causal {
            true => 2 * self.kept(time) * self.kv_heads * self.head_dim,
            false => 0,
        };
        Cost {
            params: linear.params + (norms.sum::<usize>() + scheme.map_or(0, Scheme::count)) as u64,
            flops: linear.flops + attention + places,
            state_bytes: (self.cache.bytes() * cache) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_between_powers_of_two_take_every_other_one_of_the_next() {
        assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
        let six = alibi_slopes(6);
        assert_eq!(six[4], 0.5);
        assert_eq!(six[5], 0.125);
    }
}
