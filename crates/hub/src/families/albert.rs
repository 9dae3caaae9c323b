//! ALBERT (Lan et al., 2020, arXiv 1909.11942): BERT with one set of weights for all layers and a narrow embedding.

use serde_json::{Value, json};

use super::bert::{SIZES, architecture, encoder, gives, sizes};
use super::keys::Keys;
use super::names::{Name, same};
use super::{ACTIVATIONS, Layout, parts};

pub(super) static LAYOUT: Layout = Layout {
    kinds: &["albert"],
    prefix: "albert.",
    names: |_| NAMES,
    spare: &[
        "pooler.*",
        "position_ids",
        "predictions.decoder.*",
        "sop_classifier.*",
    ],
    read,
    write,
};

macro_rules! layer {
    ($rest:literal) => {
        concat!(
            "albert.encoder.albert_layer_groups.0.albert_layers.0.",
            $rest
        )
    };
}

const NAMES: &[Name] = &[
    same("embed.weight", "albert.embeddings.word_embeddings.weight"),
    same(
        "positions.weight",
        "albert.embeddings.position_embeddings.weight",
    ),
    same(
        "types.weight",
        "albert.embeddings.token_type_embeddings.weight",
    ),
    same("embed_norm.*", "albert.embeddings.LayerNorm.*"),
    same(
        "embed_proj.*",
        "albert.encoder.embedding_hidden_mapping_in.*",
    ),
    same("layers.#.mixer.q_proj.*", layer!("attention.query.*")),
    same("layers.#.mixer.k_proj.*", layer!("attention.key.*")),
    same("layers.#.mixer.v_proj.*", layer!("attention.value.*")),
    same("layers.#.mixer.o_proj.*", layer!("attention.dense.*")),
    same("layers.#.norm1.*", layer!("attention.LayerNorm.*")),
    same("layers.#.channel.fc1.*", layer!("ffn.*")),
    same("layers.#.channel.fc2.*", layer!("ffn_output.*")),
    same("layers.#.norm2.*", layer!("full_layer_layer_norm.*")),
    same("head.0.*", "albert.pooler.*"),
    same("head.1.*", "classifier.*"),
    same("head.dense.*", "predictions.dense.*"),
    same("head.norm.*", "predictions.LayerNorm.*"),
    same("head.bias", "predictions.bias"),
];

fn read(keys: &Keys, _kind: &str) -> Result<Value, String> {
    keys.must("position_embedding_type", &[json!("absolute")])?;
    keys.must("num_hidden_groups", &[json!(1)])?;
    keys.must("inner_group_num", &[json!(1)])?;
    let activation = match keys.given("hidden_act") {
        None => "gelu_tanh",
        Some(_) => keys.word("hidden_act", ACTIVATIONS)?,
    };
    let dim = keys.number("hidden_size")?;
    let own = json!({
        "dim": dim,
        "embed_dim": keys.number("embedding_size")?,
        "share_layers": 1,
        "norm_eps": keys.real_or("layer_norm_eps", 1e-12)?,
        "token_types": keys.number_or("type_vocab_size", 2)?,
    });
    encoder(
        keys,
        SIZES,
        activation,
        gives(keys, dim, activation, "tanh")?,
        own,
    )
}

fn write(ours: &Value, _kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "mlp")?;
    let mut theirs = sizes(ours, mixer, channel);
    theirs["embedding_size"] = ours["embed_dim"].clone();
    theirs["num_hidden_groups"] = json!(1);
    theirs["inner_group_num"] = json!(1);
    architecture("Albert", ours, &mut theirs);
    Ok(theirs)
}
