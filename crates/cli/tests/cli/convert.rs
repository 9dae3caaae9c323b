//! `anyformer convert quantize`: the receipt, and that everything else runs the folder it wrote.

use std::fs;

use crate::harness::{anyformer, folder, trained};

#[test]
fn a_quantised_run_keeps_its_perplexity_and_runs_everywhere() {
    let place = folder();
    let run = trained().to_string_lossy();
    let text = "To be, or not to be, that is the question. Whether it is nobler in the mind.\n";
    fs::write(place.path().join("text"), text.repeat(20)).expect("written");
    let convert = |out: &str, more: &[&str]| {
        let mut words = vec![
            "convert", "quantize", &run, "--text", "text", "--out", out, "--json",
        ];
        words.extend(more);
        anyformer(place.path(), &words)
    };
    let receipt = convert("eight", &[]).ok().json();
    let number = |side: &str, key: &str| receipt[side][key].as_f64().expect("a number");
    let ratio = number("after", "perplexity") / number("before", "perplexity");
    assert!((ratio - 1.0).abs() < 0.01, "{ratio}");
    assert!(number("after", "bytes") < 0.5 * number("before", "bytes"));
    assert!(number("after", "made_tokens_per_s") > 0.0);
    assert_eq!(receipt["quantisation"]["method"], "rtn");
    for (out, more) in [
        ("gptq", &["--method=gptq", "--bits=4", "--act-order"][..]),
        (
            "awq",
            &["--method=awq", "--bits=4", "--zeros", "--group=16"],
        ),
        ("smooth", &["--method=smoothquant", "--alpha=0.6"]),
    ] {
        let receipt = convert(out, more).ok().json();
        assert!(
            receipt["after"]["perplexity"]
                .as_f64()
                .is_some_and(f64::is_finite)
        );
        assert!(receipt["calibrated_on"].as_u64() > Some(100));
        let words = [
            "generate",
            out,
            "--prompt",
            "To be",
            "--temperature=0",
            "--json",
            "--max-tokens=5",
        ];
        let made = anyformer(place.path(), &words).ok().json();
        assert_eq!(made["tokens"].as_array().map(Vec::len), Some(5));
        let rounded = [&words[..], &["--round-inputs"]].concat();
        anyformer(place.path(), &rounded).ok();
        let info = anyformer(place.path(), &["info", out]).ok();
        assert!(info.out.contains("quantised"), "{}", info.out);
        anyformer(place.path(), &["eval", out, "--batches=1", "--batch=2"]).ok();
    }
}

#[test]
fn an_encoder_keeps_its_vectors() {
    let place = folder();
    let text = "To be, or not to be, that is the question. Whether it is nobler in the mind.\n";
    fs::write(place.path().join("text"), text.repeat(20)).expect("written");
    let config = anyformer_models::ModelConfig::from_json(&serde_json::json!({
        "dim": 64, "layers": 2, "mixers": [{"name": "attention", "causal": false, "position": "none", "bias": true}],
        "channel": {"name": "mlp"}, "wiring": "post_norm", "norm": "layer", "positions": "learned", "max_time": 50,
        "reads": {"tokens": {"vocab": 256}}, "gives": "hidden",
    }));
    let device = anyformer_ops::Device::flex();
    let model = anyformer_models::Model::new(&config.expect("a config"), &device, 5);
    let extra = anyformer_hub::Extra {
        tokenizer: Some("{\"anyformer\":\"bytes\"}".into()),
        ..Default::default()
    };
    let from = place.path().join("from");
    anyformer_hub::save(&from, &model.expect("built"), &extra).expect("saved");
    for (method, bits, least) in [
        ("rtn", 8, 0.999),
        ("rtn", 4, 0.97),
        ("gptq", 4, 0.97),
        ("smoothquant", 8, 0.99),
    ] {
        let (out, bits) = (format!("{method}{bits}"), format!("--bits={bits}"));
        let method = format!("--method={method}");
        let words = [
            "convert", "quantize", "from", "--text", "text", "--out", &out, "--json", &method,
            &bits,
        ];
        let receipt = anyformer(place.path(), &words).ok().json();
        let number = |key: &str| receipt["vectors"][key].as_f64().expect("a number");
        assert!(number("least_cosine") > least, "{out}: {receipt}");
        assert!(number("mean_cosine") < 1.0 - 1e-9, "{out}: {receipt}");
        assert!(receipt["before"]["perplexity"].is_null());
        anyformer(place.path(), &["info", &out]).ok();
    }
}

#[test]
fn what_cannot_be_is_bad_input() {
    let place = folder();
    let run = trained().to_string_lossy();
    fs::write(
        place.path().join("text"),
        "To be, or not to be. ".repeat(20),
    )
    .expect("written");
    fs::write(place.path().join("short"), "T").expect("written");
    let bad = |more: &[&str], words: &[&str]| {
        let mut all = vec!["convert", "quantize", &run];
        all.extend(more);
        anyformer(place.path(), &all).bad(words);
    };
    bad(&["--text=text", "--out=o", "--bits=5"], &["8 or 4"]);
    bad(
        &["--text=text", "--out=o", "--group=12"],
        &["multiple of 8"],
    );
    bad(
        &["--text=text", "--out=o", "--method=smoothquant", "--bits=4"],
        &["8 bits"],
    );
    bad(&["--text=text", "--out=o", "--alpha=0.5"], &["smoothquant"]);
    bad(&["--text=text", "--out=o", "--act-order"], &["gptq"]);
    bad(&["--text=text", "--out=o", "--zeros"], &["no zeros"]);
    bad(&["--text=none", "--out=o"], &["none"]);
    bad(&["--text=short", "--out=o"], &["too few"]);
    let words = ["generate", &run, "--prompt=To", "--round-inputs"];
    anyformer(place.path(), &words).bad(&["packed in 8 or 4 bits"]);
    bad(&["--text=text", "--out=."], &["not empty"]);
    assert!(!place.path().join("o").exists());
}
