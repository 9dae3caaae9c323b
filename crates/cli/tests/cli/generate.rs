//! Generation from a trained folder.

use std::fs;

use crate::harness::{anyformer, folder, trained};

fn generate(words: &[&str]) -> crate::harness::Ran {
    let run = trained().to_string_lossy().into_owned();
    let mut all = vec!["generate", &run, "--threads=1", "--quiet"];
    all.extend(words);
    anyformer(trained(), &all)
}

#[test]
fn the_same_seed_gives_the_same_text_and_greedy_needs_none() {
    let text = |words: &[&str]| {
        let mut all = vec!["--prompt", "To be", "--max-tokens", "20"];
        all.extend(words);
        generate(&all).ok().out
    };
    let one = text(&["--seed", "1"]);
    assert!(one.starts_with("To be") && one.ends_with('\n'));
    assert_eq!(one, text(&["--seed", "1"]));
    assert_ne!(one, text(&["--seed", "2"]));
    let greedy = text(&["--temperature", "0", "--seed", "1"]);
    assert_eq!(greedy, text(&["--temperature", "0", "--seed", "2"]));
    assert_eq!(greedy, text(&["--top-k", "1", "--seed", "3"]));
    assert_eq!(greedy, text(&["--top-p", "1e-9", "--seed", "3"]));
}

#[test]
fn json_has_the_tokens_and_the_prompt_may_be_a_file() {
    let place = folder();
    let file = place.path().join("prompt.txt");
    fs::write(&file, "Grüße, ").expect("written");
    let json = generate(&[
        "--prompt-file",
        &file.to_string_lossy(),
        "--max-tokens",
        "7",
        "--json",
    ])
    .ok()
    .json();
    assert_eq!(json["prompt"], "Grüße, ");
    assert_eq!(json["tokens"].as_array().map(Vec::len), Some(7));
    assert_eq!(json["prompt_tokens"], "Grüße, ".len());
    assert!(json["state_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    let none = generate(&["--prompt", "abc", "--max-tokens", "0"]).ok();
    assert_eq!(none.out, "abc\n");
}

#[test]
fn what_cannot_be_continued_is_refused() {
    generate(&["--prompt", ""]).bad(&["empty"]);
    generate(&["--prompt", "a", "--temperature", "-1"]).bad(&["temperature"]);
    generate(&["--prompt", "a", "--top-p", "0"]).bad(&["top_p"]);
    generate(&[]).bad(&["--prompt"]);
    generate(&["--prompt", "a", "--logprobs", "2"]).bad(&["--json"]);
    let place = folder();
    fs::write(place.path().join("bad"), b"\xff").expect("written");
    generate(&["--prompt-file", &place.path().join("bad").to_string_lossy()]).bad(&["UTF-8"]);
    // A classifier makes no text.
    let words = "train task.name=list_ops task.max_depth=3 task.min_length=5 task.max_length=30 model.dim=16 \
        model.layers=1 train.steps=1 train.warmup=0 train.batch=2 train.eval_batches=1 --quiet --out=classes";
    let words: Vec<&str> = words.split_whitespace().collect();
    anyformer(place.path(), &words).ok();
    anyformer(place.path(), &["generate", "classes", "--prompt", "a"]).bad(&["classifier"]);
}

#[test]
fn guessing_ahead_changes_no_text_and_says_what_it_brought() {
    let prompt = "to be or not to be or not to be or not to";
    let made = |words: &[&str]| {
        let mut all = vec!["--prompt", prompt, "--max-tokens", "80", "--json"];
        all.extend(words);
        generate(&all).ok().json()
    };
    for words in [["--temperature", "0"], ["--seed", "4"]] {
        let plain = made(&words);
        let guessed = made(&[words[0], words[1], "--speculate", "6"]);
        assert_eq!(plain["tokens"], guessed["tokens"]);
        assert!(plain["guessed"].is_null());
        let of = |key: &str| guessed[key].as_u64().expect("a count");
        assert!(
            (of("guessed") > 0 || words[0] == "--seed") && of("accepted") <= of("guessed"),
            "{guessed}"
        );
    }
}

#[test]
fn text_held_to_a_schema_is_json_that_fits_it() {
    let place = folder();
    let file = place.path().join("schema.json");
    let file_name = file.to_string_lossy().into_owned();
    let schema = r#"{"type": "object", "additionalProperties": false, "required": ["word", "n"],
        "properties": {"word": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "minimum": 0, "maximum": 99}}}"#;
    fs::write(&file, schema).expect("written");
    for seed in ["1", "2", "3"] {
        for speculate in ["0", "4"] {
            let words = [
                "--prompt",
                "JSON: ",
                "--json-schema",
                &file_name,
                "--seed",
                seed,
                "--max-tokens",
                "500",
                "--json",
            ];
            let made = generate(&[&words[..], &["--speculate", speculate]].concat())
                .ok()
                .json();
            assert_eq!(made["finish"], "end");
            let text = made["text"].as_str().expect("a text");
            let value: serde_json::Value = serde_json::from_str(text).expect(text);
            assert!(value["n"].as_u64().is_some_and(|n| n < 100), "{text}");
            assert!(
                value["word"]
                    .as_str()
                    .is_some_and(|word| word.chars().count() <= 9),
                "{text}"
            );
        }
    }
    fs::write(&file, "{").expect("written");
    generate(&["--prompt", "a", "--json-schema", &file_name]).bad(&["schema.json"]);
    fs::write(&file, r#"{"type": "nonsense"}"#).expect("written");
    generate(&["--prompt", "a", "--json-schema", &file_name]).bad(&["schema.json", "nonsense"]);
}
