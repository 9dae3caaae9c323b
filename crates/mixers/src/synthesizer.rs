//! Synthesizer: attention weights that no pair of tokens is compared for.
//!
//! Tay et al. (2021), arXiv 2005.00743: `y = softmax(B) V`, where the logits B `[heads, time, time]` are
//! - dense: `B_i = W2 relu(W1 x_i + b1) + b2`, one score per position, from the token alone;
//! - random: a trained table `[max_time, max_time]`;
//! - factorised_dense: `B_ij = A_i[j mod a] C_i[j div a]`, A and C as in dense with a and `max_time / a` scores;
//! - factorised_random: `R1 R2ᵀ`, two tables `[max_time, rank]`;
//! - dot_product: `q_i . k_j / sqrt(head_dim)`, as in attention, to mix with another.
//!
//! A mixture is `a1 B1 + a2 B2` with trained shares `a = softmax`, or the plain sum, as the code released with Long Range Arena
//! has it.

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
    /// Products of queries and keys.
    DotProduct,
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
    /// A second source of logits.
    pub mix: Option<Variant>,
    /// The two are added as they are, instead of by trained shares.
    pub mix_sum: bool,
}

impl Default for SynthesizerConfig {
    fn default() -> Self {
        SynthesizerConfig {
            heads: 4,
            variant: Variant::Dense,
            max_time: 1024,
            rank: 8,
            causal: true,
            mix: None,
            mix_sum: false,
        }
    }
}

static CARD: Card = Card {
    name: "synthesizer",
    title: "Synthesizer (dense, random, factorised, mixtures)",
    paper: "Tay et al.: Synthesizer: Rethinking Self-Attention in Transformer Models (ICML 2021), arXiv 2005.00743",
    equation: "y = softmax(B) V\ndense: B_i = W2 relu(W1 x_i + b1) + b2\nrandom: B = R\nfactorised_dense: B_ij = A_i[j mod a] C_i[j div a]\nfactorised_random: B = R1 R2^T\nmixture: B = a1 B1 + a2 B2, a = softmax",
    direction: Direction::Either,
    streams: false,
    state: "none",
    notes: "Quadratic in time, without products of queries and keys, but for dot_product. Positions are addressed, not contents: recall of pairs is out of reach of the random forms. Tables are as long as max_time, and random holds heads max_time^2 parameters. The causal form could be decoded with a cache of values; it is not offered. The code released with Long Range Arena adds random scores and products of queries and keys: variant = random, mix = dot_product, mix_sum.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "variant",
            doc: "dense, random, factorised_dense, factorised_random, or dot_product (as in attention)",
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
        Knob {
            name: "mix",
            doc: "a second source of logits, another variant",
        },
        Knob {
            name: "mix_sum",
            doc: "the two are added as they are, instead of by trained shares",
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
        if config.mix_sum && config.mix.is_none() {
            return Err(impossible("mix_sum needs a mix to add".into()));
        }
        if config.mix == Some(config.variant) {
            return Err(impossible("mix must be another variant".into()));
        }
        let mut sources = vec![Source::new(builder, dim, &config, config.variant)?];
        if let Some(mix) = config.mix {
            sources.push(Source::new(&builder.at("mix"), dim, &config, mix)?);
        }
        let shares = config.mix.filter(|_| !config.mix_sum);
        Ok(Box::new(Synthesizer {
            v_proj: Linear::new(builder, "v_proj", dim, dim, false),
            o_proj: Linear::residual(builder, "o_proj", dim, dim, false),
            sources,
            shares: shares.map(|_| builder.param_no_decay("shares", &[2], Init::Zeros)),
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
    DotProduct(Linear, Linear),
}

impl Source {
    fn new(
        builder: &Builder,
        dim: usize,
        config: &SynthesizerConfig,
        variant: Variant,
    ) -> Result<Self, ConfigError> {
        let (max_time, rank) = (config.max_time, config.rank);
        let table = |name: &str, columns: usize| {
            let shape = [config.heads, max_time, columns];
            let gain = Init::Xavier {
                fan_in: columns,
                fan_out: max_time,
                gain: 1.0,
            };
            builder.param(name, &shape, gain)
        };
        let scores = |name: &str, outputs| Scores::new(builder, name, dim, config, outputs);
        Ok(match variant {
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
            Variant::DotProduct => {
                let linear = |name: &str| Linear::new(builder, name, dim, dim, false);
                Source::DotProduct(linear("q_proj"), linear("k_proj"))
            }
        })
    }

    /// Logits `[batch, heads, time, time]` of `x`.
    fn logits(&self, x: &Tensor<3>, config: &SynthesizerConfig) -> Tensor<4> {
        let [batch, time, _] = x.dims();
        let SynthesizerConfig { heads, rank, .. } = *config;
        let rows = |table: &Param| table.tensor::<3>().narrow(1, 0, time);
        let spread = |table: Tensor<3>| table.unsqueeze::<4>().expand([batch, heads, time, time]);
        match self {
            Source::Dense(scores) => scores.forward(x, time),
            Source::Random(table) => spread(rows(table).narrow(2, 0, time)),
            Source::FactorisedRandom(a, c) => spread(rows(a).matmul(rows(c).swap_dims(1, 2))),
            Source::FactorisedDense(a, c) => {
                let groups = time.div_ceil(rank);
                let fast = a.forward(x, rank).unsqueeze_dim::<5>(3);
                let slow = c.forward(x, groups).unsqueeze_dim::<5>(4);
                let all = slow * fast;
                all.reshape([batch, heads, time, groups * rank])
                    .narrow(3, 0, time)
            }
            Source::DotProduct(q, k) => {
                let split = |linear: &Linear| split_heads(linear.forward(x.clone()), heads);
                let (q, k) = (split(q), split(k));
                let scale = (q.dims()[3] as f32).powf(-0.5);
                let products = q.swap_dims(1, 2).matmul(k.swap_dims(1, 2).swap_dims(2, 3));
                products.mul_scalar(scale)
            }
        }
    }

    /// Operations on `batch` rows beside those of linear layers.
    fn flops(&self, time: usize, batch: usize, dim: usize, config: &SynthesizerConfig) -> usize {
        let rank = config.rank;
        match self {
            Source::Dense(_) | Source::DotProduct(..) => batch * 2 * time * time * dim,
            Source::FactorisedDense(..) => batch * 2 * time * (rank + time.div_ceil(rank)) * dim,
            Source::Random(_) => 0,
            Source::FactorisedRandom(..) => 2 * config.heads * time * time * rank,
        }
    }

    /// Parameters, and operations of linear layers.
    fn layers(&self, time: usize) -> Cost {
        let (flops, params) = match self {
            Source::Dense(scores) => (scores.hidden.flops(time), scores.params()),
            Source::FactorisedDense(a, c) => (
                a.hidden.flops(time) + c.hidden.flops(time),
                a.params() + c.params(),
            ),
            Source::Random(table) => (0, table.count() as u64),
            Source::FactorisedRandom(a, c) => (0, (a.count() + c.count()) as u64),
            Source::DotProduct(q, k) => return linear_cost(&[q, k], time),
        };
        Cost {
            params,
            flops,
            state_bytes: 0,
        }
    }
}

struct Synthesizer {
    v_proj: Linear,
    o_proj: Linear,
    /// One, or the two of a mixture.
    sources: Vec<Source>,
    /// `[2]`: logarithms of shares, up to what they have in common.
    shares: Option<Param>,
    dim: usize,
    config: SynthesizerConfig,
}

impl Synthesizer {
    /// Logits `[batch, heads, time, time]`.
    fn logits(&self, x: &Tensor<3>) -> Tensor<4> {
        let mut parts: Vec<Tensor<4>> = Vec::new();
        for source in &self.sources {
            parts.push(source.logits(x, &self.config));
        }
        if let Some(shares) = &self.shares {
            let shares = softmax(shares.tensor::<1>().reshape([1, 2]));
            for (at, part) in parts.iter_mut().enumerate() {
                let share = shares.clone().narrow(1, at, 1).reshape([1, 1, 1, 1]);
                *part = part.clone() * share;
            }
        }
        let whole = parts.into_iter().reduce(|a, b| a + b);
        whole.unwrap_or_else(|| unreachable!("a source at least"))
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
        let each = self.sources.iter();
        let logits: usize = each
            .map(|source| source.flops(time, batch, self.dim, &self.config))
            .sum();
        (logits + batch * 2 * time * time * self.dim) as u64
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
        let own = Cost {
            params: self
                .shares
                .as_ref()
                .map_or(0, |shares| shares.count() as u64),
            flops: self.mixing_flops(time, 1),
            state_bytes: 0,
        };
        let sources = self.sources.iter().map(|source| source.layers(time));
        sources.fold(
            linear_cost(&[&self.v_proj, &self.o_proj], time) + own,
            |sum, cost| sum + cost,
        )
    }
}
