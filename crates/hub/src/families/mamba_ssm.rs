//! Mamba and Mamba-2 as their authors' program saves them (`d_model`, `n_layer`, `ssm_cfg`; no `model_type`): read through
//! the config of transformers' folders, which names the same things.

use serde_json::{Map, Value, json};

use super::Layout;
use super::keys::Keys;
use super::mamba;
use super::names::{Name, same};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["mamba_ssm", "mamba2_ssm"],
    prefix: "backbone.",
    names: |_| NAMES,
    spare: &[],
    read,
    write,
};

const NAMES: &[Name] = &[
    same("embed.weight", "backbone.embedding.weight"),
    same("norm.weight", "backbone.norm_f.weight"),
    same("layers.#.norm1.weight", "backbone.layers.#.norm.weight"),
    same("layers.#.mixer.*", "backbone.layers.#.mixer.*"),
    same("lm_head.weight", "lm_head.weight"),
];

/// The norms' epsilon, which the layout has no key for.
const EPS: f64 = 1e-5;

/// The kind of a config without `model_type`, if it is one of these.
pub(super) fn kind(config: &Value) -> Option<&'static str> {
    (config.get("d_model")?.is_number() && config.get("n_layer")?.is_number()).then(|| match config
        ["ssm_cfg"]["layer"]
        == "Mamba2"
    {
        true => "mamba2_ssm",
        false => "mamba_ssm",
    })
}

/// Keys of the mixer: theirs, transformers', and what it is where nothing is said.
const MAMBA: &[(&str, &str, u64)] = &[
    ("d_state", "state_size", 16),
    ("d_conv", "conv_kernel", 4),
    ("expand", "expand", 2),
];
const MAMBA2: &[(&str, &str, u64)] = &[
    ("d_state", "state_size", 128),
    ("d_conv", "conv_kernel", 4),
    ("expand", "expand", 2),
    ("headdim", "head_dim", 64),
    ("ngroups", "n_groups", 1),
];

/// Keys that must have one value, and keys that matter to training or to speed only.
const FIXED: &[(&str, &str)] = &[
    ("bias", "false"),
    ("conv_bias", "true"),
    ("rmsnorm", "true"),
    ("norm_before_gate", "false"),
    ("D_has_hdim", "false"),
    ("d_ssm", "null"),
];
const FREE: &[&str] = &[
    "layer",
    "dt_rank",
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "A_init_range",
    "chunk_size",
    "use_fast_path",
    "use_mem_eff_path",
];

fn read(keys: &Keys, kind: &str) -> Result<Value, String> {
    keys.must("rms_norm", &[json!(true)])?;
    keys.must("d_intermediate", &[json!(0)])?;
    keys.must("attn_layer_idx", &[json!([])])?;
    let none = json!({});
    let inner = Keys(keys.given("ssm_cfg").unwrap_or(&none));
    let (own, base, layer) = match kind {
        "mamba2_ssm" => (MAMBA2, "mamba2", "Mamba2"),
        _ => (MAMBA, "mamba", "Mamba1"),
    };
    inner.must("layer", &[json!(layer)])?;
    for key in inner.0.as_object().into_iter().flat_map(Map::keys) {
        let known = own.iter().any(|(theirs, _, _)| theirs == key) || FREE.contains(&key.as_str());
        if !known && !FIXED.iter().any(|(fixed, _)| fixed == key) {
            return Err(format!("ssm_cfg has a key {key} that cannot be read"));
        }
    }
    for (key, value) in FIXED {
        let value = serde_json::from_str(value).unwrap_or_default();
        inner.must(key, &[value])?;
    }
    let dim = keys.number("d_model")?;
    let multiple = keys.number_or("pad_vocab_size_multiple", 8)?.max(1);
    let mut as_known = json!({
        "hidden_size": dim,
        "num_hidden_layers": keys.number("n_layer")?,
        "layer_norm_epsilon": EPS,
        "vocab_size": keys.number("vocab_size")?.next_multiple_of(multiple),
        "tie_word_embeddings": keys.flag("tie_embeddings", true)?,
    });
    for (theirs, known, otherwise) in own {
        as_known[*known] = json!(inner.number_or(theirs, *otherwise)?);
    }
    if let Some(rank) = inner.given("dt_rank") {
        as_known["time_step_rank"] = rank.clone();
    }
    if kind == "mamba2_ssm" {
        let width = dim * as_known["expand"].as_u64().unwrap_or(0);
        let head = as_known["head_dim"].as_u64().unwrap_or(0).max(1);
        as_known["num_heads"] = json!(width / head);
    }
    mamba::read(&Keys(&as_known), base)
}

fn write(ours: &Value, kind: &str) -> Result<Value, String> {
    let (own, base, layer) = match kind {
        "mamba2_ssm" => (MAMBA2, "mamba2", "Mamba2"),
        _ => (MAMBA, "mamba", "Mamba1"),
    };
    let known = mamba::write(ours, base)?;
    let mut inner = json!({"layer": layer});
    for (theirs, name, _) in own {
        inner[*theirs] = known[*name].clone();
    }
    if base == "mamba" {
        inner["dt_rank"] = ours["mixers"][0]["dt_rank"].clone();
        if inner["dt_rank"] == json!(0) {
            inner["dt_rank"] = json!("auto");
        }
    }
    Ok(json!({
        "model_type": null,
        "d_model": ours["dim"],
        "n_layer": ours["layers"],
        "vocab_size": known["vocab_size"],
        "ssm_cfg": inner,
        "rms_norm": true,
        "tie_embeddings": known["tie_word_embeddings"],
        "pad_vocab_size_multiple": 1,
    }))
}
