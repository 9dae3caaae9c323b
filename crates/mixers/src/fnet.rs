//! FNet: the real part of a discrete Fourier transform over time and features, in place of attention.
//!
//! Lee-Thorp et al. (2022), arXiv 2105.03824: `y = Re(F_time(F_dim(x)))`, no parameters.

use anyformer_ops::Tensor;
use anyformer_ops::fourier::{real_part, real_part_flops};
use serde::{Deserialize, Serialize};

use crate::card::{Card, Direction, Knob, TokenEntry, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::each_sequence;

/// Knobs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FnetConfig {
    /// Divide by `sqrt(time dim)`, so that the transform keeps lengths.
    pub ortho: bool,
}

static CARD: Card = Card {
    name: "fnet",
    title: "FNet",
    paper: "Lee-Thorp, Ainslie, Eckstein, Ontanon: FNet: Mixing Tokens with Fourier Transforms (NAACL 2022), arXiv 2105.03824",
    equation: "y = Re(F_time(F_dim(x))), F the discrete Fourier transform",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "No parameters: the channel mixer does all the learning. Every output depends on every input, so it can be neither causal nor streamed. As published the transform is not scaled and grows as sqrt(time dim); ortho divides that out. time log time; on other devices than the CPU lengths with divisors near the root cost time (a + b), a prime length time squared.",
    knobs: &[Knob {
        name: "ortho",
        doc: "divide by sqrt(time dim)",
    }],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<FnetConfig>(&CARD, options),
    build: |dim, options, _| {
        let config: FnetConfig = read(&CARD, options)?;
        Ok(Box::new(Fnet { dim, config }))
    },
};

struct Fnet {
    dim: usize,
    config: FnetConfig,
}

impl Fnet {
    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, time, dim] = x.dims();
        let y = real_part(x);
        match self.config.ortho {
            true => y.mul_scalar(((time * dim) as f32).powf(-0.5)),
            false => y,
        }
    }
}

impl TokenMixer for Fnet {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| Ok(self.dense(x)))
    }

    fn cost(&self, time: usize) -> Cost {
        Cost {
            flops: real_part_flops(time, self.dim),
            ..Cost::default()
        }
    }
}
