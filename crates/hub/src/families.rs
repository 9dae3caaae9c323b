//! Checkpoints of other programs: their config and their names, translated onto our block.
//!
//! A family is a map of names and a translation of the config; the model that is built is ours. What our block cannot do
//! is refused by the key that asks for it, so a checkpoint is never read into a model that computes something else.

use std::collections::HashMap;

use anyformer_models::{Gives, ModelConfig};
use anyformer_ops::{Param, ParamStore};
use serde_json::{Value, json};

use crate::tensors::NamedTensor;

/// A layout of `config.json` and `model.safetensors` as Hugging Face transformers writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama and Mistral: rotary grouped attention, perhaps in a window, and SwiGLU.
    Llama,
    /// Mamba.
    Mamba,
    /// Mamba-2.
    Mamba2,
}

/// Every `model_type` that can be read, with its family.
pub const MODEL_TYPES: &[(&str, Family)] = &[
    ("llama", Family::Llama),
    ("mistral", Family::Llama),
    ("mamba", Family::Mamba),
    ("mamba2", Family::Mamba2),
];

/// Parts of our names with theirs; the first that fits a whole name or begins it, then those inside.
const LLAMA: &[(&str, &str)] = &[
    ("embed.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("layers.", "model.layers."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".mixer.", ".self_attn."),
    (".channel.", ".mlp."),
];
const MAMBA: &[(&str, &str)] = &[
    ("embed.weight", "backbone.embeddings.weight"),
    ("norm.weight", "backbone.norm_f.weight"),
    ("layers.", "backbone.layers."),
    (".norm1.", ".norm."),
];

impl Family {
    /// The family of a config, or what is wrong with it.
    pub fn of(config: &Value) -> Result<Family, String> {
        let known = || {
            let names: Vec<&str> = MODEL_TYPES.iter().map(|(name, _)| *name).collect();
            format!("known are anyformer, {}", names.join(", "))
        };
        let Some(kind) = config.get("model_type").and_then(Value::as_str) else {
            return Err(format!("no key \"model_type\"; {}", known()));
        };
        let found = MODEL_TYPES.iter().find(|(name, _)| *name == kind);
        found
            .map(|(_, family)| *family)
            .ok_or_else(|| format!("model_type {kind:?} cannot be read; {}", known()))
    }

    /// Their name of one of our parameters.
    pub fn their_name(self, ours: &str) -> String {
        let map = match self {
            Family::Llama => LLAMA,
            Family::Mamba | Family::Mamba2 => MAMBA,
        };
        if let Some((_, theirs)) = map.iter().find(|(name, _)| *name == ours) {
            return theirs.to_string();
        }
        let inner = |name: String, (from, to): &(&str, &str)| match from.starts_with('.') {
            true => name.replace(from, to),
            false => match name.strip_prefix(from) {
                Some(rest) => format!("{to}{rest}"),
                None => name,
            },
        };
        map.iter().fold(ours.to_string(), inner)
    }

    /// Gives tensors our names where the model has them. Left out are those that the model lacks and needs not: buffers
    /// that follow from the config, and the head of a model that shares it with the embedding.
    pub(crate) fn rename(
        self,
        tensors: &mut Vec<NamedTensor>,
        store: &ParamStore,
        config: &ModelConfig,
    ) {
        let names = store.params().iter().map(Param::name);
        let ours: HashMap<String, &str> = names.map(|name| (self.their_name(name), name)).collect();
        let tied = matches!(config.gives, Gives::NextToken { tied: true });
        let needless = |name: &str| {
            name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight")
        };
        tensors.retain(|tensor| ours.contains_key(&tensor.name) || !needless(&tensor.name));
        for tensor in tensors {
            if let Some(name) = ours.get(&tensor.name) {
                tensor.name = name.to_string();
            }
        }
    }

    /// Our config for theirs. Every key that asks for something else than we compute is an error that names it.
    pub fn config(self, theirs: &Value) -> Result<ModelConfig, String> {
        let keys = Keys(theirs);
        let (mixer, channel, eps, tied) = match self {
            Family::Llama => llama(&keys)?,
            Family::Mamba => mamba(&keys)?,
            Family::Mamba2 => mamba2(&keys)?,
        };
        let ours = json!({
            "dim": keys.number("hidden_size")?,
            "layers": keys.number("num_hidden_layers")?,
            "mixers": [mixer],
            "channel": channel,
            "norm_eps": keys.real(eps)?,
            "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
            "gives": {"next_token": {"tied": keys.flag("tie_word_embeddings", tied)?}},
        });
        ModelConfig::from_json(&ours).map_err(|error| error.to_string())
    }
}

/// Mixer, channel mixer, the key of the norm's eps, and whether the head is tied where nothing is said.
type Translated = (Value, Value, &'static str, bool);

fn llama(keys: &Keys) -> Result<Translated, String> {
    keys.must("hidden_act", &[json!("silu")])?;
    keys.must("mlp_bias", &[json!(false)])?;
    let heads = keys.number("num_attention_heads")?;
    let head_dim = keys.number_or("head_dim", keys.number("hidden_size")? / heads.max(1))?;
    let kv_heads = keys.number_or("num_key_value_heads", heads)?;
    let window = keys.number_or("sliding_window", 0)?;
    // Newer files gather the rotary keys in one table.
    let table = keys.given("rope_parameters").unwrap_or(keys.0);
    let base = match Keys(table).given("rope_theta") {
        Some(_) => Keys(table).real("rope_theta")?,
        None => 10_000.0,
    };
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(table) = keys.given(name) else {
            continue;
        };
        let kind = table.get("rope_type").or(table.get("type"));
        if kind.is_some_and(|kind| kind != "default") {
            return Err(format!(
                "{name} asks for positions of type {}; only \"default\" can be read",
                kind.unwrap_or(&Value::Null)
            ));
        }
    }
    let mixer = json!({
        "name": "attention",
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "window": window,
        "rope_base": base,
        "bias": keys.flag("attention_bias", false)?,
    });
    let channel = json!({"name": "swiglu", "hidden": keys.number("intermediate_size")?});
    Ok((mixer, channel, "rms_norm_eps", false))
}

fn mamba(keys: &Keys) -> Result<Translated, String> {
    keys.must("hidden_act", &[json!("silu")])?;
    keys.must("use_bias", &[json!(false)])?;
    keys.must("use_conv_bias", &[json!(true)])?;
    let dim = keys.number("hidden_size")?;
    let rank = match keys.given("time_step_rank") {
        Some(Value::String(auto)) if auto == "auto" => dim.div_ceil(16),
        None => dim.div_ceil(16),
        Some(_) => keys.number("time_step_rank")?,
    };
    let mixer = json!({
        "name": "mamba",
        "expand": keys.number("expand")?,
        "state": keys.number("state_size")?,
        "conv": keys.number("conv_kernel")?,
        "dt_rank": rank,
    });
    Ok((mixer, json!({"name": "none"}), "layer_norm_epsilon", true))
}

fn mamba2(keys: &Keys) -> Result<Translated, String> {
    keys.must("hidden_act", &[json!("silu")])?;
    keys.must("use_bias", &[json!(false)])?;
    keys.must("use_conv_bias", &[json!(true)])?;
    if let Some(limit) = keys.given("time_step_limit") {
        let open = limit[0].as_f64() == Some(0.0)
            && (limit[1].is_null() || limit[1].as_f64().is_none_or(f64::is_infinite));
        if !open {
            return Err(format!(
                "time_step_limit is {limit}; only no limit can be read"
            ));
        }
    }
    let (expand, dim) = (keys.number("expand")?, keys.number("hidden_size")?);
    let (heads, head_dim) = (keys.number("num_heads")?, keys.number("head_dim")?);
    if expand * dim != heads * head_dim {
        return Err(format!(
            "num_heads {heads} times head_dim {head_dim} must be expand {expand} times hidden_size {dim}"
        ));
    }
    let mixer = json!({
        "name": "mamba2",
        "expand": expand,
        "head_dim": head_dim,
        "state": keys.number("state_size")?,
        "groups": keys.number("n_groups")?,
        "conv": keys.number("conv_kernel")?,
        "norm_eps": keys.real("layer_norm_epsilon")?,
    });
    Ok((mixer, json!({"name": "none"}), "layer_norm_epsilon", false))
}

/// The keys of their config.
struct Keys<'a>(&'a Value);

impl<'a> Keys<'a> {
    fn given(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str) -> String {
        match self.given(key) {
            Some(got) => format!("{key} should be {expected}, is {got}"),
            None => format!("{key} is missing, it should be {expected}"),
        }
    }

    fn number(&self, key: &str) -> Result<u64, String> {
        let value = self.given(key).and_then(Value::as_u64);
        // Larger ones could not be a size, and their products would overflow.
        value
            .filter(|value| *value < 1 << 31)
            .ok_or_else(|| self.wrong(key, "a whole number below 2^31"))
    }

    fn number_or(&self, key: &str, otherwise: u64) -> Result<u64, String> {
        match self.given(key) {
            None => Ok(otherwise),
            Some(_) => self.number(key),
        }
    }

    fn real(&self, key: &str) -> Result<f64, String> {
        let value = self.given(key).and_then(Value::as_f64);
        value.ok_or_else(|| self.wrong(key, "a number"))
    }

    fn flag(&self, key: &str, otherwise: bool) -> Result<bool, String> {
        match self.given(key) {
            None => Ok(otherwise),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// Refuses a key that is given with another value than those that we compute.
    fn must(&self, key: &str, values: &[Value]) -> Result<(), String> {
        match self.given(key) {
            Some(value) if !values.contains(value) => {
                let known: Vec<String> = values.iter().map(Value::to_string).collect();
                Err(self.wrong(key, &format!("{} to be read here", known.join(" or "))))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "rms_norm_eps": 1e-6, "vocab_size": 64, "rope_theta": 5e5,
        })
    }

    #[test]
    fn what_is_not_said_is_the_default() {
        let ours = Family::Llama.config(&llama()).expect("fits").to_json();
        let mixer = &ours["mixers"][0];
        assert_eq!(
            (&mixer["kv_heads"], &mixer["head_dim"]),
            (&json!(4), &json!(8))
        );
        assert_eq!(mixer["rope_base"].as_f64(), Some(5e5));
        assert_eq!(ours["norm_eps"].as_f64(), Some(1e-6));
    }

    #[test]
    fn what_we_do_not_compute_is_refused_by_its_key() {
        for (key, value) in [
            ("hidden_act", json!("gelu")),
            ("mlp_bias", json!(true)),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
            ("hidden_size", json!(-3)),
            ("vocab_size", Value::Null),
        ] {
            let mut config = llama();
            config[key] = value;
            let error = Family::Llama.config(&config).expect_err(key);
            assert!(error.contains(key), "{key}: {error}");
        }
        let other = Family::of(&json!({"model_type": "bert"})).expect_err("unknown");
        assert!(
            other.contains("bert") && other.contains("mamba2"),
            "{other}"
        );
    }
}
