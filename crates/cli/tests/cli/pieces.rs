//! The SentencePiece tokenizer inside a GGUF file gives the tokens that sentencepiece gives (`oracles/spm_gguf.py`), and that of a
//! DeBERTa those of transformers (`oracles/unigram.py`).

use std::path::Path;

use anyformer_data::Tokenizer;
use anyformer_hub::ModelFolder;
use serde_json::Value;

#[test]
fn a_tokenizer_in_a_gguf_file_gives_the_tokens_of_sentencepiece() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens");
    let folder = ModelFolder::open(&goldens.join("llama_tokenizer.gguf")).expect("opens");
    let text = folder.tokenizer().expect("reads").expect("a tokenizer");
    let tokenizer = Tokenizer::from_json(&text).expect("a tokenizer");
    assert_eq!(tokenizer.vocab(), 700);
    let golden = std::fs::read_to_string(goldens.join("llama_tokenizer.json")).expect("reads");
    let golden: Value = serde_json::from_str(&golden).expect("JSON");
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 20);
    for case in cases {
        let text = case["text"].as_str().expect("a text");
        let ids = tokenizer.encode_whole(text).expect("encodes");
        let want: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
        assert_eq!(ids, want, "{text:?}");
        let back = String::from_utf8(tokenizer.decode(&ids[1..])).expect("UTF-8");
        assert_eq!(back.replace('\u{2581}', " "), text.replace('\u{2581}', " "));
    }
}

#[test]
fn a_unigram_tokenizer_gives_the_tokens_of_transformers() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens");
    let golden = std::fs::read_to_string(goldens.join("deberta_tokenizer.json")).expect("reads");
    let golden: Value = serde_json::from_str(&golden).expect("JSON");
    let tokenizer = Tokenizer::from_json(&golden["tokenizer"].to_string()).expect("a tokenizer");
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 20);
    for case in cases {
        let text = case["text"].as_str().expect("a text");
        let ids = tokenizer.encode_whole(text).expect("encodes");
        let want: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
        assert_eq!(ids, want, "{text:?}");
    }
}
