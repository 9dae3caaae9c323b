//! Checkpoints of other programs: their config and their names, translated onto our block and back.
//!
//! A family is a map of names and a translation of the config; the model that is built is ours. What our block cannot do
//! is refused by the key that asks for it, so a checkpoint is never read into a model that computes something else.

mod albert;
mod bert;
mod classes;
mod deberta;
mod fla;
mod gpt2;
mod gpt_neox;
mod keys;
mod llama;
mod mamba;
mod mamba_ssm;
pub(crate) mod names;
mod opt;

use std::collections::BTreeMap;

use anyformer_mixers::{channel_mixer, token_mixer};
use anyformer_models::{Gives, ModelConfig, Positions};
use anyformer_ops::ParamStore;
use serde_json::{Map, Value, json};

use crate::tensors::NamedTensor;
use keys::Keys;
use names::{Name, Place};

/// What one family file holds.
struct Layout {
    /// The `model_type`s that it reads.
    kinds: &'static [&'static str],
    /// What stands before the names of a model with a head, and is left out by some files.
    prefix: &'static str,
    names: fn(kind: &str) -> &'static [Name],
    /// Endings of tensors that the model needs not: buffers that follow from the config, heads that are not read.
    spare: &'static [&'static str],
    /// Our config for theirs. Every key that asks for something else than we compute is an error that names it.
    read: fn(&Keys, kind: &str) -> Result<Value, String>,
    /// Their config for ours, every key of our mixers filled in; what does not come back equal does not fit.
    write: fn(&Value, kind: &str) -> Result<Value, String>,
}

static LAYOUTS: &[&Layout] = &[
    &llama::LAYOUT,
    &gpt2::LAYOUT,
    &opt::LAYOUT,
    &gpt_neox::LAYOUT,
    &mamba::LAYOUT,
    &mamba_ssm::LAYOUT,
    &fla::LAYOUT,
    &bert::BERT,
    &bert::ROBERTA,
    &bert::DISTILBERT,
    &albert::LAYOUT,
    &deberta::LAYOUT,
];

/// A `model_type` whose folders can be read and written.
#[derive(Clone, Copy)]
pub struct Family {
    kind: &'static str,
    layout: &'static Layout,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind)
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
    }
}

impl Eq for Family {}

/// The layouts of GGUF files: the same configs, other names.
static GGUF: Layout = Layout {
    kinds: &["llama", "qwen2", "qwen3"],
    prefix: "",
    names: crate::gguf::names,
    spare: &[],
    ..llama::LAYOUT_OF
};

/// The family of a GGUF architecture.
pub(crate) fn gguf_family(kind: &str) -> Option<Family> {
    let layout = &GGUF;
    let kind = layout.kinds.iter().find(|known| **known == kind)?;
    Some(Family { kind, layout })
}

impl Family {
    /// Every `model_type` that can be read.
    pub fn all() -> impl Iterator<Item = Family> {
        LAYOUTS.iter().flat_map(|layout| {
            let layout: &'static Layout = layout;
            layout.kinds.iter().map(move |kind| Family { kind, layout })
        })
    }

    /// The `model_type`.
    pub fn kind(self) -> &'static str {
        self.kind
    }

    /// The family of that `model_type`.
    pub fn named(kind: &str) -> Option<Family> {
        Family::all().find(|family| family.kind == kind)
    }

    /// The family of a config, or what is wrong with it.
    pub fn of(config: &Value) -> Result<Family, String> {
        let known = || {
            let names: Vec<&str> = Family::all().map(Family::kind).collect();
            format!("known are anyformer, {}", names.join(", "))
        };
        let kind = config.get("model_type").and_then(Value::as_str);
        let Some(kind) = kind.or_else(|| mamba_ssm::kind(config)) else {
            return Err(format!("no key \"model_type\"; {}", known()));
        };
        Family::named(kind)
            .ok_or_else(|| format!("model_type {kind:?} cannot be read; {}", known()))
    }

    /// Our config for theirs. Every key that asks for something else than we compute is an error that names it.
    pub fn config(self, theirs: &Value) -> Result<ModelConfig, String> {
        let ours = (self.layout.read)(&Keys(theirs), self.kind)?;
        ModelConfig::from_json(&ours).map_err(|error| error.to_string())
    }

    /// Their name of the tensor that holds one of our parameters.
    pub fn their_name(self, ours: &str) -> Option<String> {
        Place::find((self.layout.names)(self.kind), ours, [1, 1]).map(|place| place.name)
    }

    /// Where our parameters lie in their tensors, of which `given` are there; ours by name. Some programs leave the first
    /// part of the names out.
    pub(crate) fn places<'a>(
        self,
        config: &ModelConfig,
        store: &ParamStore,
        given: impl Iterator<Item = &'a str>,
    ) -> Result<BTreeMap<String, Place>, String> {
        let prefix = self.layout.prefix;
        let bare = !prefix.is_empty() && !given.into_iter().any(|name| name.starts_with(prefix));
        let heads = heads(config);
        let map = (self.layout.names)(self.kind);
        let of = |name: &str| {
            let mut place = Place::find(map, name, heads).ok_or_else(|| {
                format!(
                    "parameter {name} has no name in models of type {}",
                    self.kind
                )
            })?;
            if bare && let Some(rest) = place.name.strip_prefix(prefix) {
                place.name = rest.to_string();
            }
            Ok((name.to_string(), place))
        };
        store
            .params()
            .iter()
            .map(|param| of(param.name()))
            .collect()
    }

    /// Whether the model does not need a tensor of that name.
    pub(crate) fn is_spare(self, name: &str, config: &ModelConfig) -> bool {
        let tied = matches!(config.gives, Gives::NextToken { tied: true });
        let head = ["lm_head.weight", "embed_out.weight"].contains(&name);
        let spare = self
            .layout
            .spare
            .iter()
            .any(|part| match part.strip_suffix('*') {
                Some(front) => name.starts_with(front) || name.contains(&format!(".{front}")),
                None => name.ends_with(part),
            });
        tied && head || spare
    }

    /// Their config for ours, or why this family cannot express the model.
    pub fn export(self, config: &ModelConfig) -> Result<Value, String> {
        let ours = resolved(config)?;
        let mut theirs = (self.layout.write)(&ours, self.kind)?;
        match theirs.as_object_mut() {
            // A layout without that key.
            Some(map) if map.get("model_type") == Some(&Value::Null) => {
                map.remove("model_type");
            }
            _ => theirs["model_type"] = json!(self.kind),
        }
        let mut back = resolved(&self.config(&theirs)?)?;
        if config.positions != Positions::Learned {
            // Without a table of positions it has no effect.
            back["max_time"] = ours["max_time"].clone();
        }
        match difference("", &ours, &back) {
            None => Ok(theirs),
            Some(what) => Err(what),
        }
    }

    /// The family that can express a model, with its config; or why each cannot.
    pub fn fitting(config: &ModelConfig) -> Result<(Family, Value), String> {
        let mut reasons = String::new();
        for family in Family::all() {
            match family.export(config) {
                Ok(theirs) => return Ok((family, theirs)),
                Err(reason) => reasons += &format!("\n  {}: {reason}", family.kind),
            }
        }
        Err(format!("no family has this model:{reasons}"))
    }

    /// Every tensor of a model under their names and in their shapes.
    pub(crate) fn tensors(
        self,
        config: &ModelConfig,
        store: &ParamStore,
    ) -> Result<Vec<NamedTensor>, String> {
        // A model without a head has the short names.
        let with_prefix = match config.gives {
            Gives::Hidden => "",
            _ => self.layout.prefix,
        };
        let places = self.places(config, store, std::iter::once(with_prefix))?;
        let mut tensors: Vec<NamedTensor> = Vec::new();
        for param in store.params() {
            let place = &places[param.name()];
            let shape = place.shape(param.shape());
            let at = tensors.iter().position(|held| held.name == place.name);
            let at = at.unwrap_or_else(|| {
                tensors.push(NamedTensor {
                    name: place.name.clone(),
                    values: vec![0.0; shape.iter().product()],
                    shape,
                });
                tensors.len() - 1
            });
            put(place, param.shape(), &param.values(), &mut tensors[at]);
        }
        Ok(tensors)
    }
}

/// Writes our rows into their tensor.
fn put(place: &Place, shape: &[usize], values: &[f32], tensor: &mut NamedTensor) {
    let rows = shape.first().copied().unwrap_or(1);
    let columns = (values.len() / rows.max(1)).max(1);
    let theirs = tensor.values.len() / columns;
    for (row, values) in values.chunks(columns).enumerate() {
        let row = place.row(row, rows);
        match place.transposed && shape.len() == 2 {
            false => tensor.values[row * columns..][..columns].copy_from_slice(values),
            true => {
                for (column, value) in values.iter().enumerate() {
                    tensor.values[column * theirs + row] = *value;
                }
            }
        }
    }
}

/// Query and key heads of the first mixer that has any.
fn heads(config: &ModelConfig) -> [usize; 2] {
    let Ok(ours) = resolved(config) else {
        return [1, 1];
    };
    let number = |key: &str| ours["mixers"][0][key].as_u64().unwrap_or(0) as usize;
    let heads = number("heads");
    match number("kv_heads") {
        0 => [heads, heads],
        keys => [heads, keys],
    }
}

/// A config with every key of its mixers filled in and a mixer for every layer, without what matters to training only.
pub(crate) fn resolved(config: &ModelConfig) -> Result<Value, String> {
    let mut ours = config.to_json();
    let fill = |name: &str, options: Result<Map<String, Value>, anyformer_mixers::ConfigError>| {
        let mut options = options.map_err(|error| error.to_string())?;
        options.insert("name".into(), json!(name));
        Ok::<Value, String>(Value::Object(options))
    };
    let mixers = (0..config.layers.min(1 << 16)).map(|layer| {
        let spec = config.mixer(layer);
        let entry = token_mixer(&spec.name).map_err(|error| error.to_string())?;
        let mut mixer = fill(&spec.name, (entry.resolve)(&spec.options))?;
        if mixer["name"] == "local" && mixer["lra_compat"] == json!(false) {
            mixer["name"] = json!("attention");
            if let Some(mixer) = mixer.as_object_mut() {
                mixer.remove("lra_compat");
            }
        }
        if mixer["name"] == "attention" {
            complete(&mut mixer, config.dim as u64);
        }
        Ok(mixer)
    });
    let mixers: Result<Vec<Value>, String> = mixers.collect();
    ours.insert("mixers".into(), Value::Array(mixers?));
    let spec = &config.channel;
    let entry = channel_mixer(&spec.name).map_err(|error| error.to_string())?;
    let mut channel = fill(&spec.name, (entry.resolve)(&spec.options))?;
    if channel["hidden"] == json!(0) {
        channel["hidden"] = json!(match spec.name.as_str() {
            "swiglu" => (config.dim * 8 / 3).next_multiple_of(8),
            _ => 4 * config.dim,
        });
    }
    ours.insert("channel".into(), channel);
    classes::complete(&mut ours);
    // What matters to training only, or is the same function either way.
    for key in [
        "initializer_range",
        "scale_residual",
        "embed_std",
        "ff_chunks",
        "dropout",
    ] {
        ours.remove(key);
    }
    Ok(Value::Object(ours))
}

/// Their words for what stands between the layers of an MLP, with ours.
const ACTIVATIONS: &[(&str, &str)] = &[
    ("gelu", "gelu"),
    ("gelu_new", "gelu_tanh"),
    ("gelu_pytorch_tanh", "gelu_tanh"),
    ("relu", "relu"),
    ("silu", "silu"),
];

/// Their word for one of ours by a table of both, or the other.
fn word(
    table: &[(&'static str, &'static str)],
    ours: &Value,
    otherwise: &'static str,
) -> &'static str {
    let found = table.iter().find(|(_, word)| ours == word);
    found.map_or(otherwise, |(theirs, _)| theirs)
}

/// Their word for the activation of one of our MLPs.
fn their_activation(channel: &Value) -> &'static str {
    word(ACTIVATIONS, &channel["activation"], "gelu")
}

/// The first token mixer and the channel mixer of a resolved config, if they are of these kinds.
fn parts<'a>(
    ours: &'a Value,
    mixer: &str,
    channel: &str,
) -> Result<(&'a Value, &'a Value), String> {
    let found = (&ours["mixers"][0], &ours["channel"]);
    let names = (found.0["name"].as_str(), found.1["name"].as_str());
    match names == (Some(mixer), Some(channel)) {
        true => Ok(found),
        false => Err(format!(
            "it is made of {mixer} and {channel}, this of {} and {}",
            found.0["name"], found.1["name"]
        )),
    }
}

/// Fills in what attention derives from other keys, and drops what then has no effect.
fn complete(mixer: &mut Value, dim: u64) {
    let number = |mixer: &Value, key: &str| mixer[key].as_u64().unwrap_or(0);
    let heads = number(mixer, "heads").max(1);
    if number(mixer, "head_dim") == 0 {
        mixer["head_dim"] = json!(dim / heads);
    }
    // A published choice of head counts has no name elsewhere; it stays and will not come back equal.
    if mixer["variant"] == "explicit" || mixer["variant"] == "mha" {
        mixer["variant"] = json!("explicit");
        let queries = match number(mixer, "query_heads") {
            0 => heads,
            given => given,
        };
        if number(mixer, "kv_heads") == 0 {
            mixer["kv_heads"] = json!(queries);
        }
        mixer["heads"] = json!(queries);
        mixer["query_heads"] = json!(queries);
    }
    if number(mixer, "rope_dim") == number(mixer, "head_dim") {
        mixer["rope_dim"] = json!(0);
    }
    if mixer["bias"] == json!(true) {
        mixer["qkv_bias"] = json!(true);
    }
    if mixer["position"] != "rope" {
        for key in ["rope_base", "rope_dim", "rope_scaling"] {
            mixer[key] = Value::Null;
        }
    }
    if mixer["qk_norm"] == json!(false) && mixer["position_norm"] == json!(false) {
        mixer["norm_eps"] = Value::Null;
    }
}

/// The first place where two configs differ, in words.
fn difference(path: &str, ours: &Value, back: &Value) -> Option<String> {
    let below = |key: &str| match path {
        "" => key.to_string(),
        path => format!("{path}.{key}"),
    };
    match (ours, back) {
        (Value::Object(a), Value::Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            keys.into_iter().find_map(|key| {
                let of = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                difference(&below(key), &of(a), &of(b))
            })
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => a
            .iter()
            .zip(b)
            .enumerate()
            .find_map(|(at, (a, b))| difference(&below(&at.to_string()), a, b)),
        (Value::Number(a), Value::Number(b)) if a.as_f64() == b.as_f64() => None,
        (a, b) if a == b => None,
        (a, b) => Some(format!("{path} is {a}, there it would be {b}")),
    }
}

#[cfg(test)]
mod tests;
