//! Any bytes as a file of weights.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = anyformer_hub::parse_safetensors(Path::new("model.safetensors"), bytes);
});
