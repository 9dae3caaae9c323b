//! GPT-NeoX and Pythia: attention and MLP side by side, rotary positions on a part of each head, queries, keys and values
//! fused head by head.

use serde_json::{Value, json};

use super::keys::{Keys, rope_parameters};
use super::names::{Name, Rows, rows, same};
use super::{ACTIVATIONS, Layout, parts, their_activation};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["gpt_neox"],
    prefix: "gpt_neox.",
    names: |_| NAMES,
    spare: &[
        ".attention.bias",
        ".attention.masked_bias",
        ".rotary_emb.inv_freq",
    ],
    read,
    write,
};

const FUSED: &str = "gpt_neox.layers.#.attention.query_key_value.*";

const fn third(part: usize) -> Rows {
    Rows::HeadPart { part, of: 3 }
}

const NAMES: &[Name] = &[
    same("embed.weight", "gpt_neox.embed_in.weight"),
    same("norm.*", "gpt_neox.final_layer_norm.*"),
    same("layers.#.norm1.*", "gpt_neox.layers.#.input_layernorm.*"),
    same(
        "layers.#.norm2.*",
        "gpt_neox.layers.#.post_attention_layernorm.*",
    ),
    rows("layers.#.mixer.q_proj.*", FUSED, third(0)),
    rows("layers.#.mixer.k_proj.*", FUSED, third(1)),
    rows("layers.#.mixer.v_proj.*", FUSED, third(2)),
    same(
        "layers.#.mixer.o_proj.*",
        "gpt_neox.layers.#.attention.dense.*",
    ),
    same(
        "layers.#.channel.fc1.*",
        "gpt_neox.layers.#.mlp.dense_h_to_4h.*",
    ),
    same(
        "layers.#.channel.fc2.*",
        "gpt_neox.layers.#.mlp.dense_4h_to_h.*",
    ),
    same("lm_head.weight", "embed_out.weight"),
];

fn read(keys: &Keys, _kind: &str) -> Result<Value, String> {
    let (dim, heads) = (
        keys.number("hidden_size")?,
        keys.number("num_attention_heads")?,
    );
    let activation = match keys.given("hidden_act") {
        None => "gelu",
        Some(_) => keys.word("hidden_act", ACTIVATIONS)?,
    };
    let mut mixer = json!({
        "name": "attention",
        "heads": heads,
        "bias": keys.flag("attention_bias", true)?,
    });
    // Where nothing is said, a quarter of the head turns.
    let mut config = keys.0.clone();
    if keys.given("rotary_pct").is_none() && keys.given("rope_parameters").is_none() {
        config["rotary_pct"] = json!(0.25);
    }
    Keys(&config)
        .rope(dim / heads.max(1), ["rotary_emb_base", "rotary_pct"])?
        .into_mixer(&mut mixer);
    let wiring = match keys.flag("use_parallel_residual", true)? {
        true => "parallel",
        false => "pre_norm",
    };
    Ok(json!({
        "dim": dim,
        "layers": keys.number("num_hidden_layers")?,
        "mixers": [mixer],
        "channel": {"name": "mlp", "hidden": keys.number("intermediate_size")?, "activation": activation},
        "wiring": wiring,
        "norm": "layer",
        "norm_eps": keys.real_or("layer_norm_eps", 1e-5)?,
        "max_time": keys.number_or("max_position_embeddings", 2048)?,
        "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
        "gives": {"next_token": {"tied": keys.flag("tie_word_embeddings", false)?}},
    }))
}

fn write(ours: &Value, _kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "mlp")?;
    let head_dim = mixer["head_dim"].as_u64().unwrap_or(0);
    let (rope, longest) = rope_parameters(mixer, head_dim, ours["max_time"].as_u64().unwrap_or(0));
    Ok(json!({
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": ours["dim"],
        "num_hidden_layers": ours["layers"],
        "num_attention_heads": mixer["heads"],
        "attention_bias": mixer["bias"],
        "rope_parameters": rope,
        "intermediate_size": channel["hidden"],
        "hidden_act": their_activation(channel),
        "use_parallel_residual": ours["wiring"] == "parallel",
        "layer_norm_eps": ours["norm_eps"],
        "max_position_embeddings": longest,
        "vocab_size": ours["reads"]["tokens"]["vocab"],
        "tie_word_embeddings": ours["gives"]["next_token"]["tied"],
        "bos_token_id": null,
        "eos_token_id": null,
    }))
}
