//! Any text as the `config.json` of another program.
#![no_main]

use anyformer_hub::Family;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|text: &str| {
    if let Ok(config) = serde_json::from_str::<Value>(text)
        && let Ok(family) = Family::of(&config)
    {
        let _ = family.config(&config);
    }
});
