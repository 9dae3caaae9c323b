//! Bad input: exit code 2, a message that names the thing, nothing written.

use std::fs;
use std::path::Path;

use crate::harness::{anyformer, files, folder, model_copy, train_tiny};

/// A training that must be refused with `words` and leave nothing behind.
#[track_caller]
fn refused(changes: &[&str], words: &[&str]) {
    let place = folder();
    train_tiny(place.path(), changes).bad(words);
    assert_eq!(
        fs::read_dir(place.path()).expect("a folder").count(),
        0,
        "{changes:?}"
    );
}

#[test]
fn unknown_names_and_keys_name_the_nearest() {
    refused(&["model.mixers=glaa"], &["glaa", "did you mean \"gla\"?"]);
    refused(&["model.channel=swiglo"], &["did you mean \"swiglu\"?"]);
    refused(&["task.name=txet"], &["did you mean \"text\"?"]);
    refused(&["task.tmie=3"], &["did you mean \"time\"?"]);
    refused(&["model.layrs=3"], &["did you mean \"layers\"?"]);
    refused(&["model.mixers.0.hedas=3"], &["did you mean \"heads\"?"]);
    refused(&["train.warmpu=3"], &["did you mean \"warmup\"?"]);
    refused(&["tarin.lr=3"], &["did you mean \"train\"?"]);
    refused(&["run.thread=3"], &["did you mean \"threads\"?"]);
}

#[test]
fn values_that_cannot_be_are_refused() {
    refused(&["model.mixers.0.heads=3"], &["dim 16", "heads 3"]);
    refused(&["model.dim=0"], &["dim 0"]);
    refused(&["model.dim=many"], &["many"]);
    refused(&["train.steps=0"], &["steps must be at least 1"]);
    refused(&["train.steps=3", "train.warmup=4"], &["warmup"]);
    refused(&["train.lr=-1"], &["lr must be"]);
    refused(&["model.reads.tokens.vocab=7"], &["vocab = 7"]);
    refused(&["model.gives.class.classes=3"], &["class"]);
    refused(&["run.device=tpu"], &["tpu"]);
    refused(&["train.lr"], &["KEY.KEY=VALUE"]);
    if !cfg!(feature = "gpu") {
        refused(&["run.device=gpu"], &["--features gpu"]);
    }
}

#[test]
fn run_files_that_cannot_be_read_say_where() {
    let place = folder();
    let refused = |content: &[u8], words: &[&str]| {
        fs::write(place.path().join("a.toml"), content).expect("written");
        anyformer(place.path(), &["train", "a.toml", "--out", "run"]).bad(words);
        assert_eq!(files(place.path()).len(), 1);
    };
    refused(b"[task\nname = 3", &["a.toml", "line 1"]);
    refused(
        b"[task]\nname = \"text\"\n[model]\ndim = 3\ndim = 4",
        &["a.toml", "dim"],
    );
    refused(b"\xff\xfe", &["a.toml", "UTF-8"]);
    refused(b"[model]\ndim = 16", &["no name"]);
    refused(b"[task]\nname = 3", &["must be a text"]);
    anyformer(place.path(), &["train", "b.toml", "--out", "run"]).bad(&["b.toml"]);
}

#[test]
fn texts_that_are_none_are_refused() {
    let place = folder();
    fs::write(place.path().join("bad.txt"), b"good\nbut \xff\xfe not this").expect("written");
    fs::create_dir(place.path().join("empty")).expect("a folder");
    let before = files(place.path());
    train_tiny(place.path(), &["task.path=bad.txt"]).bad(&["bad.txt", "UTF-8"]);
    train_tiny(place.path(), &["task.path=empty"]).bad(&["empty"]);
    train_tiny(place.path(), &["task.path=gone.txt"]).bad(&["gone.txt"]);
    let images = ["train", "task.name=images", "task.path=empty", "--out=run"];
    anyformer(place.path(), &images).bad(&["empty"]);
    assert_eq!(files(place.path()), before);
    assert!(!place.path().join("run").exists());
}

type Damage = fn(&mut Vec<u8>);

#[test]
fn damaged_models_are_refused_by_eval_and_generate() {
    let damages: [(&str, Damage); 5] = [
        ("cut off", |bytes| bytes.truncate(bytes.len() / 2)),
        ("sha256", |bytes| {
            let at = bytes.len() - 9;
            bytes[at] ^= 0x40;
        }),
        ("header", |bytes| {
            bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes())
        }),
        ("header", |bytes| bytes[12] = 0),
        ("8 bytes", |bytes| bytes.clear()),
    ];
    for (word, damage) in damages {
        let place = folder();
        let model = model_copy(place.path());
        let file = model.join("model.safetensors");
        let mut bytes = fs::read(&file).expect("weights");
        damage(&mut bytes);
        fs::write(&file, bytes).expect("written");
        opened_and_refused(place.path(), &["model.safetensors", word]);
    }
}

#[test]
fn folders_that_are_no_models_are_refused() {
    let place = folder();
    anyformer(place.path(), &["eval", "gone"]).bad(&["gone"]);
    fs::create_dir(place.path().join("model")).expect("a folder");
    opened_and_refused(place.path(), &["config.json"]);
    fs::remove_dir(place.path().join("model")).expect("removed");
    let model = model_copy(place.path());
    fs::remove_file(model.join("model.safetensors")).expect("removed");
    opened_and_refused(place.path(), &["model.safetensors"]);
    fs::remove_dir_all(&model).expect("removed");
    let model = model_copy(place.path());
    fs::remove_file(model.join("SHA256SUMS")).expect("removed");
    fs::write(
        model.join("config.json"),
        "{\"anyformer\": {\"layrs\": 3}, \"format_version\": 1}",
    )
    .expect("written");
    opened_and_refused(place.path(), &["config.json", "did you mean \"layers\"?"]);
    fs::write(model.join("config.json"), "{").expect("written");
    opened_and_refused(place.path(), &["config.json"]);
}

fn opened_and_refused(place: &Path, words: &[&str]) {
    let before = files(place);
    anyformer(place, &["eval", "model"]).bad(words);
    anyformer(place, &["generate", "model", "--prompt", "a"]).bad(words);
    assert_eq!(files(place), before);
}

/// A disk that fills up: an error with code 1, and no half-written folder under a final name.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_failure_that_leaves_no_half_written_file() {
    use std::process::Command;
    let place = folder();
    let disk = place.path().join("disk");
    fs::create_dir(&disk).expect("a folder");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(&disk)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        // Needs the right to mount; CI has it.
        return;
    }
    let ran = train_tiny(&disk, &["train.steps=2", "model.dim=64"]);
    let left = files(&disk);
    let unmounted = Command::new("umount").arg(&disk).status().expect("umount");
    assert!(unmounted.success());
    assert_eq!(ran.code, 1, "{}", ran.err);
    assert!(
        ran.err.contains("failed to") && ran.err.to_lowercase().contains("space"),
        "{}",
        ran.err
    );
    assert!(
        !left.iter().any(|path| path.ends_with("model.safetensors")),
        "{left:?}"
    );
}
