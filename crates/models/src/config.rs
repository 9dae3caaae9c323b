//! The config of a model: what a run file's `[model]` table and a model folder's `config.json` hold.

mod check;

use anyformer_mixers::card::nearest_name;
use anyformer_mixers::mlp::Activation;
use anyformer_mixers::{ConfigError, MixerSpec, token_mixer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// How the sub-layers of a block are joined with the residual stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wiring {
    /// `x + f(norm(x))`, and a norm after the last block.
    #[default]
    PreNorm,
    /// `norm(x + f(x))`, as in the first Transformer.
    PostNorm,
    /// `x + f(norm1(x)) + g(norm2(x))`: token and channel mixer side by side, and a norm after the last block, as in
    /// GPT-NeoX.
    Parallel,
}

/// The normalisation between sub-layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Root mean square, a weight per feature.
    #[default]
    Rms,
    /// Mean and variance, a weight and a bias per feature.
    Layer,
}

/// To what the operands of linear layers' and attention's products are rounded, forward and backward. Parameters, sums, states and the
/// optimiser are f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Not rounded.
    #[default]
    F32,
    /// bfloat16, on the CPU: faster where the machine has AVX512-BF16, slower elsewhere.
    Bf16,
}

impl From<Precision> for anyformer_ops::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

/// Positions added to the embedding. Rotary and linear-bias positions are knobs of the attention mixer instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// None: recurrent mixers and mixers with positions of their own.
    #[default]
    None,
    /// A learned table of `max_time` rows.
    Learned,
    /// The fixed sinusoids of the first Transformer, interleaved sine and cosine.
    Sinusoid,
}

/// What the model reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reads {
    /// Token ids below `vocab`.
    Tokens {
        /// Number of ids.
        vocab: usize,
    },
    /// Pictures cut into square patches, each patch a token.
    Patches {
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
        /// Values of one pixel.
        channels: usize,
        /// Side of a patch in pixels; divides both height and width.
        patch: usize,
    },
}

/// What a sequence classifier reads off the last block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// Mean over the sequence's own tokens.
    #[default]
    Mean,
    /// The last token.
    Last,
    /// The first token.
    First,
    /// A learned token put before the sequence; it takes one position more.
    Cls,
    /// The largest value of each feature over the sequence's own tokens.
    Max,
}

/// Whether a classifier reads one sequence or two, each with its own pass through the same blocks; u and v are what is
/// read off the two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pair {
    /// One sequence.
    #[default]
    None,
    /// Two: the head sees `[u, v]`.
    Concat,
    /// Two: the head sees `[u, v, u v, u - v]`.
    Nli,
}

/// What the model gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Gives {
    /// Scores of the next token at every position.
    NextToken {
        /// Share the weight of the embedding.
        tied: bool,
    },
    /// One score per class for the whole sequence, or for a pair of sequences.
    Class {
        /// Number of classes.
        classes: usize,
        /// What is read off the last block.
        #[serde(default)]
        pool: Pool,
        /// Inner width of the head: a layer with `head_activation` before the scores, for pairs a second one of half of
        /// it; 0: none.
        #[serde(default)]
        hidden: usize,
        /// Whether two sequences are read.
        #[serde(default)]
        pair: Pair,
    },
    /// Scores of the token that belongs at every position, by the head of BERT: a layer, GELU and a norm, then the weight
    /// of the embedding with a bias of its own.
    MaskedToken,
    /// The hidden vector of every position: an encoder without a head.
    Hidden,
}

impl Gives {
    /// What a sequence's vector is read off: as the class head does, else the mean.
    pub fn pool(&self) -> Pool {
        match self {
            Gives::Class { pool, .. } => *pool,
            _ => Pool::Mean,
        }
    }

    /// A linear classifier of one sequence.
    pub fn class(classes: usize, pool: Pool) -> Self {
        Gives::Class {
            classes,
            pool,
            hidden: 0,
            pair: Pair::None,
        }
    }
}

/// A whole model. Every key has a default but `reads` and `gives`, which tasks fill in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub dim: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Token mixers, repeated along the depth: one entry for all layers, several for a hybrid.
    pub mixers: Vec<MixerSpec>,
    /// Channel mixer of every block; `none` leaves it out.
    pub channel: MixerSpec,
    /// Layers with weights of their own, used in turn along the depth; 0: every layer has its own.
    pub share_layers: usize,
    /// Numbers of layers after which a norm and a head of their own give an answer too, in rising order: where a
    /// confident model may stop.
    pub exits: Vec<usize>,
    /// How sub-layers join the residual stream.
    pub wiring: Wiring,
    /// Two residual streams instead of one, each changed by functions of the other, so that the backward pass takes layers
    /// back instead of keeping their activations (Gomez et al., RevNet, arXiv 1707.04585; Reformer, arXiv 2001.04451).
    pub reversible: bool,
    /// Parts in which the channel mixer runs over the tokens, one after the other, each run again in the backward pass; 0
    /// and 1: all at once. The result is the same.
    pub ff_chunks: usize,
    /// The normalisation.
    pub norm: NormKind,
    /// Added to the variance.
    pub norm_eps: f64,
    /// Positions added to the embedding.
    pub positions: Positions,
    /// Longest sequence that learned positions can name.
    pub max_time: usize,
    /// Number of token types (segments), each with a learned vector added to the embedding; 0 for none.
    pub token_types: usize,
    /// A norm over the embedding, positions and types added.
    pub embed_norm: bool,
    /// Width of the embedding, positions and types, which a layer then takes to `dim`, as in ALBERT (Lan et al., 2020,
    /// arXiv 1909.11942); 0: `dim`, and no layer.
    pub embed_dim: usize,
    /// Places of a convolution along the tokens, both ways, beside the first block; 0: none.
    pub first_conv: usize,
    /// The function of what that convolution gives.
    pub first_conv_activation: Activation,
    /// The function between the layers of the head; absent: ReLU for classes, GELU for masked tokens.
    pub head_activation: Option<Activation>,
    /// Biases in the layers of a class head.
    pub head_bias: bool,
    /// Standard deviation of initial linear weights; absent: uniform in ±1/sqrt(fan_in).
    pub initializer_range: Option<f32>,
    /// Standard deviation of initial token vectors. Sinusoids have entries of size 1: beside them small vectors are hard
    /// to see.
    pub embed_std: f32,
    /// Multiply the initial weights that write into the residual stream by 1/sqrt(number of such layers).
    pub scale_residual: bool,
    /// Chance with which values of the embedding and of what mixers add are zeroed in training (Srivastava et al., 2014).
    pub dropout: f64,
    /// Precision of the products of linear layers, and of exact attention with more than a few queries.
    pub precision: Precision,
    /// What the model reads.
    pub reads: Reads,
    /// What it gives.
    pub gives: Gives,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            dim: 64,
            layers: 2,
            mixers: vec![MixerSpec::named("attention")],
            channel: MixerSpec::named("swiglu"),
            share_layers: 0,
            exits: Vec::new(),
            wiring: Wiring::PreNorm,
            reversible: false,
            ff_chunks: 0,
            norm: NormKind::Rms,
            norm_eps: 1e-5,
            positions: Positions::None,
            max_time: 2048,
            token_types: 0,
            embed_norm: false,
            embed_dim: 0,
            first_conv: 0,
            first_conv_activation: Activation::Tanh,
            head_activation: None,
            head_bias: true,
            initializer_range: None,
            embed_std: 0.02,
            scale_residual: true,
            dropout: 0.0,
            precision: Precision::F32,
            reads: Reads::Tokens { vocab: 256 },
            gives: Gives::NextToken { tied: true },
        }
    }
}

/// A model that cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A key that no config has.
    #[error("read the model config: unknown key {key:?}{hint}")]
    UnknownKey {
        /// The key.
        key: String,
        /// `; did you mean …?` or empty.
        hint: String,
    },
    /// A value that cannot be read.
    #[error("read the model config: {0}")]
    Value(String),
    /// A mixer's own complaint.
    #[error(transparent)]
    Mixer(#[from] ConfigError),
    /// A combination that cannot be.
    #[error("build the model: {0}")]
    Impossible(String),
    /// An input that does not fit the model.
    #[error("run the model: {0}")]
    Input(String),
    /// A state was asked of a mixer that has none.
    #[error(transparent)]
    State(#[from] anyformer_mixers::RunError),
}

impl ModelConfig {
    /// The most tokens that learned positions can name; no bound without them.
    pub fn longest(&self) -> usize {
        match self.positions {
            Positions::Learned => self.max_time,
            _ => usize::MAX,
        }
    }

    /// Reads a config from JSON, refusing unknown keys with the nearest one.
    pub fn from_json(value: &Value) -> Result<Self, ModelError> {
        let Value::Object(map) = value else {
            return Err(ModelError::Value(format!("expected a table, got {value}")));
        };
        let known = Self::default().to_json();
        for key in map.keys() {
            if !known.contains_key(key) {
                let hint = nearest_name(key, known.keys().map(String::as_str));
                return Err(ModelError::UnknownKey {
                    key: key.clone(),
                    hint: hint.map_or(String::new(), |hint| format!("; did you mean {hint:?}?")),
                });
            }
        }
        let config: ModelConfig = serde_json::from_value(value.clone())
            .map_err(|error| ModelError::Value(error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// The config as JSON, every key present.
    pub fn to_json(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map,
            other => panic!("a config serialises to a map, not {other:?}"),
        }
    }

    /// The mixer of layer `layer`.
    pub fn mixer(&self, layer: usize) -> &MixerSpec {
        &self.mixers[layer % self.mixers.len()]
    }

    /// How many scores an answer has; none where there is no head.
    pub fn scores(&self) -> Option<usize> {
        match (self.gives, self.reads) {
            (Gives::Class { classes, .. }, _) => Some(classes),
            (Gives::Hidden, _) => None,
            (_, Reads::Tokens { vocab }) => Some(vocab),
            (_, Reads::Patches { .. }) => None,
        }
    }

    /// Layers with weights of their own.
    pub fn unique_layers(&self) -> usize {
        match self.share_layers {
            0 => self.layers,
            unique => unique.min(self.layers),
        }
    }

    /// Whether every mixer can carry a state, so that the model can generate token by token.
    pub fn streams(&self) -> bool {
        let streams = |spec: &MixerSpec| {
            token_mixer(&spec.name).is_ok_and(|entry| entry.streams(&spec.options))
        };
        self.mixers.iter().all(streams)
    }

    /// Whether every mixer looks back only, so that the model can be trained to give the next token.
    pub fn causal(&self) -> bool {
        let causal = |spec: &MixerSpec| {
            token_mixer(&spec.name).is_ok_and(|entry| entry.causal(&spec.options))
        };
        self.mixers.iter().all(causal)
    }

    /// Numbers of tokens along rows and columns, for patches.
    pub fn grid(&self) -> Option<[usize; 2]> {
        match self.reads {
            Reads::Tokens { .. } => None,
            Reads::Patches {
                height,
                width,
                patch,
                ..
            } => Some([height / patch, width / patch]),
        }
    }
}

#[cfg(test)]
mod tests;
