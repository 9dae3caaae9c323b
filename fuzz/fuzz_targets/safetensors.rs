//! Any bytes as a file of weights: read whole, and as the weights of a folder that is loaded.
#![no_main]

use std::path::Path;

use anyformer_hub::{ModelFolder, parse_safetensors};
use anyformer_ops::Device;
use libfuzzer_sys::fuzz_target;

/// One layer of width 8, as transformers writes it.
const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": false, "hidden_act": "silu"}"#;

fuzz_target!(|bytes: &[u8]| {
    let _ = parse_safetensors(Path::new("model.safetensors"), bytes);
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in [("config.json", CONFIG.as_bytes()), ("model.safetensors", bytes)] {
        std::fs::write(folder.path().join(name), bytes).expect("written");
    }
    if let Ok(folder) = ModelFolder::open(folder.path()) {
        let _ = folder.load(&Device::flex());
    }
});
