//! DeBERTa, version 2 and 3 (He et al., 2021, arXiv 2006.03654 and 2111.09543): BERT whose attention multiplies contents with vectors
//! of distances, the larger ones with a convolution beside the first block.

use serde_json::{Value, json};

use super::bert::{SIZES, architecture, encoder, gives, sizes};
use super::keys::Keys;
use super::names::{Name, same};
use super::{ACTIVATIONS, Layout, parts, word};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["deberta-v2"],
    prefix: "deberta.",
    names: |_| NAMES,
    spare: &[
        "position_ids",
        "predictions.decoder.*",
        "lm_predictions.*",
        "mask_predictions.*",
    ],
    read,
    write,
};

const NAMES: &[Name] = &[
    same("embed.weight", "deberta.embeddings.word_embeddings.weight"),
    same(
        "positions.weight",
        "deberta.embeddings.position_embeddings.weight",
    ),
    same(
        "types.weight",
        "deberta.embeddings.token_type_embeddings.weight",
    ),
    same("embed_norm.*", "deberta.embeddings.LayerNorm.*"),
    same("places.weight", "deberta.encoder.rel_embeddings.weight"),
    same("places_norm.*", "deberta.encoder.LayerNorm.*"),
    same("first_conv.*", "deberta.encoder.conv.conv.*"),
    same("first_conv_norm.*", "deberta.encoder.conv.LayerNorm.*"),
    same(
        "layers.#.mixer.q_proj.*",
        "deberta.encoder.layer.#.attention.self.query_proj.*",
    ),
    same(
        "layers.#.mixer.k_proj.*",
        "deberta.encoder.layer.#.attention.self.key_proj.*",
    ),
    same(
        "layers.#.mixer.v_proj.*",
        "deberta.encoder.layer.#.attention.self.value_proj.*",
    ),
    same(
        "layers.#.mixer.place_k_proj.*",
        "deberta.encoder.layer.#.attention.self.pos_key_proj.*",
    ),
    same(
        "layers.#.mixer.place_q_proj.*",
        "deberta.encoder.layer.#.attention.self.pos_query_proj.*",
    ),
    same(
        "layers.#.mixer.o_proj.*",
        "deberta.encoder.layer.#.attention.output.dense.*",
    ),
    same(
        "layers.#.norm1.*",
        "deberta.encoder.layer.#.attention.output.LayerNorm.*",
    ),
    same(
        "layers.#.channel.fc1.*",
        "deberta.encoder.layer.#.intermediate.dense.*",
    ),
    same(
        "layers.#.channel.fc2.*",
        "deberta.encoder.layer.#.output.dense.*",
    ),
    same(
        "layers.#.norm2.*",
        "deberta.encoder.layer.#.output.LayerNorm.*",
    ),
    same("head.0.*", "pooler.dense.*"),
    same("head.1.*", "classifier.*"),
    same("head.dense.*", "cls.predictions.transform.dense.*"),
    same("head.norm.*", "cls.predictions.transform.LayerNorm.*"),
    same("head.bias", "cls.predictions.bias"),
];

/// Their words for the function of the convolution and of the class head.
const WITH_TANH: &[(&str, &str)] = &[
    ("tanh", "tanh"),
    ("gelu", "gelu"),
    ("gelu_new", "gelu_tanh"),
    ("relu", "relu"),
    ("silu", "silu"),
];

const TERMS: &[(&str, bool, bool)] = &[
    ("both", true, true),
    ("to_place", true, false),
    ("from_place", false, true),
];

/// The terms of positions by our name; empty where there are none.
fn terms(keys: &Keys) -> Result<&'static str, String> {
    let given: Vec<String> = match keys.given("pos_att_type") {
        None => Vec::new(),
        Some(Value::String(text)) => text
            .split('|')
            .map(|word| word.trim().to_lowercase())
            .collect(),
        Some(Value::Array(words)) => {
            let word = |word: &Value| word.as_str().unwrap_or_default().to_string();
            words.iter().map(word).collect()
        }
        Some(other) => return Err(format!("pos_att_type is {other}; a list is read")),
    };
    let given: Vec<&String> = given.iter().filter(|word| !word.is_empty()).collect();
    if let Some(word) = given.iter().find(|word| **word != "c2p" && **word != "p2c") {
        return Err(format!(
            "pos_att_type has {word:?}; c2p and p2c can be read here"
        ));
    }
    let has = |wanted: &str| given.iter().any(|word| *word == wanted);
    let found = TERMS
        .iter()
        .find(|(_, to, from)| (*to, *from) == (has("c2p"), has("p2c")));
    Ok(found.map_or("", |(name, _, _)| name))
}

fn read(keys: &Keys, _kind: &str) -> Result<Value, String> {
    let dim = keys.number("hidden_size")?;
    let heads = keys.number("num_attention_heads")?;
    keys.must("embedding_size", &[json!(dim)])?;
    keys.must("attention_head_size", &[json!(dim / heads.max(1))])?;
    keys.must("pooler_hidden_size", &[json!(dim)])?;
    keys.must("conv_groups", &[json!(1)])?;
    let saved = keys.0["architectures"][0].as_str().unwrap_or_default();
    if saved.ends_with("ForMaskedLM") {
        // The other head is laid out otherwise.
        keys.must("legacy", &[json!(true)])?;
    }
    let eps = keys.real_or("layer_norm_eps", 1e-7)?;
    let longest = keys.number("max_position_embeddings")?;
    let mut mixer = json!({"name": "attention", "heads": heads, "causal": false, "position": "none", "bias": true});
    match (keys.flag("relative_attention", false)?, terms(keys)?) {
        (false, "") => {}
        (false, _) => {
            return Err("pos_att_type without relative_attention changes nothing but the scale; that cannot be read".into());
        }
        (true, "") => return Err("relative_attention without pos_att_type cannot be read".into()),
        (true, terms) => {
            // Their -1, or any number below 0, stands for none.
            let positive = |key: &str| match keys.given(key) {
                Some(value) if value.as_i64().is_some_and(|value| value < 0) => Ok(0),
                _ => keys.number_or(key, 0),
            };
            let norm = keys.word("norm_rel_ebd", &[("none", ""), ("layer_norm", "norm")])?;
            mixer["position"] = json!("disentangled");
            mixer["position_terms"] = json!(terms);
            mixer["position_shared"] = json!(keys.flag("share_att_key", false)?);
            mixer["position_norm"] = json!(!norm.is_empty());
            mixer["norm_eps"] = json!(eps);
            mixer["position_buckets"] = json!(positive("position_buckets")?);
            mixer["position_distance"] = match positive("max_relative_positions")? {
                0 => json!(longest),
                given => json!(given),
            };
        }
    }
    let activation = keys.word("hidden_act", ACTIVATIONS)?;
    let class = match keys.given("pooler_hidden_act") {
        None => "gelu",
        Some(_) => keys.word("pooler_hidden_act", WITH_TANH)?,
    };
    let learned = keys.flag("position_biased_input", true)?;
    let own = json!({
        "dim": dim,
        "norm_eps": eps,
        "token_types": keys.number_or("type_vocab_size", 0)?,
        "positions": if learned { "learned" } else { "none" },
        "mixers": [mixer],
        "first_conv": keys.number_or("conv_kernel_size", 0)?,
        "first_conv_activation": keys.word("conv_act", WITH_TANH)?,
    });
    let gives = gives(keys, dim, activation, class)?;
    encoder(keys, SIZES, activation, gives, own)
}

fn write(ours: &Value, _kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "mlp")?;
    let their_word = |ours: &Value| word(WITH_TANH, ours, "tanh");
    let mut theirs = sizes(ours, mixer, channel);
    theirs["position_biased_input"] = json!(ours["positions"] == "learned");
    theirs["relative_attention"] = json!(mixer["position"] == "disentangled");
    if mixer["position"] == "disentangled" {
        let found = TERMS
            .iter()
            .find(|(name, _, _)| mixer["position_terms"] == *name);
        let (_, to, from) = found.copied().unwrap_or(TERMS[0]);
        let words = [("c2p", to), ("p2c", from)]
            .into_iter()
            .filter(|(_, on)| *on);
        theirs["pos_att_type"] = words.map(|(word, _)| word).collect();
        theirs["share_att_key"] = mixer["position_shared"].clone();
        theirs["max_relative_positions"] = mixer["position_distance"].clone();
        theirs["position_buckets"] = match mixer["position_buckets"].as_u64() {
            Some(0) | None => json!(-1),
            Some(buckets) => json!(buckets),
        };
        if mixer["position_norm"] == json!(true) {
            theirs["norm_rel_ebd"] = json!("layer_norm");
        }
    }
    if ours["first_conv"] != json!(0) {
        theirs["conv_kernel_size"] = ours["first_conv"].clone();
        theirs["conv_act"] = json!(their_word(&ours["first_conv_activation"]));
    }
    if ours["gives"]["class"].is_object() {
        theirs["pooler_hidden_act"] = json!(their_word(&ours["head_activation"]));
    }
    architecture("DebertaV2", ours, &mut theirs);
    Ok(theirs)
}
