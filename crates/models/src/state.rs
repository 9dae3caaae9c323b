//! What a model carries: its sequences are taken out, put together, rolled back.

use anyformer_mixers::State;

/// What a model carries from one call to the next: one state per layer.
#[derive(Clone, Debug)]
pub struct ModelState {
    /// Tokens consumed, per sequence.
    pub times: Vec<usize>,
    /// The layers' states, first layer first.
    pub layers: Vec<State>,
}

impl ModelState {
    /// Size in bytes, all sequences together.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(State::bytes).sum()
    }

    /// Sequences that the state holds.
    pub fn sequences(&self) -> usize {
        self.times.len()
    }

    /// The sequences `wanted`, in that order; each index is below the number of sequences, and there is at least one.
    pub fn select(&self, wanted: &[usize]) -> Self {
        ModelState {
            times: wanted.iter().map(|index| self.times[*index]).collect(),
            layers: self
                .layers
                .iter()
                .map(|layer| layer.select(wanted))
                .collect(),
        }
    }

    /// The sequences of several states of one model, one after the other; at least one state.
    pub fn join(states: &[&ModelState]) -> Self {
        let layers = states.first().map_or(0, |state| state.layers.len());
        let layer = |index: usize| {
            let layers: Vec<&State> = states.iter().map(|state| &state.layers[index]).collect();
            State::join(&layers)
        };
        ModelState {
            times: states
                .iter()
                .flat_map(|state| state.times.iter().copied())
                .collect(),
            layers: (0..layers).map(layer).collect(),
        }
    }

    /// The state of one sequence after its first `time` tokens, where every layer keeps a row per token.
    pub fn rolled_back(&self, time: usize) -> Option<Self> {
        let layers = self.layers.iter().map(|layer| layer.rolled_back(time));
        Some(ModelState {
            layers: layers.collect::<Option<Vec<_>>>()?,
            times: vec![time],
        })
    }
}
