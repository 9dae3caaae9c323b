//! Folders in the layout of transformers, written from the goldens with its names, are read by path and give its logits.

use std::collections::BTreeMap;

use anyformer_hub::{ModelFolder, NamedTensor, write_safetensors};
use anyformer_models::Input;
use anyformer_ops::{Device, tensor_values};
use anyformer_testkit::golden::{self, Golden};
use anyformer_testkit::tolerance::{OUTPUT, check};
use serde_json::{Value, json};

fn tensors(golden: &Golden) -> Vec<NamedTensor> {
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

fn logits(golden: &Golden, folder: &std::path::Path) -> Vec<f32> {
    let opened = ModelFolder::open(folder).expect("opens");
    let model = opened.load(&Device::flex()).expect("loads");
    let (shape, ids) = golden.get("ids").expect("ids");
    let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    let whole = model.forward(
        Input::Tokens {
            ids: &ids,
            batch: shape[0],
        },
        None,
    );
    // Token by token, every row at once.
    let (batch, time) = (shape[0], shape[1]);
    let column = |at: usize| -> Vec<u32> { (0..batch).map(|row| ids[row * time + at]).collect() };
    let (_, mut state) = model
        .prefill(&column(0), batch, None, None)
        .expect("prefill");
    let mut last = Vec::new();
    for at in 1..time {
        let (scores, next) = model.step(&column(at), &state).expect("step");
        (last, state) = (tensor_values(scores), next);
    }
    let whole = tensor_values(whole.expect("runs"));
    let vocab = whole.len() / (batch * time);
    let want: Vec<f32> = (0..batch)
        .flat_map(|row| &whole[((row + 1) * time - 1) * vocab..(row + 1) * time * vocab])
        .copied()
        .collect();
    check("streamed", &last, &want, OUTPUT).expect("streamed equals whole");
    whole
}

fn write_config(folder: &std::path::Path, golden: &Golden) {
    let text = Value::Object(golden.config.clone()).to_string();
    std::fs::write(folder.join("config.json"), text).expect("writes");
}

#[test]
fn folders_of_transformers_give_its_logits() {
    let mut seen = 0;
    for golden in golden::all().expect("goldens").iter() {
        if golden.mixer != "model" {
            continue;
        }
        seen += 1;
        let want = golden.get("y").expect("y").1;
        let one = tempfile::tempdir().expect("folder");
        write_config(one.path(), golden);
        let all = tensors(golden);
        let none = BTreeMap::new();
        write_safetensors(&one.path().join("model.safetensors"), &all, &none).expect("writes");
        check(&golden.name, &logits(golden, one.path()), want, OUTPUT).expect("one file");

        let several = tempfile::tempdir().expect("folder");
        write_config(several.path(), golden);
        let mut map = serde_json::Map::new();
        for (number, part) in all.chunks(all.len().div_ceil(2)).enumerate() {
            let file = format!("model-{number}.safetensors");
            map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(file))));
            write_safetensors(&several.path().join(file), part, &none).expect("writes");
        }
        let index = json!({ "weight_map": map }).to_string();
        let path = several.path().join("model.safetensors.index.json");
        std::fs::write(path, index).expect("writes");
        check(&golden.name, &logits(golden, several.path()), want, OUTPUT).expect("shards");
    }
    assert_eq!(seen, 3);
}

#[test]
fn everything_that_does_not_fit_is_in_one_error() {
    let goldens = golden::all().expect("goldens");
    let golden = goldens.iter().find(|golden| golden.name == "model_llama");
    let golden = golden.expect("model_llama");
    let folder = tempfile::tempdir().expect("folder");
    write_config(folder.path(), golden);
    let mut all = tensors(golden);
    let [first, second] = [all[0].name.clone(), all[1].name.clone()];
    all[0].name = "model.unknown".into();
    all[1].shape = vec![all[1].values.len()];
    let path = folder.path().join("model.safetensors");
    write_safetensors(&path, &all, &BTreeMap::new()).expect("writes");
    let opened = ModelFolder::open(folder.path()).expect("opens");
    let error = opened
        .load(&Device::flex())
        .err()
        .expect("refused")
        .to_string();
    // Missing tensors have our names: those are what the model lacks.
    let ours = if second.contains("embed") {
        "embed.weight"
    } else {
        second.as_str()
    };
    for name in ["model.unknown", first.as_str(), ours] {
        assert!(error.contains(name), "{name}: {error}");
    }
}

#[test]
fn more_layers_than_tensors_are_refused_before_any_is_made() {
    let goldens = golden::all().expect("goldens");
    let golden = goldens.iter().find(|golden| golden.name == "model_llama");
    let golden = golden.expect("model_llama");
    let folder = tempfile::tempdir().expect("folder");
    let mut config = golden.config.clone();
    config.insert("num_hidden_layers".into(), json!(2_000_000_000));
    let text = Value::Object(config).to_string();
    std::fs::write(folder.path().join("config.json"), text).expect("writes");
    let path = folder.path().join("model.safetensors");
    write_safetensors(&path, &tensors(golden), &BTreeMap::new()).expect("writes");
    let opened = ModelFolder::open(folder.path()).expect("opens");
    let error = opened
        .load(&Device::flex())
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("2000000000 layers"), "{error}");
}
