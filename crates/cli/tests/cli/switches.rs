//! The switches of the survey checklists, as they are typed.

use crate::harness::{Ran, anyformer, folder};

const LISTS: &[&str] = &[
    "task.name=list_ops",
    "task.max_depth=3",
    "task.max_args=3",
    "task.min_length=4",
    "task.max_length=20",
    "model.dim=16",
    "model.layers=2",
    "model.mixers.0.heads=2",
    "train.batch=4",
    "train.steps=3",
    "train.warmup=0",
    "train.eval_batches=1",
    "train.log_every=1",
    "--threads=1",
    "--quiet",
];

fn train(place: &std::path::Path, out: &str, more: &[&str]) -> Ran {
    let mut words = vec!["train"];
    words.extend(LISTS);
    words.extend(more);
    words.extend(["--out", out]);
    anyformer(place, &words)
}

#[test]
fn switches_train_and_what_they_leave_can_be_used() {
    let place = folder();
    let at = place.path();
    let experts = "model.channel={name=\"moe\",experts=3,top_k=1}";
    train(
        at,
        "first",
        &["model.exits=[1]", experts, "train.layer_drop=0.3"],
    )
    .ok();
    let metrics = std::fs::read_to_string(at.join("first/metrics.jsonl")).expect("metrics");
    assert!(metrics.contains("\"extra\":"), "{metrics}");
    let eval = |words: &[&str]| {
        let mut all = vec![
            "eval",
            "first",
            "--batch=4",
            "--batches=2",
            "--json",
            "--threads=1",
        ];
        all.extend(words);
        anyformer(at, &all)
    };
    let whole = eval(&[]).ok().json();
    let never = eval(&["--exit-above=1"]).ok().json();
    assert_eq!(never["accuracy"], whole["accuracy"]);
    assert_eq!(never["layers"], 2.0);
    assert_eq!(eval(&["--exit-above=0"]).ok().json()["layers"], 1.0);
    eval(&["--exit-above=2"]).bad(&["from 0 to 1"]);
    // Rotary weights, read with other positions; other weights are not made up.
    let words = [
        "model.mixers.0.position=rerope",
        "model.mixers.0.position_window=4",
    ];
    assert_ne!(eval(&words).ok().json()["loss"], whole["loss"]);
    eval(&["model.mixers.0.position=t5"]).bad(&["position_bias"]);
    train(
        at,
        "pupil",
        &["train.teacher=first", "model.share_layers=1"],
    )
    .ok();
    train(at, "lost", &["train.teacher=nowhere"]).bad(&["nowhere"]);
    train(at, "deaf", &["train.teacher=first", "train.temperature=0"]).bad(&["temperature"]);
}

#[test]
fn models_are_pruned() {
    let place = folder();
    let at = place.path();
    train(at, "run", &[]).ok();
    let prune = |to: &str, words: &[&str]| {
        let mut all = vec!["convert", "prune", "run", "--to", to, "--json"];
        all.extend(words);
        anyformer(at, &all)
    };
    let half = prune("half", &["--part=0.5"]).ok().json();
    assert_eq!(half["parameters"], half["parameters_before"]);
    assert_eq!(
        half["zeros"].as_u64().map(|zeros| zeros * 2),
        half["weights"].as_u64()
    );
    prune("sparse", &["--pattern=2:4"]).ok();
    prune("small", &["--heads=1"]).ok();
    prune("thin", &["--units=8"]).ok();
    let short = prune("short", &["--layers=1"]).ok().json();
    assert!(short["parameters"].as_u64() < short["parameters_before"].as_u64());
    for folder in ["half", "sparse", "small", "thin", "short"] {
        let words = [
            "eval",
            folder,
            "--batch=4",
            "--batches=1",
            "--json",
            "--threads=1",
        ];
        assert!(
            anyformer(at, &words).ok().json()["loss"].is_f64(),
            "{folder}"
        );
    }
    prune("no", &["--layers=5"]).bad(&["below 2", "[5]"]);
    prune("no", &["--pattern=2"]).bad(&["2:4"]);
    prune("no", &[]).bad(&["--part"]);
    prune("no", &["--heads=1", "--units=2"]).bad(&["cannot be used with"]);
    assert!(!at.join("no").exists());
}
