//! Whole models against whole models of another implementation: the block, its wiring and the heads.

use anyformer_models::{Input, Model, ModelConfig, Target};
use anyformer_ops::{Device, Tensor, tensor_values};
use serde_json::{Value, json};

use crate::golden::{Closeness, Golden};
use crate::tolerance::{GRADIENT, OUTPUT, check as compare};

fn number(golden: &Golden, key: &str) -> Result<u64, String> {
    let value = golden.config.get(key).and_then(Value::as_u64);
    value.ok_or_else(|| format!("golden {}: no number {key} in its config", golden.name))
}

fn flag(golden: &Golden, key: &str) -> bool {
    golden.config.get(key) == Some(&Value::Bool(true))
}

/// Our config for the reference's.
fn config(golden: &Golden) -> Result<ModelConfig, String> {
    let get = |key: &str| number(golden, key);
    let kind = golden.config.get("model_type").and_then(Value::as_str);
    let (mixer, channel, eps) = match kind {
        Some("llama") => (
            json!({
                "name": "attention",
                "heads": get("num_attention_heads")?,
                "kv_heads": get("num_key_value_heads")?,
                "head_dim": get("head_dim")?,
            }),
            json!({"name": "swiglu", "hidden": get("intermediate_size")?}),
            "rms_norm_eps",
        ),
        Some("mamba") => (
            json!({
                "name": "mamba",
                "expand": get("expand")?,
                "state": get("state_size")?,
                "conv": get("conv_kernel")?,
                "dt_rank": get("time_step_rank")?,
            }),
            json!({"name": "none"}),
            "layer_norm_epsilon",
        ),
        Some("mamba2") => (
            json!({
                "name": "mamba2",
                "expand": get("expand")?,
                "head_dim": get("head_dim")?,
                "state": get("state_size")?,
                "groups": get("n_groups")?,
                "conv": get("conv_kernel")?,
            }),
            json!({"name": "none"}),
            "layer_norm_epsilon",
        ),
        other => return Err(format!("golden {}: model type {other:?}", golden.name)),
    };
    let config = json!({
        "dim": get("hidden_size")?,
        "layers": get("num_hidden_layers")?,
        "mixers": [mixer],
        "channel": channel,
        "norm_eps": golden.config.get(eps),
        "reads": {"tokens": {"vocab": get("vocab_size")?}},
        "gives": {"next_token": {"tied": flag(golden, "tie_word_embeddings")}},
    });
    ModelConfig::from_json(&config).map_err(|error| error.to_string())
}

/// The reference's name of one of our parameters.
fn their_name(ours: &str, kind: &str) -> String {
    let llama = kind == "llama";
    let root = if llama { "model" } else { "backbone" };
    let pairs = match llama {
        true => vec![
            ("embed.weight", "model.embed_tokens.weight"),
            ("norm.weight", "model.norm.weight"),
        ],
        false => vec![
            ("embed.weight", "backbone.embeddings.weight"),
            ("norm.weight", "backbone.norm_f.weight"),
        ],
    };
    if let Some((_, theirs)) = pairs.iter().find(|(name, _)| *name == ours) {
        return theirs.to_string();
    }
    let inner = match ours.starts_with("layers.") {
        true => format!("{root}.{ours}"),
        false => ours.to_string(),
    };
    match llama {
        true => inner
            .replace(".norm1.", ".input_layernorm.")
            .replace(".norm2.", ".post_attention_layernorm.")
            .replace(".mixer.", ".self_attn.")
            .replace(".channel.", ".mlp."),
        false => inner.replace(".norm1.", ".norm."),
    }
}

/// Compares logits and the gradient of every parameter.
pub fn check(golden: &Golden) -> Result<Closeness, String> {
    let kind = golden.config.get("model_type").and_then(Value::as_str);
    let kind = kind.unwrap_or_default().to_string();
    let device = Device::flex().autodiff();
    let text = |error: &dyn std::fmt::Display| format!("golden {}: {error}", golden.name);
    let model = Model::new(&config(golden)?, &device, 0).map_err(|error| text(&error))?;
    let mut unused: Vec<&str> = golden
        .keys()
        .filter_map(|key| key.strip_prefix("w."))
        .collect();
    for param in model.params().params() {
        let theirs = their_name(param.name(), &kind);
        let (_, values) = golden.get(&format!("w.{theirs}"))?;
        param.set(values.to_vec()).map_err(|error| text(&error))?;
        unused.retain(|name| *name != theirs);
    }
    if !unused.is_empty() {
        return Err(text(&format!("weights {unused:?} are not ours")));
    }
    let (shape, ids) = golden.get("ids")?;
    let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    let (batch, time) = (shape[0], shape[1]);
    let input = Input::Tokens { ids: &ids, batch };
    let y = model.forward(input, None).map_err(|error| text(&error))?;
    let at = |what: &str| format!("golden {} {what}", golden.name);
    let mut output = compare(
        &at("y"),
        &tensor_values(y.clone()),
        golden.get("y")?.1,
        OUTPUT,
    )?;
    let (_, cotangent) = golden.get("cotangent")?;
    let cotangent = Tensor::<1>::from_data(cotangent, &device).reshape(y.dims());
    let mut gradient = 0f64;
    let mut against = |loss: Tensor<1>, prefix: &str| -> Result<(), String> {
        let mut grads = loss.backward();
        for param in model
            .params()
            .params()
            .iter()
            .filter(|param| param.trainable())
        {
            let name = format!("{prefix}.{}", their_name(param.name(), &kind));
            let (_, want) = golden.get(&name)?;
            let got = param.gradient(&mut grads);
            let got = got.ok_or_else(|| at(&format!("{} has no gradient", param.name())))?;
            gradient = gradient.max(compare(&at(&name), &got, want, GRADIENT)?);
        }
        Ok(())
    };
    against((y * cotangent).sum(), "grad.w")?;
    let targets: Vec<i64> = (0..batch * time)
        .map(|place| match place % time + 1 == time {
            true => -100,
            false => i64::from(ids[place + 1]),
        })
        .collect();
    let scored = model
        .loss(input, None, Target::Tokens(&targets))
        .map_err(|error| text(&error))?;
    let loss = tensor_values(scored.loss.clone());
    output = output.max(compare(
        &at("ce.loss"),
        &loss,
        golden.get("ce.loss")?.1,
        OUTPUT,
    )?);
    against(scored.loss, "ce.grad")?;
    Ok(Closeness {
        name: golden.name.clone(),
        mixer: golden.mixer.clone(),
        reference: golden.reference(),
        output,
        gradient,
    })
}
