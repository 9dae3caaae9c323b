//! A child process is killed at random moments in the middle of its trials; nothing is lost, nothing done is run again.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyformer_lab::store::{Claim, Store};
use anyformer_lab::trial::Status;
use serde_json::json;

use crate::fixture::{key, result};

const TRIALS: u64 = 120;
const FOLDER: &str = "ANYFORMER_LAB_TEST_FOLDER";

fn note(log: &mut File, line: &str) {
    // One write call to a file opened for appending: whole lines, also when killed.
    log.write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// The body of the child; as a test of its own it does nothing.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        return;
    };
    let mut log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(folder.join("log"))
        .unwrap();
    let mut store = Store::open(&folder.join("trials.sqlite"), &json!({"kill": true})).unwrap();
    note(&mut log, "open 0");
    for seed in 0..TRIALS {
        if let Claim::Run(ticket) = store.claim(&key("mqar", "gla", seed)).unwrap() {
            note(&mut log, &format!("start {seed}"));
            std::thread::sleep(Duration::from_millis(1));
            store.finish(&ticket, &result(0, 2, seed)).unwrap();
            note(&mut log, &format!("done {seed}"));
        }
    }
}

fn run_child(folder: &Path, limit: Option<Duration>) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill::child"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    if let Some(limit) = limit {
        // The random moment counts from when the child has its store open, so that no kill falls before the work.
        let log = folder.join("log");
        let size = || fs::metadata(&log).map_or(0, |file| file.len());
        let before = size();
        while size() == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(limit);
        child.kill().unwrap();
    }
    child.wait().unwrap().success()
}

#[test]
fn ten_kills_lose_nothing_and_repeat_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    let mut random = u64::from(clock) | 1;
    for _ in 0..10 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        run_child(folder.path(), Some(Duration::from_micros(random % 30_000)));
        if let Ok(store) = Store::read(&folder.path().join("trials.sqlite")) {
            store.records().unwrap();
        }
    }
    assert!(run_child(folder.path(), None), "the last run ends well");

    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert_eq!(
        log.matches("open").count(),
        11,
        "every run came to its store"
    );
    let mut finished = HashSet::new();
    let mut starts: HashMap<u64, u32> = HashMap::new();
    for line in log.lines() {
        let (what, seed) = line.split_once(' ').unwrap();
        let seed: u64 = seed.parse().unwrap();
        match what {
            "start" => {
                assert!(
                    !finished.contains(&seed),
                    "trial {seed} was run again after it was done"
                );
                *starts.entry(seed).or_default() += 1;
            }
            "done" => assert!(finished.insert(seed), "trial {seed} was done twice"),
            _ => {}
        }
    }
    let records = Store::read(&folder.path().join("trials.sqlite"))
        .unwrap()
        .records()
        .unwrap();
    assert_eq!(records.len() as u64, TRIALS);
    for record in records {
        assert_eq!(record.status, Status::Done);
        assert_eq!(record.result.as_ref(), Some(&result(0, 2, record.key.seed)));
        let started = starts[&record.key.seed];
        // A kill may fall between the claim and the note of it, never the other way round.
        assert!(
            record.attempts >= started,
            "trial {} was started without a claim",
            record.key.seed
        );
    }
}
