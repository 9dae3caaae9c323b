//! The config of a model: what a run file's `[model]` table and a model folder's `config.json` hold.

use anyformer_mixers::card::nearest_name;
use anyformer_mixers::mlp::Activation;
use anyformer_mixers::{ConfigError, MixerSpec, channel_mixer, token_mixer};
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

/// To what the operands of linear layers' products are rounded, forward and backward. Parameters, sums, states and the
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

/// The most layers that share their weights: nothing else bounds how long such a model runs.
const MOST_SHARED: usize = 1024;

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
    /// Precision of the products of linear layers.
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

    /// Refuses shared layers and narrow embeddings where they cannot be.
    fn check_sizes(&self) -> Result<(), ModelError> {
        let impossible = |message: String| Err(ModelError::Impossible(message));
        if self.share_layers > 0 && self.layers > MOST_SHARED {
            return impossible(format!(
                "share_layers is for at most {MOST_SHARED} layers, got {} layers",
                self.layers
            ));
        }
        if self.first_conv > 0 && (self.streams() || self.first_conv.is_multiple_of(2)) {
            return impossible(
                "first_conv is odd and looks both ways: the mixers must, too".into(),
            );
        }
        if self.embed_dim == 0 {
            return Ok(());
        }
        let tied = matches!(self.gives, Gives::NextToken { tied: true });
        let token = matches!(
            self.gives,
            Gives::Class {
                pool: Pool::Cls,
                ..
            }
        );
        match self.reads {
            Reads::Patches { .. } => {
                impossible("embed_dim is of token vectors, not of patches".into())
            }
            _ if token => impossible("embed_dim does not go with pool = \"cls\"".into()),
            _ if tied && self.embed_dim != self.dim => impossible(format!(
                "a head tied to vectors of embed_dim {} cannot score rows of dim {}; set tied = false",
                self.embed_dim, self.dim
            )),
            _ => Ok(()),
        }
    }

    /// Refuses two streams and chunks where they would be another function.
    fn check_memory(&self) -> Result<(), ModelError> {
        let impossible = |message: &str| Err(ModelError::Impossible(message.into()));
        if self.reversible && self.wiring == Wiring::PostNorm {
            return impossible(
                "reversible adds to streams that a norm after the sum would change; set wiring = \"pre_norm\" or \"parallel\"",
            );
        }
        if self.reversible && self.first_conv > 0 {
            return impossible(
                "first_conv stands beside the first layer of one stream; set reversible = false or first_conv = 0",
            );
        }
        if self.ff_chunks > 1 && self.channel.name == "moe" {
            return impossible(
                "ff_chunks would balance the experts chunk by chunk; take another channel mixer or ff_chunks = 0",
            );
        }
        Ok(())
    }

    /// Refuses what cannot be built, before anything is allocated. The mixers check their own knobs when built.
    pub fn check(&self) -> Result<(), ModelError> {
        let impossible = |message: String| Err(ModelError::Impossible(message));
        let (dim, layers) = (self.dim, self.layers);
        if dim == 0 || layers == 0 {
            return impossible(format!("dim {dim} and layers {layers} must be at least 1"));
        }
        if !(self.embed_std > 0.0 && self.embed_std.is_finite()) {
            return impossible(format!("embed_std {} must be above 0", self.embed_std));
        }
        if !(0.0..1.0).contains(&(self.dropout as f32)) {
            let got = self.dropout;
            return impossible(format!("dropout must be at least 0 and below 1, got {got}"));
        }
        if self.mixers.is_empty() {
            return impossible("mixers is empty; name at least one, as { name = \"gla\" }".into());
        }
        for spec in &self.mixers {
            (token_mixer(&spec.name)?.resolve)(&spec.options)?;
        }
        let (unique, mixers) = (self.unique_layers(), self.mixers.len());
        let same = self.mixers.iter().all(|mixer| *mixer == self.mixers[0]);
        if unique < self.layers && !same && !unique.is_multiple_of(mixers) {
            return impossible(format!(
                "share_layers {unique} gives layers the weights of others that have another mixer; make it a multiple of the {mixers} mixers"
            ));
        }
        let rising = self.exits.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = |exit: &usize| (1..self.layers).contains(exit);
        if !rising || !self.exits.iter().all(inside) {
            return impossible(format!(
                "exits {:?} must be rising numbers from 1 to {}: after so many of the {} layers",
                self.exits,
                self.layers - 1,
                self.layers
            ));
        }
        if !self.exits.is_empty() && self.gives == Gives::Hidden {
            return impossible(
                "exits give answers, and a model that gives hidden has no head".into(),
            );
        }
        (channel_mixer(&self.channel.name)?.resolve)(&self.channel.options)?;
        self.check_sizes()?;
        self.check_memory()?;
        match self.reads {
            Reads::Tokens { vocab: 0 } => impossible("vocab must be at least 1".into()),
            Reads::Patches {
                height,
                width,
                channels,
                patch,
            } => {
                let fits = patch > 0 && height % patch == 0 && width % patch == 0;
                if !fits || height * width * channels == 0 {
                    return impossible(format!(
                        "patch {patch} does not divide a picture of {height} x {width} x {channels}"
                    ));
                }
                match self.gives {
                    Gives::NextToken { .. } | Gives::MaskedToken => {
                        impossible("a model that reads patches gives a class, not tokens".into())
                    }
                    _ if self.token_types > 0 => {
                        impossible("a model that reads patches has no token_types".into())
                    }
                    Gives::Class { .. } | Gives::Hidden => Ok(()),
                }
            }
            Reads::Tokens { .. } => match self.gives {
                Gives::NextToken { .. } if !self.causal() => {
                    let names: Vec<&str> =
                        self.mixers.iter().map(|spec| spec.name.as_str()).collect();
                    impossible(format!(
                        "a model that gives the next token must not see it, and a mixer of {names:?} looks ahead; set its causal knob, take another mixer, or a task that gives a class"
                    ))
                }
                Gives::Class { classes: 0, .. } => impossible("classes must be at least 1".into()),
                _ => Ok(()),
            },
        }
    }
}

#[cfg(test)]
mod tests;
