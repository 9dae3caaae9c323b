//! Exits: places along the depth where a norm and a head of their own give an answer, so that a confident model may stop.
//!
//! Teerapittayanon et al., BranchyNet (2016), arXiv 1709.01686: the exits' losses are added to the last one's in training, and
//! an answer is given at the first exit that is sure enough.

use anyformer_ops::{Builder, Param, Tensor, tensor_values};

use crate::block::Norm;
use crate::config::{ModelConfig, ModelError, Wiring};
use crate::head::Head;

/// One exit.
pub(crate) struct Exit {
    /// Layers before it.
    pub(crate) after: usize,
    norm: Option<Norm>,
    pub(crate) head: Head,
}

impl Exit {
    /// Every exit of a config; their parameters stand under `exits.N`.
    pub(crate) fn all(
        config: &ModelConfig,
        embed: Option<&Param>,
        builder: &Builder,
    ) -> Result<Vec<Exit>, ModelError> {
        let exit = |after: &usize| {
            let at = builder.at("exits").at(after);
            Ok(Exit {
                after: *after,
                norm: (config.wiring != Wiring::PostNorm).then(|| Norm::new(config, "norm", &at)),
                head: Head::new(config, embed, true, &at)?,
            })
        };
        config.exits.iter().map(exit).collect()
    }

    /// What the head reads.
    pub(crate) fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }

    /// Trainable parameters.
    pub(crate) fn params(&self) -> u64 {
        let head = self.head.cost(Default::default(), 1).params;
        head + self.norm.as_ref().map_or(0, Norm::count) as u64
    }
}

/// What is done at an exit with the hidden vectors there and the cumulative lengths; true stops the pass.
pub(crate) type Leave<'a> =
    &'a mut dyn FnMut(&Exit, &Tensor<3>, &[usize]) -> Result<bool, ModelError>;

/// What a pass does beside the layers themselves.
#[derive(Default)]
pub(crate) struct Watch<'a> {
    /// Layers that are left out, where true.
    pub(crate) skip: &'a [bool],
    /// Whether blocks are run again in the backward pass, instead of being kept.
    pub(crate) recompute: bool,
    /// Called at every exit.
    pub(crate) leave: Option<Leave<'a>>,
}

/// The smallest over the rows of the largest probability.
pub(crate) fn confidence(scores: &Tensor<2>) -> f32 {
    let classes = scores.dims()[1];
    let values = tensor_values(scores.clone());
    let largest = |row: &[f32]| {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        1.0 / row.iter().map(|score| (score - top).exp()).sum::<f32>()
    };
    values.chunks(classes).map(largest).fold(1.0, f32::min)
}
