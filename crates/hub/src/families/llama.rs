//! Llama, Mistral, Qwen2 and Qwen3: pre-norm, rotary grouped attention, SwiGLU. They differ in biases, in the norm of
//! queries and keys, and in which layers look through a window.

use serde_json::{Value, json};

use super::keys::{Keys, rope_parameters};
use super::names::{Name, same};
use super::{Layout, classes, parts};

pub(super) static LAYOUT: Layout = LAYOUT_OF;

/// What GGUF files share with it.
pub(super) const LAYOUT_OF: Layout = Layout {
    kinds: &["llama", "mistral", "qwen2", "qwen3"],
    prefix: "model.",
    names: |_| NAMES,
    spare: &[".rotary_emb.inv_freq"],
    read,
    write,
};

const NAMES: &[Name] = &[
    same("embed.weight", "model.embed_tokens.weight"),
    same("norm.weight", "model.norm.weight"),
    same(
        "layers.#.norm1.weight",
        "model.layers.#.input_layernorm.weight",
    ),
    same(
        "layers.#.norm2.weight",
        "model.layers.#.post_attention_layernorm.weight",
    ),
    same("layers.#.mixer.*", "model.layers.#.self_attn.*"),
    same("layers.#.channel.*", "model.layers.#.mlp.*"),
    same("lm_head.weight", "lm_head.weight"),
    same("head.weight", "score.weight"),
];

fn read(keys: &Keys, kind: &str) -> Result<Value, String> {
    keys.must("hidden_act", &[json!("silu")])?;
    let heads = keys.number("num_attention_heads")?;
    let dim = keys.number("hidden_size")?;
    let head_dim = match kind {
        "qwen3" => keys.number("head_dim")?,
        _ => keys.number_or("head_dim", dim / heads.max(1))?,
    };
    let eps = keys.real_or("rms_norm_eps", 1e-6)?;
    let mut mixer = json!({
        "name": "attention",
        "heads": heads,
        "kv_heads": keys.number_or("num_key_value_heads", heads)?,
        "head_dim": head_dim,
        "bias": kind != "mistral" && kind != "qwen2" && keys.flag("attention_bias", false)?,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "norm_eps": eps,
    });
    keys.rope(head_dim, ["rope_theta", "partial_rotary_factor"])?
        .into_mixer(&mut mixer);
    let mixers: Vec<Value> = windows(keys, kind)?
        .into_iter()
        .map(|window| {
            let mut mixer = mixer.clone();
            mixer["window"] = json!(window);
            mixer
        })
        .collect();
    let channel = json!({
        "name": "swiglu",
        "hidden": keys.number("intermediate_size")?,
        "bias": kind == "llama" && keys.flag("mlp_bias", false)?,
    });
    Ok(json!({
        "dim": dim,
        "layers": keys.number("num_hidden_layers")?,
        "mixers": mixers,
        "channel": channel,
        "norm_eps": eps,
        "max_time": keys.number_or("max_position_embeddings", 2048)?,
        "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
        "gives": match classes::asked(keys) {
            true => json!({"class": {"classes": classes::count(keys)?, "pool": "last"}}),
            false => json!({"next_token": {"tied": keys.flag("tie_word_embeddings", false)?}}),
        },
        "head_bias": !classes::asked(keys),
    }))
}

/// The windows of the layers, one for all where they are alike; 0 for none.
fn windows(keys: &Keys, kind: &str) -> Result<Vec<u64>, String> {
    match kind {
        "llama" => return Ok(vec![0]),
        // Where nothing is said, theirs has a window.
        "mistral" if keys.0.get("sliding_window").is_none() => return Ok(vec![4096]),
        "mistral" => return Ok(vec![keys.number_or("sliding_window", 0)?]),
        _ => {}
    }
    if !keys.flag("use_sliding_window", false)? || keys.given("sliding_window").is_none() {
        return Ok(vec![0]);
    }
    let window = keys.number("sliding_window")?;
    let layers = keys.number("num_hidden_layers")?.min(1 << 16);
    if let Some(types) = keys.given("layer_types") {
        let types = types.as_array().map_or(&[][..], Vec::as_slice);
        let of = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Some(0),
            Some("sliding_attention") => Some(window),
            _ => None,
        };
        let windows: Option<Vec<u64>> = types.iter().map(of).collect();
        return windows
            .filter(|windows| windows.len() as u64 == layers)
            .ok_or_else(|| {
                format!("layer_types should be {layers} of full_attention and sliding_attention")
            });
    }
    let first = keys.number_or("max_window_layers", 28)?;
    let of = |layer| if layer >= first { window } else { 0 };
    Ok((0..layers).map(of).collect())
}

fn write(ours: &Value, kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "swiglu")?;
    let head_dim = mixer["head_dim"].as_u64().unwrap_or(0);
    let (rope, longest) = rope_parameters(mixer, head_dim, ours["max_time"].as_u64().unwrap_or(0));
    let mut theirs = json!({
        "hidden_act": "silu",
        "hidden_size": ours["dim"],
        "num_hidden_layers": ours["layers"],
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["kv_heads"],
        "head_dim": head_dim,
        "intermediate_size": channel["hidden"],
        "rms_norm_eps": ours["norm_eps"],
        "rope_parameters": rope,
        "max_position_embeddings": longest,
        "vocab_size": ours["reads"]["tokens"]["vocab"],
    });
    if ours["gives"]["next_token"].is_object() {
        theirs["tie_word_embeddings"] = ours["gives"]["next_token"]["tied"].clone();
    }
    let windows: Vec<u64> = ours["mixers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|mixer| mixer["window"].as_u64().unwrap_or(0))
        .collect();
    let window = windows.iter().copied().max().unwrap_or(0);
    let or_none = match window {
        0 => Value::Null,
        window => json!(window),
    };
    let architecture = match kind {
        "llama" => {
            theirs["attention_bias"] = mixer["bias"].clone();
            theirs["mlp_bias"] = channel["bias"].clone();
            "Llama"
        }
        "mistral" => {
            theirs["sliding_window"] = or_none;
            "Mistral"
        }
        _ => {
            let of = |window: &u64| match window {
                0 => "full_attention",
                _ => "sliding_attention",
            };
            let types: Vec<&str> = windows.iter().map(of).collect();
            theirs["use_sliding_window"] = json!(window > 0);
            theirs["sliding_window"] = or_none;
            theirs["layer_types"] = json!(types);
            if kind == "qwen3" {
                theirs["attention_bias"] = mixer["bias"].clone();
                "Qwen3"
            } else {
                "Qwen2"
            }
        }
    };
    let suffix = match ours["gives"]["class"].is_object() {
        true => {
            classes::put(&mut theirs, ours);
            "ForSequenceClassification"
        }
        false => "ForCausalLM",
    };
    theirs["architectures"] = json!([format!("{architecture}{suffix}")]);
    Ok(theirs)
}
