//! Verbs that only show something.

use crate::harness::{anyformer, folder};

#[test]
fn list_has_every_mixer_and_task() {
    let place = folder();
    let text = anyformer(place.path(), &["list"]).ok().out;
    for name in [
        "attention",
        "local",
        "linear_attention",
        "retention",
        "gla",
        "delta_net",
        "gated_delta_net",
        "mamba",
        "mamba2",
        "performer",
        "linformer",
        "cosformer",
        "nystromformer",
        "synthesizer",
        "longformer",
        "bigbird",
        "sparse",
        "luna",
        "fnet",
        "pool",
        "mlp",
        "swiglu",
        "none",
        "mqar",
        "list_ops",
        "text",
        "images",
    ] {
        assert!(
            text.lines()
                .any(|line| line.split_whitespace().next() == Some(name)),
            "no {name} in:\n{text}"
        );
    }
    let json = anyformer(place.path(), &["list", "--json"]).ok().json();
    assert!(
        json["token_mixers"]
            .as_array()
            .is_some_and(|list| list.len() >= 12)
    );
    assert!(json["tasks"].as_array().is_some_and(|list| list.len() >= 6));
}

#[test]
fn info_counts_a_published_model_exactly_and_allocates_none_of_it() {
    let place = folder();
    let ran = anyformer(place.path(), &["info", "mamba", "--preset", "130m"]).ok();
    assert!(ran.out.contains("129,135,360"), "{}", ran.out);
    let json = anyformer(
        place.path(),
        &["info", "mamba", "--preset", "130m", "--json"],
    )
    .ok()
    .json();
    assert_eq!(json["parameters"], 129_135_360);
    // A model of a trillion parameters can be looked at.
    let ran = anyformer(
        place.path(),
        &[
            "info",
            "attention",
            "--set",
            "dim=131072",
            "--set",
            "layers=8",
            "--json",
        ],
    );
    assert!(
        ran.ok().json()["parameters"]
            .as_u64()
            .is_some_and(|count| count > 1_000_000_000_000)
    );
}

#[test]
fn info_changes_knobs_and_keys() {
    let place = folder();
    let json = |words: &[&str]| {
        let mut all = vec!["info", "gla", "--json"];
        all.extend(words);
        anyformer(place.path(), &all).ok().json()
    };
    assert_eq!(json(&["--set", "heads=2"])["knobs"]["heads"], 2);
    assert_eq!(json(&["--set", "layers=5"])["model"]["layers"], 5);
    let state = |time: &str| json(&["--time", time])["state_bytes"].clone();
    assert_eq!(state("100"), state("10000"));
    for name in ["swiglu", "mlp", "none", "pool", "linformer"] {
        assert!(
            anyformer(place.path(), &["info", name])
                .ok()
                .out
                .contains("parameters")
        );
    }
    for words in [
        &["info", "gla", "--set", "hedas=2"][..],
        &["info", "gla", "--set", "layrs=2"],
    ] {
        anyformer(place.path(), words).bad(&["did you mean"]);
    }
    anyformer(place.path(), &["info", "gla", "--preset", "9t"]).bad(&["340m"]);
    anyformer(place.path(), &["info", "mabma"]).bad(&["did you mean \"mamba\"?"]);
    anyformer(place.path(), &["info", "gla", "--set", "heads=7"]).bad(&["heads 7", "divisible"]);
}

#[test]
fn doctor_tells_what_is_here() {
    let place = folder();
    let json = anyformer(place.path(), &["doctor", "--json", "--threads", "2"])
        .ok()
        .json();
    assert_eq!(json["threads"], 2);
    assert_eq!(json["allocator"], "mimalloc, counted");
    assert!(json["cores"].as_u64().is_some_and(|cores| cores >= 1));
    assert!(
        anyformer(place.path(), &["doctor"])
            .ok()
            .out
            .contains("SIMD")
    );
}

#[test]
fn completions_and_man_pages_come_for_every_shell() {
    let place = folder();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = anyformer(place.path(), &["completions", shell]).ok().out;
        assert!(
            script.contains("generate") && script.contains("top-p"),
            "{shell}"
        );
    }
    let page = anyformer(place.path(), &["man"]).ok().out;
    assert!(page.contains(".TH") && page.contains("compare"));
    assert!(
        anyformer(place.path(), &["man", "train"])
            .ok()
            .out
            .contains("train")
    );
    anyformer(place.path(), &["man", "trian"]).bad(&["did you mean \"train\"?"]);
}

#[test]
fn bench_measures_each_point() {
    let place = folder();
    let words = "bench --mixers gla,pool --lengths 16,33 --dim 16 --layers 1 --runs 1 --json --quiet --threads 1";
    let words: Vec<&str> = words.split(' ').collect();
    let json = anyformer(place.path(), &words).ok().json();
    let rows = json["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    for row in rows {
        assert!(
            row["forward_backward_s"]
                .as_f64()
                .is_some_and(|time| time > 0.0)
        );
        assert!(row["peak_bytes"].as_u64().is_some_and(|bytes| bytes > 1000));
        assert_eq!(row["step_s"].is_null(), row["mixer"] == "pool", "{row}");
    }
    let fewer = [&words[..], &["--instructions", "portable"]].concat();
    anyformer(place.path(), &fewer).ok();
    anyformer(place.path(), &["bench", "--instructions", "sse"]).bad(&["portable", "avx2"]);
    anyformer(place.path(), &["bench", "--mixers", "glaa"]).bad(&["did you mean \"gla\"?"]);
    anyformer(place.path(), &["bench", "--dim", "30"]).bad(&["divisible"]);
}

#[test]
fn flags_that_are_not_there_are_refused_with_the_nearest() {
    let place = folder();
    anyformer(place.path(), &["list", "--jsno"]).bad(&["--json"]);
    anyformer(place.path(), &["lsit"]).bad(&["list"]);
    anyformer(place.path(), &["list", "--threads", "0"]).bad(&["threads"]);
    anyformer(place.path(), &["bench", "--device", "tpu"]).bad(&["cpu", "gpu"]);
    assert_eq!(anyformer(place.path(), &["--help"]).code, 0);
    assert_eq!(anyformer(place.path(), &["--version"]).code, 0);
    if !cfg!(feature = "gpu") {
        anyformer(place.path(), &["bench", "--device", "gpu"]).bad(&["--features gpu"]);
    }
}

/// `anyformer list | head -1` is no failure; a full disk is.
#[cfg(target_os = "linux")]
#[test]
fn a_reader_that_leaves_is_no_failure_and_a_full_disk_is() {
    use crate::harness::command;
    let place = folder();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = command(place.path(), &["list"])
        .stdout(writer)
        .status()
        .expect("runs");
    assert_eq!(status.code(), Some(0));
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .expect("/dev/full");
    let output = command(place.path(), &["list"])
        .stdout(full)
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("failed to write to standard output"));
}

#[test]
fn data_sets_are_listed_and_what_cannot_be_had_is_refused() {
    let place = folder();
    let text = anyformer(place.path(), &["data", "list"]).ok().out;
    assert!(
        text.contains("cifar10") && text.contains("shipped"),
        "{text}"
    );
    assert!(
        anyformer(place.path(), &["data", "list", "--json"])
            .ok()
            .json()
            .is_array()
    );
    anyformer(place.path(), &["data", "get", "cifra10"]).bad(&["did you mean \"cifar10\"?"]);
    anyformer(place.path(), &["data", "get", "cifar10", "--from", "."]).bad(&["no such file"]);
    let left = std::fs::read_dir(place.path())
        .expect("a folder")
        .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().is_file()));
    assert_eq!(left.count(), 0);
}
