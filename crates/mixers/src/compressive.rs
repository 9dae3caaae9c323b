//! Compressive Transformer: Transformer-XL whose oldest memory is kept in a coarser form.
//!
//! Rae et al. (2020), arXiv 1911.05507. Tokens that leave the memory are squeezed, `rate` of them into one place, by their
//! mean or by a convolution of that width and stride; the last `slots` places are seen before the memory. The engine is
//! [`crate::transformer_xl`].

use anyformer_ops::Linear;
use serde::{Deserialize, Serialize};

use crate::card::{Card, ConfigError, Direction, Knob, TokenEntry, read, resolve};
use crate::transformer_xl::{Coarse, Segments, TransformerXlConfig};

/// How tokens are squeezed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Their mean.
    #[default]
    Mean,
    /// A learned convolution.
    Conv,
}

/// Knobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct CompressiveConfig {
    /// Heads; divides `dim`.
    pub heads: usize,
    /// Tokens of a segment.
    pub segment: usize,
    /// Tokens before the segment that are kept as they are.
    pub memory: usize,
    /// Tokens of one coarse place; divides segment and memory.
    pub rate: usize,
    /// Coarse places kept.
    pub slots: usize,
    /// How tokens are squeezed.
    pub compression: Compression,
}

impl Default for CompressiveConfig {
    fn default() -> Self {
        CompressiveConfig {
            heads: 4,
            segment: 32,
            memory: 32,
            rate: 4,
            slots: 32,
            compression: Compression::Mean,
        }
    }
}

static CARD: Card = Card {
    name: "compressive",
    title: "Compressive Transformer",
    paper: "Rae, Potapenko, Jayakumar, Lillicrap: Compressive Transformers for Long-Range Sequence Modelling (ICLR 2020), arXiv 1911.05507",
    equation: "as Transformer-XL over [coarse places, memory, segment]\ncoarse place = mean, or a convolution of width and stride rate, of the tokens that leave the memory",
    direction: Direction::Causal,
    streams: true,
    state: "constant: at most slots + memory + segment rows",
    notes: "A token sees rate slots + memory tokens back. The convolution learns from the task's own gradient; the paper trains it by a loss that reconstructs attention and stops every other gradient, which is not here. Dilated and most-used compression are not here.",
    knobs: &[
        Knob {
            name: "heads",
            doc: "heads; divides dim",
        },
        Knob {
            name: "segment",
            doc: "tokens of a segment",
        },
        Knob {
            name: "memory",
            doc: "tokens before the segment that are kept as they are",
        },
        Knob {
            name: "rate",
            doc: "tokens of one coarse place; divides segment and memory",
        },
        Knob {
            name: "slots",
            doc: "coarse places kept",
        },
        Knob {
            name: "compression",
            doc: "mean or conv",
        },
    ],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<CompressiveConfig>(&CARD, options),
    build: |dim, options, builder| {
        let config: CompressiveConfig = read(&CARD, options)?;
        let (segment, memory, rate) = (config.segment, config.memory, config.rate);
        if rate == 0 || !segment.is_multiple_of(rate) || !memory.is_multiple_of(rate) {
            return Err(ConfigError::Impossible {
                mixer: CARD.name,
                message: format!(
                    "rate {rate} must divide segment {segment} and memory {memory}, so that whole places leave the memory"
                ),
            });
        }
        let compress = (config.compression == Compression::Conv)
            .then(|| Linear::new(builder, "compress", rate * dim, dim, false));
        let coarse = Coarse {
            rate,
            slots: config.slots,
            compress,
        };
        let shared = TransformerXlConfig {
            heads: config.heads,
            segment,
            memory,
        };
        let engine = Segments::new(&CARD, dim, &shared, Some(coarse), builder)?;
        Ok(Box::new(engine))
    },
};
