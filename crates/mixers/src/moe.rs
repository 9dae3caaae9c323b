//! Mixture of experts: each token goes through a few of many channel mixers.
//!
//! Shazeer et al. (2017), arXiv 1701.06538; Fedus et al., Switch Transformers (2021), arXiv 2101.03961; top-k softmax as in
//! Jiang et al., Mixtral (2024), arXiv 2401.04088: `p = softmax(W_r x)`, `y = sum over the k largest p_e of g_e expert_e(x)`, `g` being p
//! over the sum of the chosen (or p itself). Balance, Switch's equation 4: `balance N sum_e f_e P_e`, f the part of the tokens
//! that went to e, P the mean of p_e. No token is dropped: there is no capacity.

use std::sync::Arc;

use anyformer_ops::activation::softmax;
use anyformer_ops::embedding::embedding;
use anyformer_ops::nearest::largest;
use anyformer_ops::recompute::decided;
use anyformer_ops::{Linear, Tensor, tensor_values};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::card::{Card, ChannelEntry, ConfigError, Direction, Knob, Options, read, resolve};
use crate::mixer::{ChannelMixer, Context, Cost};
use crate::parts::linear_cost;

/// What an expert is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expert {
    /// Three products.
    #[default]
    Swiglu,
    /// Two products.
    Mlp,
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct MoeConfig {
    /// Experts.
    pub experts: usize,
    /// Experts that a token goes through.
    pub top_k: usize,
    /// What an expert is.
    pub expert: Expert,
    /// Inner width of an expert; 0: its own default.
    pub hidden: usize,
    /// Divide the weights of the chosen experts by their sum.
    pub normalise: bool,
    /// Factor of the loss that spreads tokens over the experts.
    pub balance: f64,
}

impl Default for MoeConfig {
    fn default() -> Self {
        MoeConfig {
            experts: 4,
            top_k: 2,
            expert: Expert::Swiglu,
            hidden: 0,
            normalise: true,
            balance: 0.01,
        }
    }
}

static CARD: Card = Card {
    name: "moe",
    title: "Mixture of experts",
    paper: "Fedus et al.: Switch Transformers (2021), arXiv 2101.03961; Jiang et al.: Mixtral of Experts (2024), arXiv 2401.04088",
    equation: "p = softmax(W_r x)\ny = sum_{e in top k of p} p_e / (sum of the chosen p) expert_e(x)",
    direction: Direction::Either,
    streams: true,
    state: "constant",
    notes: "More parameters for the operations of top_k experts. The balance loss is added in training and shown as the extra loss. Switch: top_k = 1 with normalise = false (normalised, one expert's weight is 1 and the router learns from the balance alone). No capacity, no jitter.",
    knobs: &[
        Knob {
            name: "experts",
            doc: "number of experts",
        },
        Knob {
            name: "top_k",
            doc: "experts that a token goes through",
        },
        Knob {
            name: "expert",
            doc: "swiglu or mlp",
        },
        Knob {
            name: "hidden",
            doc: "inner width of an expert; 0: its own default",
        },
        Knob {
            name: "normalise",
            doc: "divide the weights of the chosen experts by their sum",
        },
        Knob {
            name: "balance",
            doc: "factor of the loss that spreads tokens over the experts",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: ChannelEntry = ChannelEntry {
    card: &CARD,
    resolve: |options| resolve::<MoeConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: MoeConfig = read(&CARD, options)?;
        let sound = config.balance >= 0.0 && config.balance.is_finite();
        if config.top_k == 0 || config.top_k > config.experts || !sound {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "expected 1 <= top_k <= experts and a balance of 0 or more, got {}, {} and {}",
                    config.top_k, config.experts, config.balance
                ),
            });
        }
        let entry = match config.expert {
            Expert::Swiglu => &crate::swiglu::ENTRY,
            Expert::Mlp => &crate::mlp::ENTRY,
        };
        let mut own = Options::new();
        own.insert("hidden".into(), json!(config.hidden));
        let experts = (0..config.experts)
            .map(|index| (entry.build)(dim, &own, &builder.at("experts").at(index)))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Box::new(Moe {
            router: Linear::new(builder, "router", dim, config.experts, false),
            experts,
            top_k: config.top_k,
            normalise: config.normalise,
            balance: config.balance,
        }))
    },
};

struct Moe {
    router: Linear,
    experts: Vec<Box<dyn ChannelMixer>>,
    top_k: usize,
    normalise: bool,
    balance: f64,
}

impl Moe {
    /// The output, the probabilities `[rows, experts]`, and the chosen experts, `top_k` a row.
    fn mix(&self, x: Tensor<3>) -> (Tensor<3>, Tensor<2>, Vec<usize>) {
        let shape = x.dims();
        let (rows, dim) = (shape[0] * shape[1], shape[2]);
        let (count, k) = (self.experts.len(), self.top_k);
        let x = x.reshape([rows, dim]);
        let p = softmax(self.router.forward(x.clone()));
        // Rounding may turn a choice, so it is made once where the block is run again.
        let chosen = decided(|| largest(&tensor_values(p.clone()), count, k));
        let chosen: Vec<usize> = chosen.iter().map(|expert| *expert as usize).collect();
        let ids =
            |ids: Vec<usize>| Arc::new(ids.into_iter().map(|id| id as u32).collect::<Vec<_>>());
        // Each expert runs over its tokens; `places` says where the choices lie in what they give, end to end.
        let (mut given, mut places, mut start) = (Vec::new(), vec![0; rows * k], 0);
        for (index, expert) in self.experts.iter().enumerate() {
            let own = (0..rows * k).filter(|at| chosen[*at] == index);
            let own: Vec<usize> = own.collect();
            if own.is_empty() {
                continue;
            }
            own.iter()
                .enumerate()
                .for_each(|(at, choice)| places[*choice] = start + at);
            start += own.len();
            let tokens = ids(own.iter().map(|choice| choice / k).collect());
            let tokens = embedding(x.clone(), tokens, [1, own.len()]);
            given.push(expert.forward(tokens, &Context::default()));
        }
        let given = Tensor::cat(given, 1).reshape([rows * k, dim]);
        let given = embedding(given, ids(places), [rows, k]);
        let table = p.clone().reshape([rows * count, 1]);
        let flat = (0..rows * k).map(|at| at / k * count + chosen[at]);
        let mut weights = embedding(table, ids(flat.collect()), [rows, k]);
        if self.normalise {
            weights = weights.clone() / weights.sum_dim(1);
        }
        let y = (given * weights).sum_dim(1).reshape(shape);
        (y, p, chosen)
    }
}

impl ChannelMixer for Moe {
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let (y, p, chosen) = self.mix(x);
        let [rows, count] = p.dims();
        if let (Some(losses), true) = (&context.losses, self.balance > 0.0) {
            let mut parts = vec![0.0; count];
            chosen.iter().for_each(|expert| parts[*expert] += 1.0);
            parts.iter_mut().for_each(|part| *part /= rows as f32);
            let parts = Tensor::<1>::from_data(parts.as_slice(), &p.device());
            let mean = p.mean_dim(0).reshape([count]);
            losses.add((mean * parts).sum() * (self.balance * count as f64));
        }
        y
    }

    fn cost(&self, time: usize) -> Cost {
        let each = self.experts.iter().map(|expert| expert.cost(time));
        let one = self.experts[0].cost(time).flops;
        let all = each.fold(linear_cost(&[&self.router], time), |a, b| Cost {
            params: a.params + b.params,
            ..a
        });
        Cost {
            flops: all.flops + self.top_k as u64 * one,
            ..all
        }
    }
}
