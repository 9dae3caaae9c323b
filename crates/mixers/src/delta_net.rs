//! DeltaNet: each write first erases what the state already returns for its key.
//!
//! Yang et al. (2024), arXiv 2406.06484. Per head `S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})`, `o_t = q_t S_t`,
//! computed in chunks by a triangular solve. Queries, keys and values pass a short convolution with SiLU; queries and
//! keys are then normalised per head. State `[sequences, heads, head_dim, head_dim]` and the last inputs of the
//! convolutions.

use anyformer_ops::activation::sigmoid;
use anyformer_ops::norm::l2_normalise;
use anyformer_ops::recurrence::{
    Gate, RecurrenceOptions, Write, linear_recurrence, recurrence_flops,
};
use anyformer_ops::{Linear, Tensor};
use serde::{Deserialize, Serialize};

use crate::card::{Card, Direction, Knob, Preset, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{HeadNorm, join_heads, split_heads};
use crate::short::ShortProjection;

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct DeltaNetConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Width of the short convolutions in tokens; 0 leaves them out (SiLU stays).
    pub conv_size: usize,
    /// Let beta reach 2, so that a write can turn the state's sign along a key.
    pub allow_neg_eigval: bool,
    /// Added to the mean square in the norm per head.
    pub norm_eps: f64,
}

impl Default for DeltaNetConfig {
    fn default() -> Self {
        DeltaNetConfig {
            heads: 4,
            conv_size: 4,
            allow_neg_eigval: false,
            norm_eps: 1e-5,
        }
    }
}

static CARD: Card = Card {
    name: "delta_net",
    title: "DeltaNet",
    paper: "Yang, Wang, Zhang, Shen, Kim: Parallelizing Linear Transformers with the Delta Rule over Sequence Length (NeurIPS 2024), arXiv 2406.06484",
    equation: "S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1}), beta_t = sigmoid(w_b . x_t)\no_t = q_t S_t / sqrt(head_dim)\nq, k = l2norm(silu(conv(W x))), v = silu(conv(W x))\ny = W_o norm_head(o)",
    direction: Direction::Causal,
    streams: true,
    state: "constant",
    notes: "The strongest recall of the linear mixers: a key is overwritten, not summed. Forgets nothing on its own; see gated_delta_net.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "conv_size",
            doc: "width of the short convolutions in tokens; 0 leaves them out",
        },
        Knob {
            name: "allow_neg_eigval",
            doc: "let beta reach 2",
        },
        Knob {
            name: "norm_eps",
            doc: "added to the mean square in the norm per head",
        },
    ],
    presets: &[
        Preset {
            name: "340m",
            model: r#"{"dim":1024,"layers":24,"mixers":[{"name":"delta_net","heads":8}],"channel":{"name":"swiglu","hidden":2816},"norm_eps":1e-6,"initializer_range":0.02,"scale_residual":false,"reads":{"tokens":{"vocab":32000}},"gives":{"next_token":{"tied":false}}}"#,
        },
        Preset {
            name: "1.3b",
            model: r#"{"dim":2048,"layers":24,"mixers":[{"name":"delta_net","heads":16}],"channel":{"name":"swiglu","hidden":5632},"norm_eps":1e-6,"initializer_range":0.02,"scale_residual":false,"reads":{"tokens":{"vocab":32000}},"gives":{"next_token":{"tied":false}}}"#,
        },
    ],
};

/// Epsilon under the square root of the norm of queries and keys.
pub(crate) const L2_EPS: f32 = 1e-6;

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<DeltaNetConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: DeltaNetConfig = read(&CARD, options)?;
        let head_dim = head_dim(&CARD, dim, config.heads)?;
        let short = |name| ShortProjection::new(builder, name, dim, dim, config.conv_size);
        Ok(Box::new(DeltaNet {
            q: short("q"),
            k: short("k"),
            v: short("v"),
            b_proj: Linear::new(builder, "b_proj", dim, config.heads, false),
            o_norm: HeadNorm::new(builder, "o_norm", head_dim, config.norm_eps as f32),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, false),
            head_dim,
            config,
        }))
    },
};

struct DeltaNet {
    q: ShortProjection,
    k: ShortProjection,
    v: ShortProjection,
    b_proj: Linear,
    o_norm: HeadNorm,
    o_proj: Linear,
    head_dim: usize,
    config: DeltaNetConfig,
}

impl TokenMixer for DeltaNet {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let [batch, time, _] = x.dims();
        let heads = self.config.heads;
        let mut next = State::new(context.times_after(batch, time, state));
        let mut project = |part: &ShortProjection| {
            let (y, held) = part.forward(x.clone(), context, state);
            if let Some((name, held)) = held {
                next = std::mem::take(&mut next).with(name, held);
            }
            split_heads(y, heads)
        };
        let (q, k, v) = (project(&self.q), project(&self.k), project(&self.v));
        let (q, k) = (l2_normalise(q, L2_EPS), l2_normalise(k, L2_EPS));
        let mut beta = sigmoid(self.b_proj.forward(x));
        if self.config.allow_neg_eigval {
            beta = beta.mul_scalar(2.0);
        }
        let options = RecurrenceOptions {
            scale: (self.head_dim as f32).powf(-0.5),
            offsets: context.offsets.clone(),
            ..RecurrenceOptions::default()
        };
        let initial = state.map(|state| state.get("recurrent"));
        let (o, last) =
            linear_recurrence(q, k, v, Gate::None, Write::Delta(beta), initial, &options);
        let y = self.o_proj.forward(join_heads(self.o_norm.forward(o)));
        Ok((y, context.keep_state.then(|| next.with("recurrent", last))))
    }

    fn cost(&self, time: usize) -> Cost {
        let (heads, head_dim) = (self.config.heads, self.head_dim);
        let weights = self.b_proj.weight.count() + self.o_proj.weight.count();
        let own = Cost {
            params: (weights + self.o_norm.count()) as u64,
            flops: 2 * (weights * time) as u64
                + recurrence_flops(time, heads, head_dim, head_dim, true),
            state_bytes: 4 * (heads * head_dim * head_dim) as u64,
        };
        [&self.q, &self.k, &self.v]
            .iter()
            .fold(own, |cost, part| cost + part.cost(time))
    }
}
