//! GLA, DeltaNet, Gated DeltaNet and RetNet as flash-linear-attention saves them: pre-norm, the mixer, SwiGLU. Some layers may
//! be softmax attention instead (`attn`).

use serde_json::{Value, json};

use super::Layout;
use super::keys::Keys;
use super::names::{Name, same};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["gla", "delta_net", "gated_deltanet", "retnet"],
    prefix: "model.",
    names: |_| NAMES,
    spare: &[".rotary.inv_freq"],
    read,
    write,
};

const NAMES: &[Name] = &[
    same("embed.weight", "model.embeddings.weight"),
    same("norm.weight", "model.norm.weight"),
    same("layers.#.norm1.weight", "model.layers.#.attn_norm.weight"),
    same("layers.#.norm2.weight", "model.layers.#.mlp_norm.weight"),
    same(
        "layers.#.mixer.g_norm.weight",
        "model.layers.#.attn.g_norm_swish_gate.weight",
    ),
    same("layers.#.mixer.*", "model.layers.#.attn.*"),
    same("layers.#.channel.*", "model.layers.#.mlp.*"),
    same("lm_head.weight", "lm_head.weight"),
];

/// Our mixer of a kind.
fn mixer(kind: &str) -> &str {
    match kind {
        "gated_deltanet" => "gated_delta_net",
        "retnet" => "retention",
        other => other,
    }
}

fn read(keys: &Keys, kind: &str) -> Result<Value, String> {
    let null = [Value::Null];
    keys.must("hidden_act", &[json!("swish")])?;
    for key in [
        "attnres_block_size",
        "feature_map",
        "clamp_min",
        "num_v_heads",
    ] {
        keys.must(key, &null)?;
    }
    for (key, value) in [
        ("use_output_gate", true),
        ("elementwise_affine", true),
        ("use_gk", true),
        ("use_gv", false),
        ("fuse_norm", true),
        ("use_beta", true),
        ("use_output_norm", true),
    ] {
        keys.must(key, &[json!(value)])?;
    }
    let (dim, heads) = (keys.number("hidden_size")?, keys.number("num_heads")?);
    keys.must("num_kv_heads", &[json!(heads)])?;
    let eps = keys.real_or("norm_eps", 1e-6)?;
    let mut ours = json!({"name": mixer(kind), "heads": heads, "norm_eps": eps});
    let short = keys.flag("use_short_conv", !["gla", "retnet"].contains(&kind))?;
    match kind {
        "gla" | "retnet" => {
            keys.must("use_short_conv", &[json!(false)])?;
            let (keys_of, values_of) = if kind == "gla" {
                (0.5, 1.0)
            } else {
                (1.0, 2.0)
            };
            ours["expand_k"] = json!(keys.real_or("expand_k", keys_of)?);
            ours["expand_v"] = json!(keys.real_or("expand_v", values_of)?);
        }
        _ => {
            let width = if short {
                keys.number_or("conv_size", 4)?
            } else {
                0
            };
            ours["conv_size"] = json!(width);
            ours["allow_neg_eigval"] = json!(keys.flag("allow_neg_eigval", false)?);
        }
    }
    if kind == "delta_net" {
        keys.must("use_gate", &[json!(false)])?;
        keys.must("qk_norm", &[json!("l2")])?;
        keys.must("qk_activation", &[json!("silu")])?;
        for key in ["expand_k", "expand_v"] {
            if keys.real_or(key, 1.0)? != 1.0 {
                return Err(format!("{key} should be 1 to be read here"));
            }
        }
    }
    if kind == "gated_deltanet" {
        keys.must("use_gate", &[json!(true)])?;
        keys.must("output_gate_activation", &[json!("swish"), json!("silu")])?;
        ours["head_dim"] = json!(keys.number_or("head_dim", 256)?);
        ours["expand_v"] = json!(keys.real_or("expand_v", 2.0)?);
    }
    let hidden = match keys.given("intermediate_size") {
        Some(_) => keys.number("intermediate_size")?,
        None => {
            let ratio = keys.number_or("hidden_ratio", if kind == "retnet" { 2 } else { 4 })?;
            (2 * dim * ratio / 3).next_multiple_of(256)
        }
    };
    Ok(json!({
        "dim": dim,
        "layers": keys.number("num_hidden_layers")?,
        "mixers": layers(keys, &ours)?,
        "channel": {"name": "swiglu", "hidden": hidden},
        "norm_eps": eps,
        "max_time": keys.number_or("max_position_embeddings", 2048)?,
        "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
        "gives": {"next_token": {"tied": keys.flag("tie_word_embeddings", false)?}},
    }))
}

/// The layers' mixers: `own`, or softmax attention where `attn` (a table, or a list of tables) names the layer.
fn layers(keys: &Keys, own: &Value) -> Result<Vec<Value>, String> {
    let tables = match keys.given("attn") {
        None => return Ok(vec![own.clone()]),
        Some(Value::Array(tables)) => tables.as_slice(),
        Some(table) => std::slice::from_ref(table),
    };
    let count = keys.number("num_hidden_layers")?.min(1 << 16) as usize;
    let mut mixers = vec![own.clone(); count];
    for table in tables {
        let inner = Keys(table);
        inner.must("qk_norm", &[json!(false)])?;
        let heads = inner.number("num_heads")?;
        let attention = json!({
            "name": "attention",
            "heads": heads,
            "kv_heads": inner.number_or("num_kv_heads", heads)?,
            "qkv_bias": inner.flag("qkv_bias", false)?,
            "window": inner.number_or("window_size", 0)?,
            "rope_base": inner.real_or("rope_theta", 10_000.0)?,
        });
        for layer in table["layers"].as_array().into_iter().flatten() {
            let at = layer
                .as_u64()
                .and_then(|layer| mixers.get_mut(layer as usize));
            *at.ok_or_else(|| format!("attn names layer {layer} of {count}"))? = attention.clone();
        }
    }
    Ok(mixers)
}

/// The tables of `attn` for the layers that are softmax attention: one for each kind of it.
fn attention_tables(ours: &Value) -> Value {
    let mixers = ours["mixers"].as_array().map_or(&[][..], Vec::as_slice);
    let mut tables: Vec<(&Value, Vec<usize>)> = Vec::new();
    for (layer, mixer) in mixers.iter().enumerate() {
        if mixer["name"] == "attention" {
            match tables.iter_mut().find(|(known, _)| *known == mixer) {
                Some((_, layers)) => layers.push(layer),
                None => tables.push((mixer, vec![layer])),
            }
        }
    }
    let table = |(mixer, layers): &(&Value, Vec<usize>)| {
        json!({
            "layers": layers,
            "num_heads": mixer["heads"],
            "num_kv_heads": mixer["kv_heads"],
            "qkv_bias": mixer["qkv_bias"],
            "window_size": match mixer["window"].as_u64() {
                None | Some(0) => Value::Null,
                Some(window) => json!(window),
            },
            "rope_theta": mixer["rope_base"],
        })
    };
    match &tables[..] {
        [] => Value::Null,
        [only] => table(only),
        several => several.iter().map(table).collect(),
    }
}

/// The mixer of that name and the channel mixer of a resolved config.
fn parts<'a>(ours: &'a Value, name: &str) -> Result<(&'a Value, &'a Value), String> {
    let mixers = ours["mixers"].as_array().map_or(&[][..], Vec::as_slice);
    let found = mixers.iter().find(|mixer| mixer["name"] == name);
    match (found, ours["channel"]["name"] == "swiglu") {
        (Some(mixer), true) => Ok((mixer, &ours["channel"])),
        _ => Err(format!(
            "it is made of {name} and swiglu, this of {} and {}",
            ours["mixers"][0]["name"], ours["channel"]["name"]
        )),
    }
}

fn write(ours: &Value, kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, mixer(kind))?;
    let mut theirs = json!({
        "hidden_act": "swish",
        "hidden_size": ours["dim"],
        "num_hidden_layers": ours["layers"],
        "num_heads": mixer["heads"],
        "intermediate_size": channel["hidden"],
        "norm_eps": ours["norm_eps"],
        "max_position_embeddings": ours["max_time"],
        "vocab_size": ours["reads"]["tokens"]["vocab"],
        "tie_word_embeddings": ours["gives"]["next_token"]["tied"],
        "bos_token_id": null,
        "eos_token_id": null,
        "attn": attention_tables(ours),
    });
    let mut copy = |names: &[&str]| {
        for name in names {
            theirs[*name] = mixer[*name].clone();
        }
    };
    let architecture = match kind {
        "gla" => {
            copy(&["expand_k", "expand_v"]);
            "GLAForCausalLM"
        }
        "retnet" => {
            copy(&["expand_k", "expand_v"]);
            "RetNetForCausalLM"
        }
        "delta_net" => {
            copy(&["conv_size", "allow_neg_eigval"]);
            "DeltaNetForCausalLM"
        }
        _ => {
            copy(&["conv_size", "allow_neg_eigval", "head_dim", "expand_v"]);
            if mixer["head_dim"] == json!(0) {
                return Err("head_dim is 0, dim over heads; name it".into());
            }
            "GatedDeltaNetForCausalLM"
        }
    };
    if ["delta_net", "gated_deltanet"].contains(&kind) {
        theirs["use_short_conv"] = json!(mixer["conv_size"] != json!(0));
    }
    theirs["architectures"] = json!([architecture]);
    Ok(theirs)
}
