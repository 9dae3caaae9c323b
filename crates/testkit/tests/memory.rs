//! What loading a model needs beside the model itself.

use std::path::Path;

use anyformer_hub::{
    Extra, Method, ModelFolder, Quantisation, export, quantise, save, save_quantised,
};
use anyformer_kernels::memory::{Counting, allocated, peak, reset_peak};
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::Device;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting<std::alloc::System> = Counting(std::alloc::System);

#[test]
fn loading_takes_a_tenth_more_than_the_weights_at_most() {
    let config = json!({"dim": 128, "layers": 2, "reads": {"tokens": {"vocab": 12_000}}, "gives": {"next_token": {"tied": false}}});
    let config = ModelConfig::from_json(&config).expect("a config");
    let place = tempfile::tempdir().expect("folder");
    let [own, theirs] = ["own", "theirs"].map(|name| place.path().join(name));
    let weights = {
        let model = Model::new(&config, &Device::flex(), 0).expect("built");
        save(&own, &model, &Extra::default()).expect("saved");
        4 * model.params().count()
    };
    export(&ModelFolder::open(&own).expect("opens"), &theirs).expect("exported");
    // One after the other: the count is of the whole process.
    for folder in [&own, &theirs] {
        assert_eq!(4 * loaded(folder, weights).params().count(), weights);
    }
    packed(place.path());
}

/// Loads a model and holds what that takes to a tenth more than its `weights`.
fn loaded(folder: &Path, weights: usize) -> Model {
    let opened = ModelFolder::open(folder).expect("opens");
    let before = allocated();
    reset_peak();
    let model = opened.load(&Device::flex()).expect("loads");
    let most = peak() - before;
    assert!(
        most as f64 <= 1.1 * weights as f64,
        "{}: {most} bytes for {weights} of weights",
        folder.display()
    );
    model
}

/// Weights of 16, 8 and 4 bits stay so, and most of them are the last tensor that is read.
fn packed(place: &Path) {
    let config = json!({"dim": 128, "layers": 1, "reads": {"tokens": {"vocab": 48_000}}, "gives": {"next_token": {"tied": false}}});
    let config = ModelConfig::from_json(&config).expect("a config");
    let size = |folder: &Path| {
        let file = folder.join("model.safetensors");
        usize::try_from(file.metadata().expect("a file").len()).expect("a size")
    };
    let brain = place.join("brain");
    save(
        &place.join("plain"),
        &Model::new(&config, &Device::flex(), 0).expect("built"),
        &Extra::default(),
    )
    .expect("saved");
    export(
        &ModelFolder::open(&place.join("plain")).expect("opens"),
        &brain,
    )
    .expect("exported");
    std::fs::remove_file(brain.join("SHA256SUMS")).expect("removed");
    round_to_bf16(&brain.join("model.safetensors"));
    let model = loaded(&brain, size(&brain));
    let opened = ModelFolder::open(&brain).expect("opens");
    for (name, bits) in [("eight", 8), ("four", 4)] {
        let how = Quantisation {
            method: Method::Rtn,
            bits,
            group: 32,
            zeros: bits == 4,
            act_order: false,
            alpha: None,
        };
        quantise(&model, &how, &[vec![1, 2, 3]], &mut |_, _| ()).expect("quantised");
        let folder = place.join(name);
        save_quantised(&folder, &model, &opened, &how).expect("saved");
        loaded(&folder, size(&folder));
    }
}

/// Rewrites a safetensors file of f32 in bfloat16.
fn round_to_bf16(path: &Path) {
    let bytes = std::fs::read(path).expect("read");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let data = 8 + usize::try_from(length).expect("a size");
    let mut header: Value = serde_json::from_slice(&bytes[8..data]).expect("JSON");
    for (_, entry) in header.as_object_mut().expect("a table") {
        if entry["dtype"] == "F32" {
            entry["dtype"] = json!("BF16");
            let half = |at: usize| entry["data_offsets"][at].as_u64().expect("a place") / 2;
            entry["data_offsets"] = json!([half(0), half(1)]);
        }
    }
    let header = header.to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.bytes());
    let upper = bytes[data..]
        .chunks_exact(4)
        .map(|value| [value[2], value[3]]);
    out.extend(upper.flatten());
    std::fs::write(path, out).expect("written");
}
