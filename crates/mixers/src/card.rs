//! What is true of an architecture, as data. Lists, docs, config errors and tests derive from it.

use anyformer_ops::Builder;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::mixer::{ChannelMixer, TokenMixer};

/// In which directions a token mixer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Output `t` depends on inputs up to `t` only.
    Causal,
    /// Every output may depend on every input.
    Bidirectional,
    /// The knob `causal` chooses.
    Either,
}

/// One knob of a config: its name and what it does. Its default is the config type's own.
#[derive(Clone, Copy, Debug)]
pub struct Knob {
    /// The key in TOML and JSON.
    pub name: &'static str,
    /// One line, with the unit.
    pub doc: &'static str,
}

/// Of mixers with attention.
pub(crate) const WEIGHT_DROPOUT: Knob = Knob {
    name: "dropout",
    doc: "chance with which a weight of attention is dropped in training",
};

/// Of channel mixers.
pub(crate) const HIDDEN_DROPOUT: Knob = Knob {
    name: "dropout",
    doc: "chance with which a hidden value is zeroed in training",
};

/// A chance of dropout, if it is one.
pub(crate) fn chance(card: &Card, dropout: f64) -> Result<f64, ConfigError> {
    match (0.0..1.0).contains(&(dropout as f32)) {
        true => Ok(dropout),
        false => Err(ConfigError::Impossible {
            mixer: card.name,
            message: format!("dropout must be at least 0 and below 1, got {dropout}"),
        }),
    }
}

/// A published model built from this mixer: a whole model config in JSON, of which the mixer is a part.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// The published size: `130m`.
    pub name: &'static str,
    /// The model config (see `anyformer_models::ModelConfig`).
    pub model: &'static str,
}

/// What is true of an architecture.
#[derive(Debug)]
pub struct Card {
    /// The name of the file and of the config value.
    pub name: &'static str,
    /// The name in prose.
    pub title: &'static str,
    /// Title, authors, venue, arXiv number.
    pub paper: &'static str,
    /// The defining equation, in plain text, one line per step.
    pub equation: &'static str,
    /// Directions, for a token mixer; channel mixers are `Either`.
    pub direction: Direction,
    /// True when a state can be carried from call to call (in its causal form).
    pub streams: bool,
    /// State after `t` tokens in words: `constant` or `grows with time`.
    pub state: &'static str,
    /// What to know before choosing it: strengths, weaknesses, deviations from the paper.
    pub notes: &'static str,
    /// Every key of the config.
    pub knobs: &'static [Knob],
    /// Published sizes.
    pub presets: &'static [Preset],
}

/// A config that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such mixer.
    #[error("find {kind} {name:?}: no such name{}; `anyformer list` shows all", nearest(.hint))]
    UnknownMixer {
        /// `token mixer` or `channel mixer`.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// The nearest name.
        hint: Option<String>,
    },
    /// No such key.
    #[error("read the config of {mixer}: unknown key {key:?}{}; its keys are: {known}", nearest(.hint))]
    UnknownKey {
        /// The mixer.
        mixer: String,
        /// The key.
        key: String,
        /// The nearest key.
        hint: Option<String>,
        /// All keys.
        known: String,
    },
    /// A value of the wrong type.
    #[error("read the config of {mixer}: {message}")]
    WrongType {
        /// The mixer.
        mixer: String,
        /// What the reader said.
        message: String,
    },
    /// A combination that cannot be.
    #[error("build {mixer}: {message}")]
    Impossible {
        /// The mixer.
        mixer: &'static str,
        /// Expected, got, and what to change.
        message: String,
    },
}

fn nearest(hint: &Option<String>) -> String {
    match hint {
        Some(hint) => format!("; did you mean {hint:?}?"),
        None => String::new(),
    }
}

/// The candidate closest to `name`, if any is close enough to be meant.
pub fn nearest_name<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_string())
}

/// A map of config keys to values: `{"heads": 4}`.
pub type Options = Map<String, Value>;

/// One registered architecture.
pub struct Entry<M: ?Sized> {
    /// Its card.
    pub card: &'static Card,
    /// The config with every default filled in, or what is wrong with it.
    pub resolve: fn(&Options) -> Result<Options, ConfigError>,
    /// Builds it for a model of width `dim`, its parameters under `builder`.
    pub build: fn(dim: usize, options: &Options, builder: &Builder) -> Result<Box<M>, ConfigError>,
}

/// A registered token mixer.
pub type TokenEntry = Entry<dyn TokenMixer>;
/// A registered channel mixer.
pub type ChannelEntry = Entry<dyn ChannelMixer>;

impl TokenEntry {
    /// Whether the mixer looks back only, in this config.
    pub fn causal(&self, options: &Options) -> bool {
        match self.card.direction {
            Direction::Causal => true,
            Direction::Bidirectional => false,
            Direction::Either => {
                let resolved = (self.resolve)(options).unwrap_or_default();
                resolved.get("causal") == Some(&Value::Bool(true))
            }
        }
    }

    /// Whether a state can be carried from call to call, in this config.
    pub fn streams(&self, options: &Options) -> bool {
        self.card.streams && self.causal(options)
    }
}

/// Reads a config type from `options`, refusing unknown keys with the nearest one.
pub fn read<C>(card: &Card, options: &Options) -> Result<C, ConfigError>
where
    C: DeserializeOwned + Serialize + Default,
{
    let known = defaults::<C>();
    for key in options.keys() {
        if !known.contains_key(key) {
            return Err(ConfigError::UnknownKey {
                mixer: card.name.to_string(),
                key: key.clone(),
                hint: nearest_name(key, known.keys().map(String::as_str)),
                known: known.keys().cloned().collect::<Vec<_>>().join(", "),
            });
        }
    }
    serde_json::from_value(Value::Object(options.clone())).map_err(|error| ConfigError::WrongType {
        mixer: card.name.to_string(),
        message: error.to_string(),
    })
}

/// Every key of a config type with its default.
pub fn defaults<C: Serialize + Default>() -> Options {
    match serde_json::to_value(C::default()) {
        Ok(Value::Object(map)) => map,
        other => panic!("a config serialises to a map, not {other:?}"),
    }
}

/// The body of every [`Entry::resolve`].
pub fn resolve<C>(card: &Card, options: &Options) -> Result<Options, ConfigError>
where
    C: DeserializeOwned + Serialize + Default,
{
    let config: C = read(card, options)?;
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => Ok(map),
        other => panic!("a config serialises to a map, not {other:?}"),
    }
}

/// `heads` must divide `dim`: the check that every multi-head mixer makes.
pub fn head_dim(card: &'static Card, dim: usize, heads: usize) -> Result<usize, ConfigError> {
    if heads == 0 || !dim.is_multiple_of(heads) {
        return Err(ConfigError::Impossible {
            mixer: card.name,
            message: format!(
                "dim {dim} is not divisible by heads {heads}; choose heads among {:?}",
                (1..=dim.min(64))
                    .filter(|heads| dim.is_multiple_of(*heads))
                    .collect::<Vec<_>>()
            ),
        });
    }
    Ok(dim / heads)
}

/// A mixer by name with its knobs, as it stands in a config: `{ name = "gla", heads = 4 }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MixerSpec {
    /// The registered name.
    pub name: String,
    /// The knobs that differ from the defaults.
    #[serde(flatten)]
    pub options: Options,
}

impl MixerSpec {
    /// A mixer with all its defaults.
    pub fn named(name: &str) -> Self {
        MixerSpec {
            name: name.to_string(),
            options: Options::new(),
        }
    }
}
