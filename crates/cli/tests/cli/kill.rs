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

/// Trains the same run again and again, killed at random moments, until `kills` kills came in time; each time its last
/// model must be that of a run that was left alone.
fn survives(kills: usize, mixer: &str) {
    let place = folder();
    let began = Instant::now();
    let status = command(place.path(), &train_words(mixer, "whole"))
        .stdout(Stdio::null())
        .status()
        .expect("runs");
    assert!(status.success());
    let longest = began.elapsed().as_micros() as u64 / 3;

    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock");
    let mut state = clock.as_nanos() as u64;
    let seed = state;
    let mut done = 0;
    for round in 0.. {
        assert!(
            round < 10 * kills,
            "only {done} of {kills} kills came in time (seed {seed})"
        );
        let broken = format!("broken{round}");
        done += broken_run(place.path(), mixer, &broken, kills - done, || {
            Duration::from_micros(random(&mut state, longest))
        });
        let [whole, broken] = ["whole", broken.as_str()].map(|run| place.path().join(run));
        for name in ["model.safetensors", "optimizer.safetensors"] {
            let read = |run: &Path| fs::read(newest(run).join(name)).expect("a file");
            let same = read(&whole) == read(&broken);
            assert!(
                same,
                "{name} differs in round {round} after {done} kills (seed {seed})"
            );
        }
        assert_eq!(steps(&whole), steps(&broken), "seed {seed}");
        if done == kills {
            return;
        }
    }
}

/// Runs to the end through at most `kills` kills, each after a `wait`; how many came before the end.
fn broken_run(
    place: &Path,
    mixer: &str,
    name: &str,
    kills: usize,
    mut wait: impl FnMut() -> Duration,
) -> usize {
    let mut done = 0;
    loop {
        // Nothing stands there before the first kill, or when that came before the options were written.
        let words = match place.join(name).join("run.toml").is_file() {
            true => vec!["resume", name, "--quiet"],
            false => train_words(mixer, name),
        };
        let mut child = command(place, &words)
            .stdout(Stdio::null())
            .spawn()
            .expect("starts");
        if done < kills {
            std::thread::sleep(wait());
            let _ = child.kill();
        }
        let status = child.wait().expect("ends");
        if status.success() {
            return done;
        }
        assert_eq!(status.code(), None, "only the kills stop it");
        done += 1;
    }
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
