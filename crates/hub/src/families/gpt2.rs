//! GPT-2: pre-norm with LayerNorm, learned positions, one fused matrix for queries, keys and values, matrices `[in, out]`.

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Name, Rows, same, transposed};
use super::{ACTIVATIONS, Layout, parts, their_activation};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["gpt2"],
    prefix: "transformer.",
    names: |_| NAMES,
    spare: &[".attn.bias", ".attn.masked_bias"],
    read,
    write,
};

const fn third(part: usize) -> Rows {
    Rows::Part { part, of: 3 }
}

const NAMES: &[Name] = &[
    same("embed.weight", "transformer.wte.weight"),
    same("positions.weight", "transformer.wpe.weight"),
    same("norm.*", "transformer.ln_f.*"),
    same("layers.#.norm1.*", "transformer.h.#.ln_1.*"),
    same("layers.#.norm2.*", "transformer.h.#.ln_2.*"),
    transposed(
        "layers.#.mixer.q_proj.*",
        "transformer.h.#.attn.c_attn.*",
        third(0),
    ),
    transposed(
        "layers.#.mixer.k_proj.*",
        "transformer.h.#.attn.c_attn.*",
        third(1),
    ),
    transposed(
        "layers.#.mixer.v_proj.*",
        "transformer.h.#.attn.c_attn.*",
        third(2),
    ),
    transposed(
        "layers.#.mixer.o_proj.*",
        "transformer.h.#.attn.c_proj.*",
        Rows::All,
    ),
    transposed(
        "layers.#.channel.fc1.*",
        "transformer.h.#.mlp.c_fc.*",
        Rows::All,
    ),
    transposed(
        "layers.#.channel.fc2.*",
        "transformer.h.#.mlp.c_proj.*",
        Rows::All,
    ),
    same("lm_head.weight", "lm_head.weight"),
];

fn read(keys: &Keys, _kind: &str) -> Result<Value, String> {
    keys.must("scale_attn_weights", &[json!(true)])?;
    keys.must("scale_attn_by_inverse_layer_idx", &[json!(false)])?;
    keys.must("add_cross_attention", &[json!(false)])?;
    let dim = keys.number("n_embd")?;
    let activation = match keys.given("activation_function") {
        None => "gelu_tanh",
        Some(_) => keys.word("activation_function", ACTIVATIONS)?,
    };
    Ok(json!({
        "dim": dim,
        "layers": keys.number("n_layer")?,
        "mixers": [{"name": "attention", "heads": keys.number("n_head")?, "position": "none", "bias": true}],
        "channel": {"name": "mlp", "hidden": keys.number_or("n_inner", 4 * dim)?, "activation": activation},
        "norm": "layer",
        "norm_eps": keys.real_or("layer_norm_epsilon", 1e-5)?,
        "positions": "learned",
        "max_time": keys.number("n_positions")?,
        "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
        "gives": {"next_token": {"tied": keys.flag("tie_word_embeddings", true)?}},
    }))
}

fn write(ours: &Value, _kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "mlp")?;
    Ok(json!({
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": ours["dim"],
        "n_layer": ours["layers"],
        "n_head": mixer["heads"],
        "n_inner": channel["hidden"],
        "activation_function": their_activation(channel),
        "layer_norm_epsilon": ours["norm_eps"],
        "n_positions": ours["max_time"],
        "vocab_size": ours["reads"]["tokens"]["vocab"],
        "tie_word_embeddings": ours["gives"]["next_token"]["tied"],
        "bos_token_id": null,
        "eos_token_id": null,
    }))
}
