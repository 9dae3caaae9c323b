//! Killed at random moments, a run goes on to the same bits.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::harness::{TINY_TEXT, command, folder, newest};

const WORDS: &[&str] = &[
    "train.steps=150",
    "train.checkpoint_every=3",
    "train.log_every=1",
    "train.eval_every=20",
];

/// A different number below `below` at every call.
fn random(state: &mut u64, below: u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below.max(1)
}

fn train_words<'a>(mixer: &'a str, out: &'a str) -> Vec<&'a str> {
    let mut words = vec!["train", mixer, "--out", out];
    words.extend(WORDS);
    words.extend(TINY_TEXT);
    words
}

/// Kills a run `kills` times and compares its last model with that of a run that was left alone.
fn survives(kills: usize, mixer: &str) {
    let place = folder();
    let began = Instant::now();
    let status = command(place.path(), &train_words(mixer, "whole"))
        .stdout(Stdio::null())
        .status()
        .expect("runs");
    assert!(status.success());
    let whole = began.elapsed().as_micros() as u64;

    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock");
    let mut state = clock.as_nanos() as u64;
    let seed = state;
    let broken = place.path().join("broken");
    let mut done = 0;
    for kill in 0.. {
        // Nothing stands there before the first kill, or when that came before the options were written.
        let words = match broken.join("run.toml").is_file() {
            true => vec!["resume", "broken", "--quiet"],
            false => train_words(mixer, "broken"),
        };
        let mut child = command(place.path(), &words)
            .stdout(Stdio::null())
            .spawn()
            .expect("starts");
        if kill < kills {
            std::thread::sleep(Duration::from_micros(random(&mut state, whole / 2)));
            let _ = child.kill();
        }
        let status = child.wait().expect("ends");
        if status.success() {
            break;
        }
        assert_eq!(status.code(), None, "only the kills stop it (seed {seed})");
        done += 1;
    }
    assert!(
        done >= kills / 2,
        "only {done} of {kills} kills came in time (seed {seed})"
    );
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read =
            |run: &str| fs::read(newest(&place.path().join(run)).join(name)).expect("a file");
        assert!(
            read("whole") == read("broken"),
            "{name} differs after {done} kills (seed {seed})"
        );
    }
    assert_eq!(
        steps(&place.path().join("whole")),
        steps(&broken),
        "seed {seed}"
    );
}

/// The steps in `metrics.jsonl` with their losses.
fn steps(run: &Path) -> Vec<(u64, String)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("whole lines"));
    let steps = records.filter(|record| record["event"] == "step");
    steps
        .map(|record| {
            (
                record["step"].as_u64().expect("a step"),
                record["loss"].to_string(),
            )
        })
        .collect()
}

#[test]
fn three_kills_change_no_bit() {
    survives(3, "model.mixers.0.name=gla");
}

/// `cargo test --release -p anyformer-cli -- --ignored kills`
#[test]
#[ignore = "takes a minute"]
fn thirty_kills_change_no_bit() {
    for mixer in ["attention", "delta_net", "linear_attention"] {
        survives(10, &format!("model.mixers.0.name={mixer}"));
    }
}
