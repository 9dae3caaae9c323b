//! OPT: pre-norm with LayerNorm, ReLU, learned positions behind two rows that no token uses.

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Name, Rows, rows, same};
use super::{ACTIVATIONS, Layout, parts, their_activation};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["opt"],
    prefix: "model.",
    names: |_| NAMES,
    spare: &[],
    read,
    write,
};

const NAMES: &[Name] = &[
    same("embed.weight", "model.decoder.embed_tokens.weight"),
    rows(
        "positions.weight",
        "model.decoder.embed_positions.weight",
        Rows::After(2),
    ),
    same("norm.*", "model.decoder.final_layer_norm.*"),
    same(
        "layers.#.norm1.*",
        "model.decoder.layers.#.self_attn_layer_norm.*",
    ),
    same(
        "layers.#.norm2.*",
        "model.decoder.layers.#.final_layer_norm.*",
    ),
    same(
        "layers.#.mixer.o_proj.*",
        "model.decoder.layers.#.self_attn.out_proj.*",
    ),
    same("layers.#.mixer.*", "model.decoder.layers.#.self_attn.*"),
    same("layers.#.channel.*", "model.decoder.layers.#.*"),
    same("lm_head.weight", "lm_head.weight"),
];

fn read(keys: &Keys, _kind: &str) -> Result<Value, String> {
    for (key, value) in [
        ("do_layer_norm_before", true),
        ("_remove_final_layer_norm", false),
        ("layer_norm_elementwise_affine", true),
    ] {
        keys.must(key, &[json!(value)])?;
    }
    let dim = keys.number("hidden_size")?;
    keys.must("word_embed_proj_dim", &[json!(dim)])?;
    let bias = keys.flag("enable_bias", true)?;
    let activation = match keys.given("activation_function") {
        None => "relu",
        Some(_) => keys.word("activation_function", ACTIVATIONS)?,
    };
    let heads = keys.number("num_attention_heads")?;
    Ok(json!({
        "dim": dim,
        "layers": keys.number("num_hidden_layers")?,
        "mixers": [{"name": "attention", "heads": heads, "position": "none", "bias": bias}],
        "channel": {"name": "mlp", "hidden": keys.number("ffn_dim")?, "activation": activation, "bias": bias},
        "norm": "layer",
        "norm_eps": 1e-5,
        "positions": "learned",
        "max_time": keys.number("max_position_embeddings")?,
        "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
        "gives": {"next_token": {"tied": keys.flag("tie_word_embeddings", true)?}},
    }))
}

fn write(ours: &Value, _kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "mlp")?;
    Ok(json!({
        "architectures": ["OPTForCausalLM"],
        "hidden_size": ours["dim"],
        "word_embed_proj_dim": ours["dim"],
        "num_hidden_layers": ours["layers"],
        "num_attention_heads": mixer["heads"],
        "ffn_dim": channel["hidden"],
        "activation_function": their_activation(channel),
        "enable_bias": mixer["bias"],
        "do_layer_norm_before": true,
        "max_position_embeddings": ours["max_time"],
        "vocab_size": ours["reads"]["tokens"]["vocab"],
        "tie_word_embeddings": ours["gives"]["next_token"]["tied"],
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
    }))
}
