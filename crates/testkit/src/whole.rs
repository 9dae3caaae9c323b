//! Whole models against whole models of another implementation: the block, its wiring and the heads.

use anyformer_hub::Family;
use anyformer_models::{Input, Model, ModelConfig, Target};
use anyformer_ops::{Device, Tensor, tensor_values};
use serde_json::Value;

use crate::golden::{Closeness, Golden};
use crate::tolerance::{GRADIENT, OUTPUT, check as compare};

/// Our config for the reference's, and whose names its parameters have.
pub fn ours(golden: &Golden) -> Result<(ModelConfig, Family), String> {
    let text = |error: String| format!("golden {}: {error}", golden.name);
    let theirs = Value::Object(golden.config.clone());
    let family = Family::of(&theirs).map_err(text)?;
    Ok((family.config(&theirs).map_err(text)?, family))
}

/// Compares logits and the gradient of every parameter.
pub fn check(golden: &Golden) -> Result<Closeness, String> {
    let (config, family) = ours(golden)?;
    let device = Device::flex().autodiff();
    let text = |error: &dyn std::fmt::Display| format!("golden {}: {error}", golden.name);
    let model = Model::new(&config, &device, 0).map_err(|error| text(&error))?;
    let mut unused: Vec<&str> = golden
        .keys()
        .filter_map(|key| key.strip_prefix("w."))
        .collect();
    for param in model.params().params() {
        let theirs = family.their_name(param.name()).unwrap_or_default();
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
            let name = format!(
                "{prefix}.{}",
                family.their_name(param.name()).unwrap_or_default()
            );
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
