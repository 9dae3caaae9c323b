//! Folders as other programs save them, made from goldens: their config and tensors as files, their scores to compare.

use std::collections::BTreeMap;
use std::path::Path;

use anyformer_hub::{ModelFolder, NamedTensor, write_safetensors};
use anyformer_models::{Input, Model};
use anyformer_ops::{Device, tensor_values};
use serde_json::{Value, json};

use crate::golden::{Closeness, Golden};
use crate::tolerance::{OUTPUT, check as compare};

/// Every tensor of the golden's model under the name that it has in the file.
pub fn tensors(golden: &Golden) -> Vec<NamedTensor> {
    let weights = golden.keys().filter_map(|key| {
        let name = key.strip_prefix("w.")?;
        let (shape, values) = golden.get(key).ok()?;
        Some(NamedTensor {
            name: name.to_string(),
            shape: shape.to_vec(),
            values: values.to_vec(),
        })
    });
    weights.collect()
}

/// Writes the golden's folder, its tensors over so many files.
pub fn write(golden: &Golden, folder: &Path, files: usize) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| format!("golden {}: {error}", golden.name);
    let put = |name: &str, content: String| {
        std::fs::write(folder.join(name), content).map_err(|error| text(&error))
    };
    put(
        "config.json",
        Value::Object(golden.config.clone()).to_string(),
    )?;
    let (all, none) = (tensors(golden), BTreeMap::new());
    let file = |name: &str, part: &[NamedTensor]| {
        write_safetensors(&folder.join(name), part, &none).map_err(|error| text(&error))
    };
    if files == 1 {
        return file("model.safetensors", &all);
    }
    let mut map = serde_json::Map::new();
    for (number, part) in all.chunks(all.len().div_ceil(files)).enumerate() {
        let name = format!("model-{number}.safetensors");
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        file(&name, part)?;
    }
    let index = json!({ "weight_map": map }).to_string();
    put("model.safetensors.index.json", index)
}

/// Loads a folder.
pub fn load(folder: &Path) -> Result<Model, String> {
    let opened = ModelFolder::open(folder).map_err(|error| error.to_string())?;
    opened
        .load(&Device::flex())
        .map_err(|error| error.to_string())
}

/// The golden's rows of unequal length: the ids of each.
pub fn rows(golden: &Golden) -> Result<Vec<Vec<u32>>, String> {
    let numbers = |key: &str| -> Result<Vec<u32>, String> {
        Ok(golden.get(key)?.1.iter().map(|id| *id as u32).collect())
    };
    let (ids, lengths) = (numbers("ids")?, numbers("lengths")?);
    let mut rest = &ids[..];
    let rows = lengths.iter().map(|length| {
        let (row, others) = rest.split_at((*length as usize).min(rest.len()));
        rest = others;
        row.to_vec()
    });
    Ok(rows.collect())
}

/// The scores of all rows in one batch, padded by the id 0.
pub fn ragged(golden: &Golden, model: &Model) -> Result<Vec<f32>, String> {
    let rows = rows(golden)?;
    let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
    let time = lengths.iter().copied().max().unwrap_or(0);
    let padded = |rows: Vec<Vec<u32>>| -> Vec<u32> {
        rows.into_iter()
            .flat_map(|mut row| {
                row.resize(time, 0);
                row
            })
            .collect()
    };
    let batch = rows.len();
    let types: Option<Vec<Vec<u32>>> = golden.get("types").ok().map(|(_, types)| {
        let mut rest = types.iter().map(|kind| *kind as u32);
        let of = |length: &usize| rest.by_ref().take(*length).collect();
        lengths.iter().map(of).collect()
    });
    let ids = padded(rows);
    let types = types.map(padded);
    let input = match &types {
        None => Input::Tokens { ids: &ids, batch },
        Some(types) => Input::TypedTokens {
            ids: &ids,
            types,
            batch,
        },
    };
    let y = model.forward(input, Some(&lengths));
    y.map(tensor_values).map_err(|error| error.to_string())
}

/// Compares the scores of a ragged batch.
pub fn check(golden: &Golden) -> Result<Closeness, String> {
    let at = |error: String| format!("golden {}: {error}", golden.name);
    let folder = tempfile::tempdir().map_err(|error| at(error.to_string()))?;
    write(golden, folder.path(), 1)?;
    let model = load(folder.path()).map_err(at)?;
    let y = ragged(golden, &model).map_err(at)?;
    Ok(Closeness {
        name: golden.name.clone(),
        mixer: golden.mixer.clone(),
        reference: golden.reference(),
        output: compare(&at("y".into()), &y, golden.get("y")?.1, OUTPUT)?,
        gradient: f64::NAN,
    })
}
