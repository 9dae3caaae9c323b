//! Any text as a chat template.
#![no_main]

use anyformer_hub::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(template) = ChatTemplate::new(text, ["<s>".into(), "</s>".into()]) {
        let messages = [Message::new("system", "Be brief"), Message::new("user", "Hi")];
        let _ = template.render(&messages, true);
    }
});
