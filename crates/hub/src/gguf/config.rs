//! The keys of a Llama-like GGUF file as the config that transformers would have, and its names of tensors.

use serde_json::{Value, json};

use super::Gguf;
use crate::families::names::{Name, Rows, rows, same};
use crate::families::{Family, gguf_family};

/// llama.cpp turns neighbours, so its Llama files have the rows of queries and keys in another order.
const TURNED: &[Name] = &[
    rows(
        "layers.#.mixer.q_proj.*",
        "blk.#.attn_q.*",
        Rows::Pairs { queries: true },
    ),
    rows(
        "layers.#.mixer.k_proj.*",
        "blk.#.attn_k.*",
        Rows::Pairs { queries: false },
    ),
    same("layers.#.mixer.v_proj.*", "blk.#.attn_v.*"),
    same("layers.#.mixer.o_proj.*", "blk.#.attn_output.*"),
    same("layers.#.channel.gate_proj.*", "blk.#.ffn_gate.*"),
    same("layers.#.channel.up_proj.*", "blk.#.ffn_up.*"),
    same("layers.#.channel.down_proj.*", "blk.#.ffn_down.*"),
    same("layers.#.norm1.weight", "blk.#.attn_norm.weight"),
    same("layers.#.norm2.weight", "blk.#.ffn_norm.weight"),
    same("embed.weight", "token_embd.weight"),
    same("norm.weight", "output_norm.weight"),
    same("lm_head.weight", "output.weight"),
];

const PLAIN: &[Name] = &[
    same("layers.#.mixer.q_proj.*", "blk.#.attn_q.*"),
    same("layers.#.mixer.k_proj.*", "blk.#.attn_k.*"),
    same("layers.#.mixer.v_proj.*", "blk.#.attn_v.*"),
    same("layers.#.mixer.o_proj.*", "blk.#.attn_output.*"),
    same("layers.#.mixer.q_norm.*", "blk.#.attn_q_norm.*"),
    same("layers.#.mixer.k_norm.*", "blk.#.attn_k_norm.*"),
    same("layers.#.channel.gate_proj.*", "blk.#.ffn_gate.*"),
    same("layers.#.channel.up_proj.*", "blk.#.ffn_up.*"),
    same("layers.#.channel.down_proj.*", "blk.#.ffn_down.*"),
    same("layers.#.norm1.weight", "blk.#.attn_norm.weight"),
    same("layers.#.norm2.weight", "blk.#.ffn_norm.weight"),
    same("embed.weight", "token_embd.weight"),
    same("norm.weight", "output_norm.weight"),
    same("lm_head.weight", "output.weight"),
];

/// The map of names of an architecture.
pub(crate) fn names(kind: &str) -> &'static [Name] {
    match kind {
        "llama" => TURNED,
        _ => PLAIN,
    }
}

/// The family of the file.
pub(crate) fn family(gguf: &Gguf) -> Result<Family, String> {
    let kind = gguf
        .keys
        .get("general.architecture")
        .and_then(Value::as_str);
    let Some(kind) = kind else {
        return Err("general.architecture is missing".into());
    };
    gguf_family(kind).ok_or_else(|| {
        format!("architecture {kind:?} cannot be read from GGUF; llama, qwen2 and qwen3 can")
    })
}

/// The keys of the file as a config of transformers.
pub(crate) fn theirs(gguf: &Gguf, kind: &str) -> Result<Value, String> {
    let find = |key: &str| gguf.keys.get(&format!("{kind}.{key}"));
    let need = |key: &str| {
        find(key)
            .cloned()
            .ok_or_else(|| format!("{kind}.{key} is missing"))
    };
    let has = |name: &str| gguf.tensors.iter().any(|tensor| tensor.0 == name);
    let heads = need("attention.head_count")?;
    let (width, count) = (need("embedding_length")?, heads.as_u64().unwrap_or(0));
    let head_dim = match find("attention.key_length") {
        Some(length) => length.clone(),
        None => json!(width.as_u64().unwrap_or(0) / count.max(1)),
    };
    let base = find("rope.freq_base").cloned().unwrap_or(json!(10_000.0));
    let mut rope = json!({"rope_type": "default", "rope_theta": base});
    match find("rope.scaling.type").and_then(Value::as_str) {
        None | Some("none") => {}
        Some(scaling) => {
            rope["rope_type"] = json!(scaling);
            rope["factor"] = need("rope.scaling.factor")?;
            if let Some(length) = find("rope.scaling.original_context_length") {
                rope["original_max_position_embeddings"] = length.clone();
            }
        }
    }
    if let (Some(turned), Some(head_dim)) = (
        find("rope.dimension_count").and_then(Value::as_u64),
        head_dim.as_u64(),
    ) && turned != head_dim
    {
        rope["partial_rotary_factor"] = json!(turned as f64 / head_dim.max(1) as f64);
    }
    let vocab = gguf
        .tensors
        .iter()
        .find(|tensor| tensor.0 == "token_embd.weight");
    let vocab = vocab.and_then(|tensor| tensor.1.first().copied());
    Ok(json!({
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": find("attention.head_count_kv").unwrap_or(&heads),
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length")?,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon")?,
        "max_position_embeddings": find("context_length"),
        "rope_parameters": rope,
        "attention_bias": has("blk.0.attn_output.bias"),
        "vocab_size": vocab.ok_or("token_embd.weight is missing")?,
        "tie_word_embeddings": !has("output.weight"),
        "bos_token_id": gguf.keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.keys.get("tokenizer.ggml.eos_token_id"),
    }))
}
