//! Mamba and Mamba-2: a norm and the mixer, no channel mixer.

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Name, same};
use super::{Layout, parts};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["mamba", "mamba2"],
    prefix: "backbone.",
    names: |_| NAMES,
    spare: &[],
    read,
    write,
};

const NAMES: &[Name] = &[
    same("embed.weight", "backbone.embeddings.weight"),
    same("norm.weight", "backbone.norm_f.weight"),
    same("layers.#.norm1.weight", "backbone.layers.#.norm.weight"),
    same("layers.#.mixer.*", "backbone.layers.#.mixer.*"),
    same("lm_head.weight", "lm_head.weight"),
];

pub(super) fn read(keys: &Keys, kind: &str) -> Result<Value, String> {
    keys.must("hidden_act", &[json!("silu")])?;
    keys.must("use_bias", &[json!(false)])?;
    keys.must("use_conv_bias", &[json!(true)])?;
    let (mixer, tied) = match kind {
        "mamba" => (mamba(keys)?, true),
        _ => (mamba2(keys)?, false),
    };
    Ok(json!({
        "dim": keys.number("hidden_size")?,
        "layers": keys.number("num_hidden_layers")?,
        "mixers": [mixer],
        "channel": {"name": "none"},
        "norm_eps": keys.real("layer_norm_epsilon")?,
        "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
        "gives": {"next_token": {"tied": keys.flag("tie_word_embeddings", tied)?}},
    }))
}

fn mamba(keys: &Keys) -> Result<Value, String> {
    let rank = match keys.given("time_step_rank") {
        Some(Value::String(auto)) if auto == "auto" => 0,
        None => 0,
        Some(_) => keys.number("time_step_rank")?,
    };
    Ok(json!({
        "name": "mamba",
        "expand": keys.number("expand")?,
        "state": keys.number("state_size")?,
        "conv": keys.number("conv_kernel")?,
        "dt_rank": rank,
    }))
}

fn mamba2(keys: &Keys) -> Result<Value, String> {
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
    Ok(json!({
        "name": "mamba2",
        "expand": expand,
        "head_dim": head_dim,
        "state": keys.number("state_size")?,
        "groups": keys.number("n_groups")?,
        "conv": keys.number("conv_kernel")?,
        "norm_eps": keys.real("layer_norm_epsilon")?,
    }))
}

pub(super) fn write(ours: &Value, kind: &str) -> Result<Value, String> {
    let (mixer, _) = parts(ours, kind, "none")?;
    let dim = ours["dim"].as_u64().unwrap_or(0);
    let mut theirs = json!({
        "hidden_act": "silu",
        "use_bias": false,
        "use_conv_bias": true,
        "hidden_size": dim,
        "num_hidden_layers": ours["layers"],
        "layer_norm_epsilon": ours["norm_eps"],
        "vocab_size": ours["reads"]["tokens"]["vocab"],
        "tie_word_embeddings": ours["gives"]["next_token"]["tied"],
        "expand": mixer["expand"],
        "state_size": mixer["state"],
        "conv_kernel": mixer["conv"],
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
    });
    if kind == "mamba" {
        let rank = match mixer["dt_rank"].as_u64() {
            None | Some(0) => dim.div_ceil(16),
            Some(rank) => rank,
        };
        theirs["time_step_rank"] = json!(rank);
        theirs["intermediate_size"] = json!(dim * mixer["expand"].as_u64().unwrap_or(0));
        theirs["architectures"] = json!(["MambaForCausalLM"]);
    } else {
        let head_dim = mixer["head_dim"].as_u64().unwrap_or(0);
        let inner = dim * mixer["expand"].as_u64().unwrap_or(0);
        theirs["head_dim"] = json!(head_dim);
        theirs["num_heads"] = json!(inner / head_dim.max(1));
        theirs["n_groups"] = mixer["groups"].clone();
        theirs["architectures"] = json!(["Mamba2ForCausalLM"]);
    }
    Ok(theirs)
}
