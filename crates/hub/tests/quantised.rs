//! Quantised model folders: what is saved is what is loaded, near the model that it was made of, and whatever does not fit is
//! named.

use std::fs;
use std::path::Path;

use anyformer_hub::{
    MODEL_FILE, Method, ModelFolder, Quantisation, load, quantise, save, save_quantised,
};
use anyformer_models::{Input, Model, ModelConfig};
use anyformer_ops::{Device, tensor_values};
use serde_json::{Value, json};

fn model() -> Model {
    let config = json!({
        "dim": 16, "layers": 2, "mixers": [{"name": "attention", "heads": 2}], "reads": {"tokens": {"vocab": 11}},
        "gives": {"next_token": {"tied": true}},
    });
    let config = ModelConfig::from_json(&config).unwrap();
    Model::new(&config, &Device::flex(), 3).unwrap()
}

fn how(method: Method, bits: u8) -> Quantisation {
    Quantisation {
        method,
        bits,
        group: 8,
        zeros: bits == 4,
        act_order: method == Method::Gptq,
        alpha: None,
    }
}

fn scores(model: &Model) -> Vec<f32> {
    let ids = [1, 5, 3, 10, 0, 7];
    tensor_values(
        model
            .forward(
                Input::Tokens {
                    ids: &ids,
                    batch: 1,
                },
                None,
            )
            .unwrap(),
    )
}

fn rows() -> Vec<Vec<u32>> {
    (0..4)
        .map(|row| (0..40).map(|at| (at * at + row * 3) % 11).collect())
        .collect()
}

/// A quantised folder in `place`, with the scores of the model before and after.
fn quantised(place: &Path, how: &Quantisation) -> [Vec<f32>; 2] {
    let (source, to) = (place.join("source"), place.join("quantised"));
    let model = model();
    save(&source, &model, &Default::default()).unwrap();
    let before = scores(&model);
    let mut seen = Vec::new();
    quantise(&model, how, &rows(), &mut |done, all| {
        seen.push((done, all))
    })
    .unwrap();
    assert_eq!(seen, [(1, 3), (2, 3), (3, 3)]);
    let after = scores(&model);
    save_quantised(&to, &model, &ModelFolder::open(&source).unwrap(), how).unwrap();
    [before, after]
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let size = b.iter().fold(0.0f32, |most, b| most.max(b.abs()));
    a.iter()
        .zip(b)
        .fold(0.0f32, |most, (a, b)| most.max((a - b).abs()))
        / size
}

#[test]
fn every_method_is_saved_as_it_is_and_near_the_model() {
    let methods = [
        (Method::Rtn, 8, 0.03),
        (Method::Rtn, 4, 0.4),
        (Method::Gptq, 4, 0.4),
        (Method::Awq, 4, 0.4),
        (Method::SmoothQuant, 8, 0.05),
    ];
    for (method, bits, near) in methods {
        let place = tempfile::tempdir().unwrap();
        let [before, after] = quantised(place.path(), &how(method, bits));
        let away = distance(&after, &before);
        assert!(away > 0.0 && away < near, "{method:?} {bits}: {away}");
        let folder = place.path().join("quantised");
        let again = load(&folder, &Device::flex()).unwrap();
        assert_eq!(scores(&again), after, "{method:?} {bits}");
        let packed = again
            .params()
            .params()
            .iter()
            .filter(|param| param.packed().is_some());
        // The embedding, which is the head, and the matrices of two blocks.
        assert!(packed.count() > 9);
        let written = |name: &str| {
            fs::metadata(place.path().join(name).join(MODEL_FILE))
                .unwrap()
                .len()
        };
        assert!(written("quantised") < written("source"));
        assert_eq!(
            ModelFolder::open(&folder).unwrap().quantisation,
            Some(how(method, bits))
        );
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let place = tempfile::tempdir().unwrap();
    quantised(place.path(), &how(Method::Rtn, 4));
    let folder = place.path().join("quantised");
    fs::remove_file(folder.join("SHA256SUMS")).unwrap();
    let text = fs::read_to_string(folder.join("config.json")).unwrap();
    let bytes = fs::read(folder.join(MODEL_FILE)).unwrap();
    let refused = |text: &str, bytes: &[u8]| {
        fs::write(folder.join("config.json"), text).unwrap();
        fs::write(folder.join(MODEL_FILE), bytes).unwrap();
        let loaded = ModelFolder::open(&folder).and_then(|opened| opened.load(&Device::flex()));
        match loaded {
            Ok(_) => panic!("loaded"),
            Err(error) => error.to_string(),
        }
    };
    let config = |change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_str(&text).unwrap();
        change(&mut value);
        value.to_string()
    };
    let with =
        |key: &str, value: Value| config(&|config| config["quantisation"][key] = value.clone());
    let error = refused(&with("group", json!(16)), &bytes);
    assert!(
        error.contains("layers.0.mixer.q_proj.weight.scale should be [16, 1], is [16, 2]"),
        "{error}"
    );
    assert!(refused(&with("group", json!(3)), &bytes).contains("multiple of 8"));
    assert!(refused(&with("bits", json!(5)), &bytes).contains("8 or 4"));
    assert!(refused(&with("method", json!("magic")), &bytes).contains("magic"));
    assert!(refused(&with("extra", json!(1)), &bytes).contains("extra"));
    // A config that knows nothing of it.
    let plain = config(&|config| {
        config.as_object_mut().unwrap().remove("quantisation");
    });
    let error = refused(&plain, &bytes);
    assert!(
        error.contains("embed.weight [11, 16] is missing"),
        "{error}"
    );
    let renamed = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes
            .windows(from.len())
            .position(|part| part == from.as_bytes())
            .unwrap();
        let mut bytes = bytes.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    let error = refused(&text, &renamed("embed.weight.scale", "embed.weight.other"));
    assert!(
        error.contains("embed.weight.scale [11, 2] is missing")
            && error.contains("embed.weight.other"),
        "{error}"
    );
}
