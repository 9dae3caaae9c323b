//! The frame shared by retention and GLA: projections, a recurrence with decay, a norm per head, a swish gate.
//!
//! `y = W_o (norm_head(o) ⊙ silu(W_g x))` where `o` comes from the chunkwise recurrence. The two mixers differ in the
//! decay and in what is done to queries and keys.

use anyformer_ops::norm::gated_rms_norm;
use anyformer_ops::recurrence::{
    Gate, RecurrenceOptions, Write, linear_recurrence, recurrence_flops,
};
use anyformer_ops::{Builder, Init, Linear, Param, Tensor};

use crate::card::{Card, ConfigError};
use crate::mixer::{Context, Cost, State};
use crate::parts::{join_heads, split_heads};

pub(crate) struct Gated {
    pub q_proj: Linear,
    pub k_proj: Linear,
    pub v_proj: Linear,
    pub g_proj: Linear,
    pub o_proj: Linear,
    g_norm: Param,
    pub heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    norm_eps: f32,
}

impl Gated {
    pub(crate) fn new(
        card: &'static Card,
        dim: usize,
        heads: usize,
        [expand_k, expand_v]: [f64; 2],
        norm_eps: f64,
        builder: &Builder,
    ) -> Result<Self, ConfigError> {
        let width = |expand: f64| (dim as f64 * expand) as usize;
        let (keys, values) = (width(expand_k), width(expand_v));
        if heads == 0 || keys == 0 || values == 0 || keys % heads != 0 || values % heads != 0 {
            return Err(ConfigError::Impossible {
                mixer: card.name,
                message: format!(
                    "dim {dim} gives {keys} key and {values} value features (expand_k {expand_k}, expand_v {expand_v}), not both divisible by heads {heads}; change heads or dim"
                ),
            });
        }
        let linear = |name: &str, output: usize| Linear::new(builder, name, dim, output, false);
        Ok(Gated {
            q_proj: linear("q_proj", keys),
            k_proj: linear("k_proj", keys),
            v_proj: linear("v_proj", values),
            g_proj: linear("g_proj", values),
            o_proj: Linear::residual(builder, "o_proj", values, dim, false),
            g_norm: builder
                .at("g_norm")
                .param_no_decay("weight", &[values / heads], Init::Ones),
            heads,
            key_dim: keys / heads,
            value_dim: values / heads,
            norm_eps: norm_eps as f32,
        })
    }

    pub(crate) fn queries_keys(&self, x: &Tensor<3>) -> (Tensor<4>, Tensor<4>) {
        let project = |linear: &Linear| split_heads(linear.forward(x.clone()), self.heads);
        (project(&self.q_proj), project(&self.k_proj))
    }

    pub(crate) fn finish(
        &self,
        x: Tensor<3>,
        [q, k]: [Tensor<4>; 2],
        gate: Gate,
        context: &Context,
        state: Option<&State>,
    ) -> (Tensor<3>, Option<State>) {
        let [batch, time, _] = x.dims();
        let v = split_heads(self.v_proj.forward(x.clone()), self.heads);
        let options = RecurrenceOptions {
            scale: (self.key_dim as f32).powf(-0.5),
            offsets: context.offsets.clone(),
            ..RecurrenceOptions::default()
        };
        let initial = state.map(|state| state.get("recurrent"));
        let (o, last) = linear_recurrence(q, k, v, gate, Write::Additive, initial, &options);
        let gate = split_heads(self.g_proj.forward(x), self.heads);
        let y = gated_rms_norm(
            o,
            gate,
            self.g_norm.tensor::<1>(),
            self.norm_eps,
            false,
            self.value_dim,
        );
        let y = self.o_proj.forward(join_heads(y));
        let next = context
            .keep_state
            .then(|| State::new(context.times_after(batch, time, state)).with("recurrent", last));
        (y, next)
    }

    pub(crate) fn cost(&self, time: usize) -> Cost {
        let parts = [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.g_proj,
            &self.o_proj,
        ];
        let weights: usize = parts.iter().map(|part| part.weight.count()).sum();
        Cost {
            params: (weights + self.value_dim) as u64,
            flops: 2 * (weights * time) as u64
                + recurrence_flops(time, self.heads, self.key_dim, self.value_dim, false),
            state_bytes: 4 * (self.heads * self.key_dim * self.value_dim) as u64,
        }
    }
}
