//! No channel mixer: the block is its token mixer alone, as in Mamba.

use anyformer_ops::Tensor;
use serde::{Deserialize, Serialize};

use crate::card::{Card, ChannelEntry, Direction, resolve};
use crate::mixer::{ChannelMixer, Context, Cost};

/// No knobs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NoneConfig {}

static CARD: Card = Card {
    name: "none",
    title: "no channel mixer",
    paper: "Gu, Dao: Mamba (2023), arXiv 2312.00752: blocks without a separate MLP",
    equation: "the residual branch is left out",
    direction: Direction::Either,
    streams: true,
    state: "constant",
    notes: "Models leave the second half of the block, norm included, out of the stack.",
    knobs: &[],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: ChannelEntry = ChannelEntry {
    card: &CARD,
    resolve: |options| resolve::<NoneConfig>(&CARD, options),
    build: |_, options, _| {
        resolve::<NoneConfig>(&CARD, options)?;
        Ok(Box::new(Nothing))
    },
};

struct Nothing;

impl ChannelMixer for Nothing {
    fn forward(&self, x: Tensor<3>, _: &Context) -> Tensor<3> {
        x.zeros_like()
    }

    fn cost(&self, _: usize) -> Cost {
        Cost::default()
    }
}
