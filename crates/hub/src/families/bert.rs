//! BERT, RoBERTa and DistilBERT: post-norm encoders that look both ways. Read with the masked-token head or the class head
//! where the file was saved with it, else as hidden vectors.

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Name, Rows, rows, same};
use super::{ACTIVATIONS, Layout, classes, parts, their_activation};

/// BERT's names under a prefix, then the given lines.
macro_rules! bert_names {
    ($prefix:literal, $($own:expr),* $(,)?) => {
        const { &[
            same("embed.weight", concat!($prefix, "embeddings.word_embeddings.weight")),
            same("types.weight", concat!($prefix, "embeddings.token_type_embeddings.weight")),
            same("embed_norm.*", concat!($prefix, "embeddings.LayerNorm.*")),
            same("layers.#.norm1.*", concat!($prefix, "encoder.layer.#.attention.output.LayerNorm.*")),
            same("layers.#.norm2.*", concat!($prefix, "encoder.layer.#.output.LayerNorm.*")),
            same("layers.#.mixer.q_proj.*", concat!($prefix, "encoder.layer.#.attention.self.query.*")),
            same("layers.#.mixer.k_proj.*", concat!($prefix, "encoder.layer.#.attention.self.key.*")),
            same("layers.#.mixer.v_proj.*", concat!($prefix, "encoder.layer.#.attention.self.value.*")),
            same("layers.#.mixer.o_proj.*", concat!($prefix, "encoder.layer.#.attention.output.dense.*")),
            same("layers.#.channel.fc1.*", concat!($prefix, "encoder.layer.#.intermediate.dense.*")),
            same("layers.#.channel.fc2.*", concat!($prefix, "encoder.layer.#.output.dense.*")),
            $($own),*
        ] }
    };
}

pub(super) static BERT: Layout = Layout {
    kinds: &["bert"],
    prefix: "bert.",
    names: |_| {
        bert_names!(
            "bert.",
            same(
                "positions.weight",
                "bert.embeddings.position_embeddings.weight"
            ),
            same("head.0.*", "bert.pooler.dense.*"),
            same("head.1.*", "classifier.*"),
            same("head.dense.*", "cls.predictions.transform.dense.*"),
            same("head.norm.*", "cls.predictions.transform.LayerNorm.*"),
            same("head.bias", "cls.predictions.bias"),
        )
    },
    spare: &[
        "pooler.*",
        "position_ids",
        "predictions.decoder.*",
        "seq_relationship.*",
    ],
    read,
    write,
};

/// RoBERTa's positions begin after the two rows of the padding token.
pub(super) static ROBERTA: Layout = Layout {
    kinds: &["roberta"],
    prefix: "roberta.",
    names: |_| {
        bert_names!(
            "roberta.",
            rows(
                "positions.weight",
                "roberta.embeddings.position_embeddings.weight",
                Rows::After(2)
            ),
            same("head.0.*", "classifier.dense.*"),
            same("head.1.*", "classifier.out_proj.*"),
            same("head.dense.*", "lm_head.dense.*"),
            same("head.norm.*", "lm_head.layer_norm.*"),
            same("head.bias", "lm_head.bias"),
        )
    },
    spare: &["pooler.*", "position_ids", "lm_head.decoder.*"],
    read,
    write,
};

pub(super) static DISTILBERT: Layout = Layout {
    kinds: &["distilbert"],
    prefix: "distilbert.",
    names: |_| DISTILBERT_NAMES,
    spare: &["position_ids", "vocab_projector.weight"],
    read: read_distilbert,
    write: write_distilbert,
};

const DISTILBERT_NAMES: &[Name] = &[
    same(
        "embed.weight",
        "distilbert.embeddings.word_embeddings.weight",
    ),
    same(
        "positions.weight",
        "distilbert.embeddings.position_embeddings.weight",
    ),
    same("embed_norm.*", "distilbert.embeddings.LayerNorm.*"),
    same(
        "layers.#.norm1.*",
        "distilbert.transformer.layer.#.sa_layer_norm.*",
    ),
    same(
        "layers.#.norm2.*",
        "distilbert.transformer.layer.#.output_layer_norm.*",
    ),
    same(
        "layers.#.mixer.q_proj.*",
        "distilbert.transformer.layer.#.attention.q_lin.*",
    ),
    same(
        "layers.#.mixer.k_proj.*",
        "distilbert.transformer.layer.#.attention.k_lin.*",
    ),
    same(
        "layers.#.mixer.v_proj.*",
        "distilbert.transformer.layer.#.attention.v_lin.*",
    ),
    same(
        "layers.#.mixer.o_proj.*",
        "distilbert.transformer.layer.#.attention.out_lin.*",
    ),
    same(
        "layers.#.channel.fc1.*",
        "distilbert.transformer.layer.#.ffn.lin1.*",
    ),
    same(
        "layers.#.channel.fc2.*",
        "distilbert.transformer.layer.#.ffn.lin2.*",
    ),
    same("head.0.*", "pre_classifier.*"),
    same("head.1.*", "classifier.*"),
    same("head.dense.*", "vocab_transform.*"),
    same("head.norm.*", "vocab_layer_norm.*"),
    same("head.bias", "vocab_projector.bias"),
];

/// What the file was saved with, and the function in its head; a head that is not read is refused. `masked` is the function in
/// the head of masked tokens, `class` that in the head of classes.
pub(super) fn gives(
    keys: &Keys,
    dim: u64,
    masked: &str,
    class: &str,
) -> Result<[Value; 2], String> {
    let saved = keys.0["architectures"][0].as_str().unwrap_or("Model");
    if saved.ends_with("ForMaskedLM") || saved.ends_with("ForPreTraining") {
        keys.must("tie_word_embeddings", &[json!(true)])?;
        return Ok([json!("masked_token"), json!(masked)]);
    }
    if classes::asked(keys) {
        let head = json!({"classes": classes::count(keys)?, "pool": "first", "hidden": dim});
        return Ok([json!({"class": head}), json!(class)]);
    }
    match saved.ends_with("Model") {
        true => Ok([json!("hidden"), Value::Null]),
        false => Err(format!(
            "architectures names {saved}; an encoder saved as …Model, …ForMaskedLM or …ForSequenceClassification can be read"
        )),
    }
}

fn attention(heads: u64) -> Value {
    json!([{"name": "attention", "heads": heads, "causal": false, "position": "none", "bias": true}])
}

/// What encoders of this kind have in common, with `own` keys beside it: post-norm blocks of attention and MLP behind a normed
/// embedding with learned positions. `sizes` are their keys of the layers, heads and inner features.
pub(super) fn encoder(
    keys: &Keys,
    [layers, heads, hidden]: [&str; 3],
    activation: &str,
    [gives, function]: [Value; 2],
    own: Value,
) -> Result<Value, String> {
    let mut ours = json!({
        "layers": keys.number(layers)?,
        "mixers": attention(keys.number(heads)?),
        "channel": {"name": "mlp", "hidden": keys.number(hidden)?, "activation": activation},
        "wiring": "post_norm",
        "norm": "layer",
        "positions": "learned",
        "max_time": keys.number("max_position_embeddings")?,
        "embed_norm": true,
        "reads": {"tokens": {"vocab": keys.number("vocab_size")?}},
        "gives": gives,
        "head_activation": function,
    });
    for (key, value) in own.as_object().into_iter().flatten() {
        ours[key] = value.clone();
    }
    Ok(ours)
}

/// Their keys of layers, heads and inner features.
pub(super) const SIZES: [&str; 3] = [
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
];

fn read(keys: &Keys, kind: &str) -> Result<Value, String> {
    keys.must("is_decoder", &[json!(false)])?;
    keys.must("add_cross_attention", &[json!(false)])?;
    keys.must("position_embedding_type", &[json!("absolute")])?;
    let mut longest = keys.number("max_position_embeddings")?;
    if kind == "roberta" {
        keys.must("pad_token_id", &[json!(1)])?;
        longest = longest.saturating_sub(2);
    }
    let activation = keys.word("hidden_act", ACTIVATIONS)?;
    let masked = if kind == "roberta" {
        "gelu"
    } else {
        activation
    };
    let dim = keys.number("hidden_size")?;
    let own = json!({
        "dim": dim,
        "norm_eps": keys.real_or("layer_norm_eps", 1e-12)?,
        "max_time": longest,
        "token_types": keys.number_or("type_vocab_size", 2)?,
    });
    encoder(
        keys,
        SIZES,
        activation,
        gives(keys, dim, masked, "tanh")?,
        own,
    )
}

fn write(ours: &Value, kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "mlp")?;
    let (name, before) = match kind {
        "roberta" => ("Roberta", 2),
        _ => ("Bert", 0),
    };
    let mut theirs = sizes(ours, mixer, channel);
    theirs["max_position_embeddings"] = json!(ours["max_time"].as_u64().unwrap_or(0) + before);
    architecture(name, ours, &mut theirs);
    if kind == "roberta" {
        theirs["pad_token_id"] = json!(1);
    }
    Ok(theirs)
}

/// Their keys for the sizes of an encoder.
pub(super) fn sizes(ours: &Value, mixer: &Value, channel: &Value) -> Value {
    json!({
        "hidden_size": ours["dim"],
        "num_hidden_layers": ours["layers"],
        "num_attention_heads": mixer["heads"],
        "intermediate_size": channel["hidden"],
        "hidden_act": their_activation(channel),
        "layer_norm_eps": ours["norm_eps"],
        "max_position_embeddings": ours["max_time"],
        "type_vocab_size": ours["token_types"],
        "vocab_size": ours["reads"]["tokens"]["vocab"],
    })
}

/// The name of the class that saves such a model, with names for its classes.
pub(super) fn architecture(name: &str, ours: &Value, theirs: &mut Value) {
    let suffix = match &ours["gives"] {
        Value::String(gives) if gives == "hidden" => "Model",
        Value::String(_) => "ForMaskedLM",
        _ => {
            classes::put(theirs, ours);
            "ForSequenceClassification"
        }
    };
    theirs["architectures"] = json!([format!("{name}{suffix}")]);
}

fn read_distilbert(keys: &Keys, _kind: &str) -> Result<Value, String> {
    let activation = keys.word("activation", ACTIVATIONS)?;
    let dim = keys.number("dim")?;
    let sizes = ["n_layers", "n_heads", "hidden_dim"];
    let own = json!({"dim": dim, "norm_eps": 1e-12});
    encoder(
        keys,
        sizes,
        activation,
        gives(keys, dim, activation, "relu")?,
        own,
    )
}

fn write_distilbert(ours: &Value, _kind: &str) -> Result<Value, String> {
    let (mixer, channel) = parts(ours, "attention", "mlp")?;
    let mut theirs = json!({
        "dim": ours["dim"],
        "n_layers": ours["layers"],
        "n_heads": mixer["heads"],
        "hidden_dim": channel["hidden"],
        "activation": their_activation(channel),
        "max_position_embeddings": ours["max_time"],
        "vocab_size": ours["reads"]["tokens"]["vocab"],
    });
    architecture("DistilBert", ours, &mut theirs);
    Ok(theirs)
}
