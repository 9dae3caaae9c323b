//! The tokenizer inside a GGUF file as the text of a `tokenizer.json`.

use serde_json::{Map, Value, json};

use super::Gguf;

/// How Llama 3 cuts a text into words; Qwen2 cuts numbers into single digits.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Token types of GGUF that are no ordinary text.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// The text of a `tokenizer.json`, or what keeps it from being made. `None` where the file has no tokenizer.
pub(crate) fn tokenizer_json(gguf: &Gguf) -> Result<Option<String>, String> {
    let key = |name: &str| gguf.keys.get(&format!("tokenizer.ggml.{name}"));
    let Some(model) = key("model") else {
        return Ok(None);
    };
    if model == "llama" {
        return super::pieces::tokenizer_json(gguf).map(Some);
    }
    if model != "gpt2" {
        return Err(format!(
            "its tokenizer is of the kind {model}; byte-level BPE (\"gpt2\") and SentencePiece (\"llama\") are read. Put a tokenizer.json beside it in a folder and export the model there"
        ));
    }
    let list = |name: &str| {
        let found = key(name).and_then(Value::as_array);
        found.ok_or_else(|| format!("tokenizer.ggml.{name} is missing"))
    };
    let (tokens, merges) = (list("tokens")?, list("merges")?);
    let mut vocab = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        let token = token
            .as_str()
            .ok_or_else(|| format!("token {id} is no text"))?;
        vocab.insert(token.to_string(), json!(id));
    }
    if vocab.len() != tokens.len() {
        return Err(format!(
            "{} of its tokens stand twice",
            tokens.len() - vocab.len()
        ));
    }
    let types = key("token_type").and_then(Value::as_array);
    let kind = |id: usize| {
        types
            .and_then(|types| types.get(id))
            .and_then(Value::as_u64)
    };
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| matches!(kind(*id), Some(CONTROL | USER_DEFINED)))
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": kind(id) == Some(CONTROL),
            })
        })
        .collect();
    let pre = key("pre").and_then(Value::as_str).unwrap_or("default");
    let (normalizer, cut, whole_words) = words(pre)?;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": cut,
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": whole_words,
            "vocab": vocab, "merges": merges,
        },
    });
    Ok(Some(tokenizer.to_string()))
}

/// Normaliser, the cutting into words, and whether a word that is a token is taken whole.
fn words(pre: &str) -> Result<(Value, Value, bool), String> {
    let bytes = |own: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": own});
    let split = |pattern: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
    };
    Ok(match pre {
        "default" | "gpt-2" => (Value::Null, bytes(true), false),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            let both = json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]});
            (Value::Null, both, false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => (Value::Null, split(WORDS), true),
        "qwen2" => {
            let single = WORDS.replace("{1,3}", "");
            (json!({"type": "NFC"}), split(&single), false)
        }
        other => {
            return Err(format!(
                "its tokenizer cuts words in the way {other:?}; default, gpt-2, smollm, llama-bpe and qwen2 are read"
            ));
        }
    })
}
