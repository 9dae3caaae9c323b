//! Any bytes as the body of a request.
#![no_main]

use anyformer_serve::http::types::{
    ChatRequest, CompletionRequest, EmbeddingRequest, ForkRequest, StateRequest, check_others,
};
use libfuzzer_sys::fuzz_target;
use serde_json::from_slice;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = from_slice::<CompletionRequest>(bytes) {
        let _ = request.common.check_others();
        let _ = request.common.bias(256);
    }
    if let Ok(request) = from_slice::<ChatRequest>(bytes) {
        let _ = request.common.check_others();
        for message in request.messages {
            let _ = message.check_others();
            let _ = message.content.text();
        }
    }
    if let Ok(request) = from_slice::<EmbeddingRequest>(bytes) {
        let _ = check_others(&request.others);
    }
    let _ = from_slice::<StateRequest>(bytes);
    let _ = from_slice::<ForkRequest>(bytes);
});
