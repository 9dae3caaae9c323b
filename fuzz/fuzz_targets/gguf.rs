//! Any bytes as a GGUF file: its head, its tokenizer, its weights.
#![no_main]

use std::io::Write;

use anyformer_data::Tokenizer;
use anyformer_hub::{ChatTemplate, ModelFolder};
use anyformer_ops::Device;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("written");
    if let Ok(folder) = ModelFolder::open(file.path()) {
        if let Ok(Some(text)) = folder.tokenizer()
            && let Ok(tokenizer) = Tokenizer::from_json(&text)
        {
            let _ = tokenizer.encode_whole("Some words, 42");
        }
        let _ = ChatTemplate::of(&folder);
        let _ = folder.load(&Device::flex());
    }
});
