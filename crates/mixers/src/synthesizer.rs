//! Synthesizer: attention weights that no pair of tokens is compared for.
//!
//! Tay et al. (2021), arXiv 2005.00743: `y = softmax(B) V`, where the logits B `[heads, time, time]` are
//! - dense: `B_i = W2 relu(W1 x_i + b1) + b2`, one score per position, from the token alone;
//! - random: a trained table `[max_time, max_time]`;
//! - factorised_dense: `B_ij = A_i[j mod a] C_i[j div a]`, A and C as in dense with a and `max_time / a` scores;
//! - factorised_random: `R1 R2ᵀ`, two tables `[max_time, rank]`.

use anyformer_ops::activation::{relu, softmax};
use anyformer_ops::{Builder, Init, Linear, Param, Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, head_dim, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::{each_sequence, join_heads, linear_cost, split_heads};

/// Where the logits come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// The token alone.
    #[default]
    Dense,
    /// A trained table.
    Random,
    /// Products of two short rows from the token alone.
    FactorisedDense,
    /// A trained table of low rank.
    FactorisedRandom,
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct SynthesizerConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Where the logits come from.
    pub variant: Variant,
    /// Longest sequence in tokens.
    pub max_time: usize,
    /// Rank of factorised_random; first factor of factorised_dense, which divides `max_time`.
    pub rank: usize,
    /// Look back only.
    pub causal: bool,
}

impl Default for SynthesizerConfig {
    fn default() -> Self {
        SynthesizerConfig {
            heads: 4,
            variant: Variant::Dense,
            max_time: 1024,
            rank: 8,
            causal: true,
        }
    }
}

static CARD: Card = Card {
    name: "synthesizer",
    title: "Synthesizer (dense, random, factorised)",
    paper: "Tay et al.: Synthesizer: Rethinking Self-Attention in Transformer Models (ICML 2021), arXiv 2005.00743",
    equation: "y = softmax(B) V\ndense: B_i = W2 relu(W1 x_i + b1) + b2\nrandom: B = R\nfactorised_dense: B_ij = A_i[j mod a] C_i[j div a]\nfactorised_random: B = R1 R2^T",
    direction: Direction::Either,
    streams: false,
    state: "none",
    notes: "Quadratic in time, without products of queries and keys. Positions are addressed, not contents: recall of pairs is out of reach of the random forms. Tables are as long as max_time, and random holds heads max_time^2 parameters. The causal form could be decoded with a cache of values; it is not offered.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "variant",
            doc: "dense, random, factorised_dense or factorised_random",
        },
        Knob {
            name: "max_time",
            doc: "longest sequence in tokens",
        },
        Knob {
            name: "rank",
            doc: "rank of factorised_random; first factor of factorised_dense, which divides max_time",
        },
        Knob {
            name: "causal",
            doc: "look back only",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<SynthesizerConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: SynthesizerConfig = read(&CARD, options)?;
        head_dim(&CARD, dim, config.heads)?;
        let (max_time, rank) = (config.max_time, config.rank);
        if max_time == 0 || rank == 0 {
            return Err(impossible("max_time and rank must be at least 1".into()));
        }
        let table = |name: &str, columns: usize| {
            let shape = [config.heads, max_time, columns];
            let gain = Init::Xavier {
                fan_in: columns,
                fan_out: max_time,
                gain: 1.0,
            };
            builder.param(name, &shape, gain)
        };
        let scores = |name: &str, outputs| Scores::new(builder, name, dim, &config, outputs);
        let source = match config.variant {
            Variant::Dense => Source::Dense(scores("scores", max_time)),
            Variant::Random => Source::Random(table("random", max_time)),
            Variant::FactorisedDense if !max_time.is_multiple_of(rank) => {
                return Err(impossible(format!(
                    "factorised_dense needs a rank that divides max_time {max_time}, got {rank}"
                )));
            }
            Variant::FactorisedDense => Source::FactorisedDense(
                scores("scores_a", rank),
                scores("scores_c", max_time / rank),
            ),
            Variant::FactorisedRandom => {
                Source::FactorisedRandom(table("random_a", rank), table("random_c", rank))
            }
        };
        Ok(Box::new(Synthesizer {
            v_proj: Linear::new(builder, "v_proj", dim, dim, false),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, false),
            source,
            dim,
            config,
        }))
    },
};

fn impossible(message: String) -> ConfigError {
    ConfigError::Impossible {
        mixer: CARD.name,
        message,
    }
}

/// `W2 relu(W1 x + b1) + b2` per head: W1 `[dim, dim]` makes the hidden features of all heads, W2 is
/// `[heads, outputs, head_dim]`.
struct Scores {
    hidden: Linear,
    weight: Param,
    bias: Param,
}

impl Scores {
    fn new(
        builder: &Builder,
        name: &str,
        dim: usize,
        config: &SynthesizerConfig,
        outputs: usize,
    ) -> Self {
        let at = builder.at(name);
        let head_dim = dim / config.heads;
        Scores {
            hidden: Linear::new(&at, "hidden", dim, dim, true),
            weight: at.param(
                "weight",
                &[config.heads, outputs, head_dim],
                Init::FanIn(head_dim),
            ),
            bias: at.param_no_decay("bias", &[config.heads, outputs], Init::Zeros),
        }
    }

    /// The first `count` scores of every token, `[batch, heads, time, count]`.
    fn forward(&self, x: &Tensor<3>, count: usize) -> Tensor<4> {
        let heads = self.bias.shape()[0];
        let hidden = split_heads(relu(self.hidden.forward(x.clone())), heads).swap_dims(1, 2);
        let [batch, _, _, head_dim] = hidden.dims();
        let weight = self.weight.tensor::<3>().narrow(1, 0, count);
        let weight = weight.swap_dims(1, 2).unsqueeze::<4>();
        let bias = self.bias.tensor::<2>().narrow(1, 0, count);
        hidden.matmul(weight.expand([batch, heads, head_dim, count]))
            + bias.reshape([1, heads, 1, count])
    }

    fn params(&self) -> u64 {
        linear_cost(&[&self.hidden], 0).params + (self.weight.count() + self.bias.count()) as u64
    }
}

enum Source {
    Dense(Scores),
    Random(Param),
    FactorisedDense(Scores, Scores),
    FactorisedRandom(Param, Param),
}

struct Synthesizer {
    v_proj: Linear,
    o_proj: Linear,
    source: Source,
    dim: usize,
    config: SynthesizerConfig,
}

impl Synthesizer {
    /// Logits `[batch, heads, time, time]`.
    fn logits(&self, x: &Tensor<3>) -> Tensor<4> {
        let [batch, time, _] = x.dims();
        let heads = self.config.heads;
        let rows = |table: &Param| table.tensor::<3>().narrow(1, 0, time);
        let spread = |table: Tensor<3>| table.unsqueeze::<4>().expand([batch, heads, time, time]);
        match &self.source {
            Source::Dense(scores) => scores.forward(x, time),
            Source::Random(table) => spread(rows(table).narrow(2, 0, time)),
            Source::FactorisedRandom(a, c) => spread(rows(a).matmul(rows(c).swap_dims(1, 2))),
            Source::FactorisedDense(a, c) => {
                let rank = self.config.rank;
                let groups = time.div_ceil(rank);
                let fast = a.forward(x, rank).unsqueeze_dim::<5>(3);
                let slow = c.forward(x, groups).unsqueeze_dim::<5>(4);
                let all = slow * fast;
                all.reshape([batch, heads, time, groups * rank])
                    .narrow(3, 0, time)
            }
        }
    }

    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Result<Tensor<3>, RunError> {
        let [batch, time, _] = x.dims();
        if time > self.config.max_time {
            return Err(RunError::TooLong {
                mixer: CARD.name,
                limit: self.config.max_time,
                got: time,
            });
        }
        meter::add(self.mixing_flops(time, batch));
        let mut logits = self.logits(&x);
        if self.config.causal {
            let later = Tensor::<2>::ones([time, time], &x.device()).triu(1);
            logits = logits + later.mul_scalar(-1e30).unsqueeze();
        }
        let v = split_heads(self.v_proj.forward(x), self.config.heads).swap_dims(1, 2);
        let o = softmax(logits).matmul(v).swap_dims(1, 2);
        Ok(self.o_proj.forward(join_heads(o)))
    }

    /// Operations beside those of linear layers.
    fn mixing_flops(&self, time: usize, batch: usize) -> u64 {
        let rank = self.config.rank;
        let groups = time.div_ceil(rank);
        let per_row = match self.config.variant {
            Variant::Dense => 2 * time * time * self.dim,
            Variant::FactorisedDense => 2 * time * (rank + groups) * self.dim,
            Variant::Random | Variant::FactorisedRandom => 0,
        };
        let once = match self.config.variant {
            Variant::FactorisedRandom => 2 * self.config.heads * time * time * rank,
            _ => 0,
        };
        (batch * (per_row + 2 * time * time * self.dim) + once) as u64
    }
}

impl TokenMixer for Synthesizer {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| self.dense(x))
    }

    fn cost(&self, time: usize) -> Cost {
        let (hidden, params) = match &self.source {
            Source::Dense(scores) => (scores.hidden.flops(time), scores.params()),
            Source::FactorisedDense(a, c) => (
                a.hidden.flops(time) + c.hidden.flops(time),
                a.params() + c.params(),
            ),
            Source::Random(table) => (0, table.count() as u64),
            Source::FactorisedRandom(a, c) => (0, (a.count() + c.count()) as u64),
        };
        linear_cost(&[&self.v_proj, &self.o_proj], time)
            + Cost {
                params,
                flops: hidden + self.mixing_flops(time, 1),
                state_bytes: 0,
            }
    }
}
