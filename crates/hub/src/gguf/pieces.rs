//! The SentencePiece tokenizer of Llama's GGUF files (pieces with scores, bytes for what has no piece) as the text of a
//! `tokenizer.json`.
//!
//! SentencePiece joins the two neighbours that give the piece of the highest score, until none can be joined. A BPE whose
//! merges are ordered by the score of what they give does the same.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::Gguf;

/// What stands for a space.
const SPACE: &str = "\u{2581}";
/// Token types.
const NORMAL: u64 = 1;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// The text of a `tokenizer.json`.
pub(super) fn tokenizer_json(gguf: &Gguf) -> Result<String, String> {
    let key = |name: &str| gguf.keys.get(&format!("tokenizer.ggml.{name}"));
    let list = |name: &str| {
        let found = key(name).and_then(Value::as_array);
        found.ok_or_else(|| format!("tokenizer.ggml.{name} is missing"))
    };
    let (tokens, scores, types) = (list("tokens")?, list("scores")?, list("token_type")?);
    if scores.len() != tokens.len() || types.len() != tokens.len() {
        return Err(format!(
            "its tokenizer has {} tokens, {} scores and {} types",
            tokens.len(),
            scores.len(),
            types.len()
        ));
    }
    let mut vocab = Map::new();
    let mut pieces = HashMap::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let token = token
            .as_str()
            .ok_or_else(|| format!("token {id} is no text"))?;
        if vocab.insert(token.to_string(), json!(id)).is_some() {
            return Err(format!("its token {token:?} stands twice"));
        }
        match types[id].as_u64() {
            Some(NORMAL) => {
                let score = scores[id].as_f64();
                let score = score.ok_or_else(|| format!("the score of token {id} is no number"))?;
                pieces.insert(token, score);
            }
            Some(kind @ (CONTROL | USER_DEFINED)) => added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind == CONTROL,
            })),
            _ => {}
        }
    }
    let named = |name: &str| {
        let id = key(name).and_then(Value::as_u64)?;
        let token = tokens.get(usize::try_from(id).ok()?)?.as_str()?;
        Some((token, id))
    };
    let flag =
        |name: &str, otherwise: bool| key(name).and_then(Value::as_bool).unwrap_or(otherwise);
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let prefix = flag("add_space_prefix", true);
    let normalizers = match prefix {
        true => json!([{"type": "Prepend", "prepend": SPACE}, space]),
        false => json!([space]),
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let begin = named("bos_token_id").filter(|_| flag("add_bos_token", true));
    let end = named("eos_token_id").filter(|_| flag("add_eos_token", false));
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": around(begin, end),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": named("unknown_token_id").map(|(token, _)| token),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": vocab, "merges": merges(&pieces),
        },
    });
    Ok(tokenizer.to_string())
}

/// Every way of joining two pieces into one, those of the highest score first.
fn merges(pieces: &HashMap<&str, f64>) -> Vec<[String; 2]> {
    let mut found: Vec<(f64, &str, usize)> = Vec::new();
    for (piece, score) in pieces {
        let cuts = piece.char_indices().skip(1).map(|(at, _)| at);
        let both = |at: &usize| {
            let (left, right) = piece.split_at(*at);
            pieces.contains_key(left) && pieces.contains_key(right)
        };
        found.extend(cuts.filter(both).map(|at| (*score, *piece, at)));
    }
    found.sort_by(|a, b| {
        let by_score = b.0.total_cmp(&a.0);
        by_score.then(a.1.cmp(b.1)).then(a.2.cmp(&b.2))
    });
    let cut = |(_, piece, at): (f64, &str, usize)| {
        let (left, right) = piece.split_at(at);
        [left.to_string(), right.to_string()]
    };
    found.into_iter().map(cut).collect()
}

/// Puts the begin and the end token around a text.
fn around(begin: Option<(&str, u64)>, end: Option<(&str, u64)>) -> Value {
    if begin.is_none() && end.is_none() {
        return Value::Null;
    }
    let special = |(token, _): (&str, u64)| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let whole = |middle: Vec<Value>| -> Vec<Value> {
        let begin = begin.map(special).into_iter();
        begin.chain(middle).chain(end.map(special)).collect()
    };
    let tokens = begin.into_iter().chain(end).map(|(token, id)| {
        let value = json!({"id": token, "ids": [id], "tokens": [token]});
        (token.to_string(), value)
    });
    json!({
        "type": "TemplateProcessing",
        "single": whole(vec![text("A")]),
        "pair": whole(vec![text("A"), text("B")]),
        "special_tokens": tokens.collect::<Map<String, Value>>(),
    })
}
