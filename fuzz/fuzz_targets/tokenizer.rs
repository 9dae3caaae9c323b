//! Any text as a `tokenizer.json`, and what it makes of a text.
#![no_main]

use anyformer_data::Tokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(tokenizer) = Tokenizer::from_json(text)
        && let Ok(ids) = tokenizer.encode_whole("Größe 3.14 don't <s>")
    {
        let _ = tokenizer.decode(&ids);
    }
});
