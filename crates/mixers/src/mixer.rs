//! The two nouns of the crate, [`TokenMixer`] and [`ChannelMixer`], and what passes between them and a model.

use std::sync::Arc;

use anyformer_ops::Tensor;
use anyformer_ops::adapter::sequences;
use serde::{Deserialize, Serialize};

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

/// What a model tells its mixers about one forward pass.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// Cumulative lengths of packed sequences (first 0, last `time`); the batch is 1 then. `None`: a dense batch.
    pub offsets: Option<Arc<Vec<usize>>>,
    /// Return the state after the last token.
    pub keep_state: bool,
    /// Rows and columns when the tokens form a grid (row-major), for mixers that look at it.
    pub grid: Option<[usize; 2]>,
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

/// One named tensor of a state, at any rank.
#[derive(Clone, Debug)]
pub struct StateTensor {
    /// Extents; the first is the number of sequences unless the mixer says otherwise.
    pub shape: Vec<usize>,
    /// The values, flat.
    pub data: Tensor<1>,
}

/// What a mixer carries from one call to the next: a value that can be kept, copied, and put back.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Tokens consumed so far, per sequence.
    pub times: Vec<usize>,
    tensors: Vec<(&'static str, StateTensor)>,
}

impl State {
    /// An empty state of sequences that have consumed `times` tokens.
    pub fn new(times: Vec<usize>) -> Self {
        State {
            times,
            tensors: Vec::new(),
        }
    }

    /// Adds a named tensor; one without values (the past of a convolution of one token) is left out.
    pub fn with<const D: usize>(mut self, name: &'static str, tensor: Tensor<D>) -> Self {
        let shape = tensor.dims().to_vec();
        let count = shape.iter().product::<usize>();
        if count == 0 {
            return self;
        }
        let data = tensor.reshape([count]);
        self.tensors.push((name, StateTensor { shape, data }));
        self
    }

    /// The tensor of that name, if it holds any value.
    pub fn find<const D: usize>(&self, name: &str) -> Option<Tensor<D>> {
        let held = self.tensors.iter().any(|(held, _)| *held == name);
        held.then(|| self.get(name))
    }

    /// The tensor of that name; panics when there is none of rank `D`, which is a mistake of the mixer.
    pub fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        let found = self.tensors.iter().find(|(held, _)| *held == name);
        let Some((_, tensor)) = found else {
            panic!("the state has no tensor {name}")
        };
        let Ok(shape) = <[usize; D]>::try_from(tensor.shape.clone()) else {
            panic!("state {name} has shape {:?}, not rank {D}", tensor.shape)
        };
        tensor.data.clone().reshape(shape)
    }

    /// Names and tensors, in the order in which the mixer added them.
    pub fn tensors(&self) -> &[(&'static str, StateTensor)] {
        &self.tensors
    }

    /// The same state cut off from the graph that made it (truncated back-propagation, generation).
    pub fn detach(self) -> Self {
        let detach = |(name, tensor): (&'static str, StateTensor)| {
            let data = tensor.data.detach();
            (name, StateTensor { data, ..tensor })
        };
        State {
            times: self.times,
            tensors: self.tensors.into_iter().map(detach).collect(),
        }
    }

    /// Size in bytes, all sequences together.
    pub fn bytes(&self) -> u64 {
        let values = |tensor: &StateTensor| tensor.shape.iter().product::<usize>();
        let total: usize = self.tensors.iter().map(|(_, t)| values(t)).sum();
        4 * total as u64
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
    /// Applies the mixer.
    fn forward(&self, x: Tensor<3>) -> Tensor<3>;

    /// Cost of one sequence of `time` tokens (`state_bytes` is zero).
    fn cost(&self, time: usize) -> Cost;
}
