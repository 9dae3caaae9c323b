//! Pooling: each token moves towards the mean of its neighbours; no parameters.
//!
//! Yu et al., MetaFormer Is Actually What You Need for Vision (2022), arXiv 2111.11418: average of a 3 x 3 window (or of
//! three tokens) minus the token itself; the border counts only what is there.

use anyformer_ops::Tensor;
use anyformer_ops::pool::{pool1d, pool2d};
use serde::{Deserialize, Serialize};

use crate::card::{Card, Direction, Knob, TokenEntry, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};

/// What the neighbours are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The tokens before and after.
    #[default]
    #[serde(rename = "1d")]
    Line,
    /// The eight around it on the grid of the picture.
    #[serde(rename = "2d")]
    Grid,
}

/// Knobs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolConfig {
    /// What the neighbours are.
    pub kind: Kind,
}

static CARD: Card = Card {
    name: "pool",
    title: "Pooling (PoolFormer)",
    paper: "Yu et al.: MetaFormer Is Actually What You Need for Vision (CVPR 2022), arXiv 2111.11418",
    equation: "y_i = mean of x over the window of three (or 3 x 3) around i - x_i",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "The cheapest mixer: no parameters, no products. Its reach grows by one token per layer. Pictures as patches want kind = \"2d\".",
    knobs: &[Knob {
        name: "kind",
        doc: "1d: the tokens before and after; 2d: the eight around it on the picture's grid",
    }],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<PoolConfig>(&CARD, options),
    build: |_, options, _| {
        let config: PoolConfig = read(&CARD, options)?;
        Ok(Box::new(Pool { kind: config.kind }))
    },
};

struct Pool {
    kind: Kind,
}

impl TokenMixer for Pool {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        if state.is_some() {
            return Err(RunError::CannotStream(CARD.name));
        }
        let [batch, time, dim] = x.dims();
        let y = match self.kind {
            Kind::Line => pool1d(x, context.sequences(batch, time)),
            Kind::Grid => match context.grid {
                Some([rows, columns]) if rows * columns == time && context.offsets.is_none() => {
                    pool2d(x.reshape([batch, rows, columns, dim])).reshape([batch, time, dim])
                }
                grid => {
                    return Err(RunError::NoGrid {
                        mixer: CARD.name,
                        got: time,
                        grid,
                    });
                }
            },
        };
        Ok((y, None))
    }

    fn cost(&self, _: usize) -> Cost {
        Cost::default()
    }
}
