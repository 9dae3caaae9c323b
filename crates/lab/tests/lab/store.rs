use std::fs;

use anyformer_lab::store::{Claim, Filter, Store, StoreError, Ticket};
use anyformer_lab::trial::Status;
use serde_json::{Value, json};

use crate::fixture::{key, result};

fn plan() -> Value {
    json!({"tasks": ["mqar"], "budget": {"kind": "params", "tolerance": 0.02}, "steps": 400})
}

fn run(claim: Claim) -> Ticket {
    match claim {
        Claim::Run(ticket) => ticket,
        other => panic!("expected a ticket, got {other:?}"),
    }
}

#[test]
fn a_trial_is_run_once_and_its_result_kept_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trials.sqlite");
    let key = key("mqar", "gla", 0);
    let mut measured = result(0, 2, 0);
    measured.loss = f64::NAN;
    measured.curve[3].train_loss = 0.1 + 0.2;
    {
        let mut store = Store::open(&path, &plan()).unwrap();
        let ticket = run(store.claim(&key).unwrap());
        assert_eq!(ticket.attempt(), 1);
        assert!(matches!(store.claim(&key).unwrap(), Claim::Busy));
        store.finish(&ticket, &measured).unwrap();
        let again = store.finish(&ticket, &measured).unwrap_err();
        assert!(matches!(again, StoreError::NotClaimed { .. }), "{again}");
    }
    let mut store = Store::open(&path, &plan()).unwrap();
    let Claim::Done(record) = store.claim(&key).unwrap() else {
        panic!("not done")
    };
    let read = record.result.unwrap();
    assert!(read.loss.is_nan());
    assert_eq!(read.curve, measured.curve);
    assert_eq!(
        (read.latency, read.metric),
        (measured.latency, measured.metric)
    );
    assert_eq!((record.key, record.attempts), (key, 1));
    let files: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    assert_eq!(files.len(), 2, "one file and its lock: {files:?}");
}

#[test]
fn a_claim_of_a_lost_run_is_handed_out_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trials.sqlite");
    let key = key("mqar", "gla", 0);
    for attempt in 1..=3 {
        let mut store = Store::open(&path, &plan()).unwrap();
        assert_eq!(run(store.claim(&key).unwrap()).attempt(), attempt);
        assert_eq!(
            store.get(&key.id()).unwrap().unwrap().status,
            Status::Claimed
        );
    }
}

#[test]
fn a_ticket_of_an_earlier_opening_is_worth_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trials.sqlite");
    let key = key("mqar", "gla", 0);
    let mut store = Store::open(&path, &plan()).unwrap();
    let old = run(store.claim(&key).unwrap());
    drop(store);
    let mut store = Store::open(&path, &plan()).unwrap();
    let new = run(store.claim(&key).unwrap());
    assert!(matches!(
        store.get(&key.id()).unwrap().unwrap().status,
        Status::Claimed
    ));
    drop(store);
    let mut store = Store::open(&path, &plan()).unwrap();
    assert!(matches!(
        store.finish(&old, &result(0, 2, 0)),
        Err(StoreError::NotClaimed { .. })
    ));
    assert!(matches!(
        store.finish(&new, &result(0, 2, 0)),
        Err(StoreError::NotClaimed { .. })
    ));
    assert_eq!(
        store.get(&key.id()).unwrap().unwrap().status,
        Status::Claimed
    );
}

#[test]
fn failures_are_kept_until_retried_and_released_trials_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(&folder.path().join("trials.sqlite"), &plan()).unwrap();
    let (a, b) = (key("mqar", "gla", 0), key("mqar", "mamba", 0));
    let ticket = run(store.claim(&a).unwrap());
    store.fail(&ticket, "loss is NaN at step 3").unwrap();
    let ticket = run(store.claim(&b).unwrap());
    store.release(ticket).unwrap();
    let Claim::Failed(record) = store.claim(&a).unwrap() else {
        panic!("not failed")
    };
    assert_eq!(record.error.as_deref(), Some("loss is NaN at step 3"));
    assert_eq!(store.records().unwrap().len(), 1);
    assert_eq!(store.retry_failed().unwrap(), 1);
    run(store.claim(&a).unwrap());
}

#[test]
fn one_writer_any_readers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trials.sqlite");
    let mut store = Store::open(&path, &plan()).unwrap();
    let error = Store::open(&path, &plan()).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }));
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    let ticket = run(store.claim(&key("mqar", "gla", 0)).unwrap());
    let mut reader = Store::read(&path).unwrap();
    assert_eq!(reader.records().unwrap().len(), 1);
    assert!(
        reader.claim(&key("mqar", "gla", 1)).is_err(),
        "a reader cannot claim"
    );
    store.finish(&ticket, &result(0, 2, 0)).unwrap();
    let done = Filter {
        status: Some(Status::Done),
        mixer: Some("gla".into()),
        task: None,
    };
    assert_eq!(reader.query(&done).unwrap().len(), 1);
    assert_eq!(
        reader
            .query(&Filter {
                task: Some("list_ops".into()),
                ..done
            })
            .unwrap()
            .len(),
        0
    );
    drop(store);
    Store::open(&path, &plan()).unwrap();
}

#[test]
fn another_plan_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trials.sqlite");
    drop(Store::open(&path, &plan()).unwrap());
    let mut other = plan();
    other["steps"] = json!(500);
    let error = Store::open(&path, &other).unwrap_err();
    assert!(matches!(error, StoreError::PlanMismatch { .. }));
    assert!(
        error
            .to_string()
            .contains("steps is 400 in the store and 500 here"),
        "{error}"
    );
    // The same plan in another key order is the same plan, and the refusal gave the lock back.
    let reordered =
        json!({"steps": 400, "budget": {"tolerance": 0.02, "kind": "params"}, "tasks": ["mqar"]});
    assert_eq!(Store::open(&path, &reordered).unwrap().plan()["steps"], 400);
}

#[test]
fn damage_is_an_error_and_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trials.sqlite");
    let mut store = Store::open(&path, &plan()).unwrap();
    for seed in 0..4 {
        let ticket = run(store.claim(&key("mqar", "gla", seed)).unwrap());
        store.finish(&ticket, &result(0, 2, seed)).unwrap();
    }
    drop(store);
    let whole = fs::read(&path).unwrap();
    assert!(whole.len() > 20_000);
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        for opened in [Store::open(&path, &plan()), Store::read(&path)] {
            assert!(
                matches!(opened, Err(StoreError::Corrupt { .. })),
                "{what}: {opened:?}"
            );
        }
        assert_eq!(
            fs::read(&path).unwrap(),
            bytes,
            "{what}: the file was changed"
        );
    };
    refused(b"", "empty");
    refused(b"not a database at all, but long enough to have a header of one hundred bytes; and yet more of it here.....", "text");
    refused(&whole[..50], "half a header");
    refused(&whole[..4096], "first page only");
    refused(&whole[..whole.len() - 4096], "last page missing");
    refused(&whole[..whole.len() / 2 + 17], "cut inside a page");
    // A flipped bit often leaves valid SQLite behind. Wherever it is: refused, or nothing of the results has changed.
    fs::write(&path, &whole).unwrap();
    let truth = Store::read(&path).unwrap().records().unwrap();
    let mut refusals = 0;
    for index in 0..400 {
        let mut flipped = whole.clone();
        let place = (index * 7919 * 61) % whole.len();
        flipped[place] ^= 1 << (index % 8);
        fs::write(&path, &flipped).unwrap();
        match Store::read(&path) {
            Ok(store) => {
                let read = store.records().unwrap();
                let same = read
                    .iter()
                    .zip(&truth)
                    .all(|(a, b)| (&a.key, &a.result) == (&b.key, &b.result));
                assert!(
                    same && read.len() == truth.len(),
                    "byte {place} changed what is read"
                );
            }
            Err(StoreError::Corrupt { .. }) => refusals += 1,
            Err(other) => panic!("byte {place}: {other:?}"),
        }
    }
    assert!(refusals > 200, "only {refusals} of 400 flips were noticed");
    fs::write(&path, &whole).unwrap();
    assert_eq!(
        Store::open(&path, &plan())
            .unwrap()
            .records()
            .unwrap()
            .len(),
        4
    );
}

#[test]
fn other_files_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Store::read(&folder.path().join("none.sqlite")).unwrap_err();
    assert!(matches!(missing, StoreError::Missing { .. }), "{missing}");
    let path = folder.path().join("trials.sqlite");
    drop(Store::open(&path, &plan()).unwrap());
    let other = rusqlite::Connection::open(&path).unwrap();
    other
        .execute(
            "UPDATE meta SET value = 99 WHERE name = 'schema_version'",
            [],
        )
        .unwrap();
    drop(other);
    let error = Store::open(&path, &plan()).unwrap_err();
    assert!(
        matches!(error, StoreError::Schema { found: 99, .. }),
        "{error:?}"
    );
    let foreign = folder.path().join("foreign.sqlite");
    rusqlite::Connection::open(&foreign)
        .unwrap()
        .execute("CREATE TABLE x (y)", [])
        .unwrap();
    let error = Store::open(&foreign, &plan()).unwrap_err();
    assert!(error.to_string().contains("another program"), "{error}");
    let nowhere =
        Store::open(&folder.path().join("no/such/folder/trials.sqlite"), &plan()).unwrap_err();
    assert!(matches!(nowhere, StoreError::Io { .. }), "{nowhere:?}");
    let error = Store::open(folder.path(), &plan()).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
}
