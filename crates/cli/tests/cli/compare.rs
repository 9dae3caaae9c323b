//! `anyformer compare` on a plan of seconds.

use std::process::Stdio;
use std::time::Duration;

use crate::harness::{anyformer, command, files, folder};

const WORDS: &[&str] = &[
    "compare",
    "--tasks=mqar",
    "--mixers=gla,attention(heads=4)",
    "--seeds=2",
    "--steps=6",
    "model.dim=32",
    "model.layers=1",
    "latency_lengths=[16]",
    "tasks.0.eval_batches=1",
    "--threads=1",
    "--out=c",
    "--json",
];

#[test]
fn a_comparison_leaves_everything_and_goes_on() {
    let place = folder();
    let first = anyformer(place.path(), WORDS).ok().json();
    assert_eq!(first["trials"].as_array().map(Vec::len), Some(4));
    for name in ["report.html", "table.md", "trials.sqlite"] {
        assert!(place.path().join("c").join(name).is_file(), "no {name}");
    }
    let second = anyformer(place.path(), WORDS).ok();
    assert!(second.err.contains("kept from before"), "{}", second.err);
    assert_eq!(second.json()["trials"], first["trials"]);
    let mut other = WORDS.to_vec();
    other[4] = "--steps=7";
    anyformer(place.path(), &other).bad(&["another plan"]);
    let mut more = WORDS.to_vec();
    more[2] = "--mixers=gla,retention,attention(heads=4)";
    let grown = anyformer(place.path(), &more).ok();
    assert!(grown.err.contains("kept from before"), "{}", grown.err);
    let grown = grown.json();
    let (held, all) = (&first["trials"], grown["trials"].as_array());
    let all = all.expect("trials");
    assert_eq!(all.len(), 6);
    for trial in held.as_array().expect("trials") {
        assert!(all.contains(trial), "{trial}");
    }
    anyformer(place.path(), WORDS).bad(&["another plan"]);
}

#[test]
fn plans_that_cannot_be_are_refused_and_nothing_is_written() {
    let place = folder();
    for (change, words) in [
        ("--tasks=mqra", &["did you mean \"mqar\"?"][..]),
        ("--mixers=glaa,gla", &["did you mean \"gla\"?"]),
        ("--mixers=gla(hedas=2)", &["did you mean \"heads\"?"]),
        ("--mixers=gla,gla", &["twice"]),
        ("--match=size", &["params", "flops"]),
        ("--tolerance=none", &["2%"]),
        ("modle.dim=3", &["did you mean \"model\"?"]),
        ("model.layrs=3", &["did you mean \"layers\"?"]),
        ("train.lrr=3", &["did you mean \"lr\"?"]),
        ("target=12", &["budget"]),
    ] {
        anyformer(place.path(), &["compare", "--steps=2", "--out=c", change]).bad(words);
        assert_eq!(files(place.path()).len(), 0, "{change}");
    }
}

/// Killed wherever it is, a comparison goes on: no trial is lost, none runs twice.
#[test]
fn kills_lose_no_trial() {
    let place = folder();
    let mut words = WORDS.to_vec();
    words[3] = "--seeds=3";
    words[4] = "--steps=40";
    for wait in [150, 400, 700, 1000] {
        let mut child = command(place.path(), &words)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        std::thread::sleep(Duration::from_millis(wait));
        let _ = child.kill();
        child.wait().expect("ends");
    }
    let last = anyformer(place.path(), &words).ok().json();
    let trials = last["trials"].as_array().expect("trials");
    assert_eq!(trials.len(), 6);
    assert!(
        trials.iter().all(|trial| !trial["result"].is_null()),
        "{trials:?}"
    );
    words[10] = "--out=whole";
    let whole = anyformer(place.path(), &words).ok().json();
    let scores = |json: &serde_json::Value| -> Vec<String> {
        let trials = json["trials"].as_array().expect("trials").iter();
        let mut scores: Vec<String> = trials
            .map(|trial| {
                format!(
                    "{} {} {}",
                    trial["key"]["mixer"], trial["key"]["seed"], trial["result"]["loss"]
                )
            })
            .collect();
        scores.sort();
        scores
    };
    assert_eq!(scores(&last), scores(&whole));
}
