//! The two nouns of the crate, [`TokenMixer`] and [`ChannelMixer`], and what passes between them and a model.

use std::sync::{Arc, Mutex, PoisonError};

use anyformer_ops::Precision;
use anyformer_ops::Tensor;
use anyformer_ops::adapter::sequences;
use anyformer_ops::attention::AttentionOptions;
use anyformer_ops::dropout::{Dropout, Placed};
use serde::{Deserialize, Serialize};

pub(crate) use crate::state::State;

/// An input or a state that a mixer cannot run on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The mixer carries no state.
    #[error("carry a state through {0}: it cannot stream (see its card)")]
    CannotStream(&'static str),
    /// A sequence longer than the mixer was built for.
    #[error("run {mixer}: expected at most {limit} tokens, got {got}; raise its max_time")]
    TooLong {
        /// The mixer.
        mixer: &'static str,
        /// The longest sequence it can take.
        limit: usize,
        /// What was asked.
        got: usize,
    },
    /// The mixer looks at rows and columns, and the tokens are a plain sequence or do not fill the grid.
    #[error(
        "run {mixer}: expected tokens that fill a grid, got {got} tokens and the grid {grid:?}; use it on pictures"
    )]
    NoGrid {
        /// The mixer.
        mixer: &'static str,
        /// Tokens of a sequence.
        got: usize,
        /// Rows and columns, where the model has them.
        grid: Option<[usize; 2]>,
    },
}

/// A pass of training: what is drawn in it depends on these alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Training {
    /// Of the run.
    pub seed: u64,
    /// Passes before it.
    pub nth: u64,
}

/// Places of dropout in the weights of attention are counted from here, and those in channel mixers; places of blocks are below.
const WEIGHTS: u32 = 1 << 19;
const HIDDEN: u32 = 1 << 18;

/// What a model tells its mixers about one forward pass.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// Cumulative lengths of packed sequences (first 0, last `time`); the batch is 1 then. `None`: a dense batch.
    pub offsets: Option<Arc<Vec<usize>>>,
    /// Return the state after the last token.
    pub keep_state: bool,
    /// Rows and columns when the tokens form a grid (row-major), for mixers that look at it.
    pub grid: Option<[usize; 2]>,
    /// Where mixers leave losses of their own, when they are wanted.
    pub losses: Option<Losses>,
    /// What a pass of training drops; the blocks apply it to what the mixers give, and mixers inside.
    pub dropout: Option<Dropout>,
    /// Which pass of training it is; none in evaluation.
    pub training: Option<Training>,
    /// The number of the layer.
    pub layer: usize,
    /// What attention rounds the operands of its products to.
    pub precision: Precision,
}

/// Losses `[1]` that mixers want added to the task's, as a balance of experts.
#[derive(Clone, Debug, Default)]
pub struct Losses(Arc<Mutex<Vec<Tensor<1>>>>);

impl Losses {
    /// Adds one.
    pub fn add(&self, loss: Tensor<1>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.push(loss);
    }

    /// Their sum; none, where nothing was added.
    pub fn sum(&self) -> Option<Tensor<1>> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().cloned().reduce(|a, b| a + b)
    }
}

impl Context {
    /// A context that asks for the final state.
    pub fn with_state() -> Self {
        Context {
            keep_state: true,
            ..Self::default()
        }
    }

    /// Cumulative lengths of the sequences of an input `[batch, time, dim]`.
    pub fn sequences(&self, batch: usize, time: usize) -> Arc<Vec<usize>> {
        sequences(self.offsets.as_ref(), batch, time)
    }

    /// `x [batch, time, dim]` with values zeroed at random where the pass drops some; `site` is the place in the model.
    pub fn dropped(&self, site: u32, x: Tensor<3>) -> Tensor<3> {
        match &self.dropout {
            Some(dropout) => dropout.apply(site, x, self.offsets.as_ref()),
            None => x,
        }
    }

    /// The same in the layer of this number.
    pub fn at(&self, layer: usize) -> Self {
        Context {
            layer,
            ..self.clone()
        }
    }

    /// Options of the layer's attention with what the pass says of it; arguments as of [`Context::weights`].
    pub fn attention(&self, dropout: f64, part: u32) -> AttentionOptions {
        AttentionOptions {
            dropout: self.weights(dropout, part),
            precision: self.precision,
            ..AttentionOptions::default()
        }
    }

    /// Dropout of the weights of the layer's attention with this chance, in training; `part` tells attentions of a layer apart, below 8.
    pub fn weights(&self, chance: f64, part: u32) -> Option<Placed> {
        let dropout = self.dropout.filter(|_| chance > 0.0)?;
        let dropout = Dropout {
            chance: chance as f32,
            ..dropout
        };
        Some(dropout.at(WEIGHTS + 8 * self.layer as u32 + part))
    }

    /// Hidden values `[batch, time, hidden]` of the layer's channel mixer with some zeroed at this chance, in training.
    pub fn hidden(&self, chance: f64, x: Tensor<3>) -> Tensor<3> {
        match self.dropout {
            Some(dropout) if chance > 0.0 => {
                let chance = chance as f32;
                let site = HIDDEN + self.layer as u32;
                Dropout { chance, ..dropout }.apply(site, x, self.offsets.as_ref())
            }
            _ => x,
        }
    }

    /// The cumulative lengths, where sequences are packed.
    pub fn packed(&self) -> Option<&[usize]> {
        self.offsets.as_ref().map(|offsets| offsets.as_slice())
    }

    /// Position of every token in its own sequence, counted on from `state` where one is carried: `[batch * time]`.
    pub fn positions(&self, batch: usize, time: usize, state: Option<&State>) -> Vec<usize> {
        let offsets = self.sequences(batch, time);
        offsets
            .windows(2)
            .enumerate()
            .flat_map(|(row, pair)| {
                let start = state.map_or(0, |state| state.times[row]);
                start..start + pair[1] - pair[0]
            })
            .collect()
    }

    /// The tokens each sequence has consumed after this pass.
    pub fn times_after(&self, batch: usize, time: usize, state: Option<&State>) -> Vec<usize> {
        let offsets = self.sequences(batch, time);
        offsets
            .windows(2)
            .enumerate()
            .map(|(row, pair)| state.map_or(0, |state| state.times[row]) + pair[1] - pair[0])
            .collect()
    }
}

/// Exact cost of one mixer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Trainable parameters.
    pub params: u64,
    /// Floating-point operations of one forward pass over one sequence of the asked length, one multiply-add being 2;
    /// matrix products and sequence mixing only, elementwise work not counted.
    pub flops: u64,
    /// Bytes carried from token to token by one sequence after the asked length; zero where nothing can be carried.
    pub state_bytes: u64,
}

impl std::ops::Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost {
            params: self.params + other.params,
            flops: self.flops + other.flops,
            state_bytes: self.state_bytes + other.state_bytes,
        }
    }
}

/// Mixes positions: a map of `[batch, time, dim]` to the same shape.
pub trait TokenMixer: Send + Sync {
    /// Runs over all of `x`, `[batch, time, dim]`, going on from `state` where one is given. The returned state is
    /// `Some` exactly when `context.keep_state` is set and the mixer can stream.
    ///
    /// A mixer whose card says that it cannot stream refuses a state with [`RunError`].
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError>;

    /// One more token for each sequence of `state`: `x` is `[sequences, 1, dim]`.
    fn step(&self, x: Tensor<3>, state: &State) -> Result<(Tensor<3>, State), RunError> {
        let (y, next) = self.forward(x, &Context::with_state(), Some(state))?;
        match next {
            Some(next) => Ok((y, next)),
            None => Err(RunError::CannotStream("this mixer")),
        }
    }

    /// Cost of one sequence of `time` tokens.
    fn cost(&self, time: usize) -> Cost;
}

/// Mixes the features of one position: a map of `[batch, time, dim]` to the same shape.
pub trait ChannelMixer: Send + Sync {
    /// Applies the mixer; one with a loss of its own leaves it in the context's, where they are wanted.
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3>;

    /// Cost of one sequence of `time` tokens (`state_bytes` is zero).
    fn cost(&self, time: usize) -> Cost;
}
