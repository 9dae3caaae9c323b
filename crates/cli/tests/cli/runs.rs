//! Train, resume, evaluate: folders, files, Ctrl-C.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{TINY_TEXT, anyformer, command, files, folder, newest, train_tiny, trained};

#[test]
fn a_run_folder_holds_everything_and_is_not_overwritten() {
    let place = folder();
    let ran = train_tiny(
        place.path(),
        &[
            "train.steps=4",
            "train.log_every=1",
            "train.checkpoint_every=2",
            "--json",
        ],
    )
    .ok();
    let json = ran.json();
    assert_eq!(json["step"], 4);
    assert!(
        json["loss"]
            .as_f64()
            .is_some_and(|loss| loss > 0.0 && loss < 20.0)
    );
    assert!(json["perplexity"].is_f64());
    let run = place.path().join("run");
    let names = |path: &std::path::Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let held: Vec<String> = files(&run).iter().filter_map(|path| names(path)).collect();
    for name in [
        "run.toml",
        "metrics.jsonl",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ] {
        assert!(
            held.iter().any(|held| held == name),
            "no {name} in {held:?}"
        );
    }
    assert!(
        held.iter()
            .any(|name| name.starts_with("events.out.tfevents."))
    );
    assert!(!held.iter().any(|name| name.ends_with(".tmp")), "{held:?}");
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    assert_eq!(
        metrics
            .lines()
            .filter(|line| line.contains("\"event\":\"step\""))
            .count(),
        4
    );
    // The resolved options say every key, and are a run file themselves.
    let options = fs::read_to_string(run.join("run.toml")).expect("run.toml");
    assert!(
        options.contains("weight_decay") && options.contains("threads = 1"),
        "{options}"
    );
    let again = anyformer(
        place.path(),
        &[
            "train",
            "run/run.toml",
            "--out",
            "again",
            "--quiet",
            "--json",
        ],
    )
    .ok();
    assert_eq!(again.json()["loss"], json["loss"]);
    let before = files(&run);
    train_tiny(place.path(), &["train.steps=4"]).bad(&["not empty", "resume"]);
    assert_eq!(files(&run), before);
}

#[test]
fn a_finished_run_resumes_to_the_same_evaluation() {
    let place = folder();
    let first = train_tiny(place.path(), &["train.steps=2", "--json"])
        .ok()
        .json();
    let second = anyformer(place.path(), &["resume", "run", "--json", "--quiet"])
        .ok()
        .json();
    assert_eq!(first["loss"], second["loss"]);
    assert_eq!(first["step"], second["step"]);
}

#[test]
fn progress_goes_to_standard_error_and_quiet_says_nothing() {
    let place = folder();
    let loud: Vec<&str> = TINY_TEXT
        .iter()
        .copied()
        .filter(|word| *word != "--quiet")
        .collect();
    let mut words = vec!["train", "train.steps=2", "train.log_every=1", "--out=loud"];
    words.extend(loud);
    let ran = anyformer(place.path(), &words).ok();
    assert!(
        ran.err.contains("step 1/2") && ran.err.contains("tokens/s"),
        "{}",
        ran.err
    );
    assert!(ran.out.starts_with("step 2, held out: loss"), "{}", ran.out);
    let ran = train_tiny(place.path(), &["train.steps=2"]).ok();
    assert_eq!(ran.err, "");
}

#[test]
fn evaluation_finds_the_task_in_the_folder() {
    let place = folder();
    let run = trained().to_string_lossy().into_owned();
    let json = |more: &[&str]| {
        let mut words = vec![
            "eval",
            &run,
            "--batch=2",
            "--batches=2",
            "--threads=1",
            "--json",
            "--quiet",
        ];
        words.extend(more);
        anyformer(place.path(), &words).ok().json()
    };
    let test = json(&[]);
    assert_eq!(test["split"], "test");
    assert_eq!(test["task"]["name"], "text");
    assert_eq!(json(&[]), test);
    assert_ne!(json(&["--split=validation"])["loss"], test["loss"]);
    let model = newest(trained()).to_string_lossy().into_owned();
    let words = [
        "eval",
        &model,
        "--batch=2",
        "--batches=2",
        "--threads=1",
        "--json",
        "--quiet",
    ];
    assert_eq!(
        anyformer(place.path(), &words).ok().json()["loss"],
        test["loss"]
    );
    assert_eq!(json(&["task.time=16"])["counted"], 2 * 2 * 16);
    anyformer(place.path(), &["eval", &run, "--task", "mqar"]).bad(&["vocab"]);
    anyformer(place.path(), &["eval", &run, "--task", "txet"]).bad(&["did you mean \"text\"?"]);
    anyformer(place.path(), &["eval", &run, "train.lr=3"]).bad(&["task.KEY=VALUE"]);
    anyformer(place.path(), &["eval", &run, "model.dim=3"]).bad(&["dim 3"]);
}

#[test]
fn a_run_keeps_its_options() {
    let place = folder();
    train_tiny(place.path(), &["train.steps=2"]).ok();
    let before = files(place.path());
    anyformer(place.path(), &["resume", "run", "train.lr=0.5"])
        .bad(&["train.lr=0.5", "train.log_every"]);
    // Edited by hand, the file no longer fits the checkpoint.
    let file = place.path().join("run/run.toml");
    let text = fs::read_to_string(&file).expect("run.toml");
    let changed = text.replacen("weight_decay = 0.1", "weight_decay = 0.2", 1);
    assert_ne!(text, changed);
    fs::write(&file, changed).expect("written");
    anyformer(place.path(), &["resume", "run"]).bad(&["train.weight_decay was 0.1, is 0.2"]);
    fs::write(&file, text.replacen("dim = 16", "dim = 32", 1)).expect("written");
    anyformer(place.path(), &["resume", "run"]).bad(&["model.dim was 16, is 32"]);
    fs::write(&file, text).expect("written");
    anyformer(
        place.path(),
        &["resume", "run", "train.log_every=1", "--quiet"],
    )
    .ok();
    let after: Vec<_> = files(place.path())
        .into_iter()
        .filter(|path| !before.contains(path))
        .collect();
    let events =
        |path: &std::path::PathBuf| path.to_string_lossy().contains("events.out.tfevents.");
    assert!(after.iter().all(events), "{after:?}");
    anyformer(place.path(), &["resume", "nowhere"]).bad(&["no run.toml"]);
}

#[test]
fn ctrl_c_saves_and_tells_how_to_go_on() {
    let place = folder();
    let mut words = vec![
        "train",
        "train.steps=1000000",
        "train.checkpoint_every=0",
        "--out=a run",
    ];
    words.extend(TINY_TEXT);
    let mut child = command(place.path(), &words)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("starts");
    let metrics = place.path().join("a run/metrics.jsonl");
    let began = Instant::now();
    while !fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"step\":10")) {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "no step in a minute"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = child.id().to_string();
    assert!(
        std::process::Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .expect("kill")
            .success()
    );
    let status = child.wait().expect("ends");
    assert_eq!(status.code(), Some(130));
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().expect("stderr"), &mut said)
        .expect("text");
    assert!(said.contains("anyformer resume 'a run'"), "{said}");
    assert!(
        newest(&place.path().join("a run"))
            .join("model.safetensors")
            .is_file()
    );
}
