//! `anyformer lra` on a benchmark of seconds.

use crate::harness::{anyformer, files, folder};

const WORDS: &[&str] = &[
    "lra",
    "--tasks=listops,retrieval",
    "--models=attention,fnet,gla",
    "--seeds=2",
    "--steps=2",
    "--lengths=32,64",
    "--threads=1",
    "--out=arena",
    "--json",
];

#[test]
fn two_tasks_leave_both_tables_and_go_on() {
    let place = folder();
    let first = anyformer(place.path(), WORDS).ok().json();
    assert_eq!(first["trials"].as_array().map(Vec::len), Some(12));
    let heads = [
        "model",
        "list_ops",
        "toy_citations",
        "average",
        "parameters",
    ];
    assert_eq!(first["quality"]["headings"], serde_json::json!(heads));
    let rows = first["quality"]["rows"].as_array().expect("rows");
    // The constant answer and three models, each with an error over two seeds.
    assert_eq!(rows.len(), 4);
    assert!(
        rows[1][1].as_str().is_some_and(|cell| cell.contains('±')),
        "{}",
        rows[1]
    );
    let notes = first["quality"]["notes"].to_string();
    assert!(
        notes.contains("toy_citations stands in for matching"),
        "{notes}"
    );
    assert_eq!(first["speed"]["rows"].as_array().map(Vec::len), Some(3));
    for name in [
        "lra.md",
        "lra.html",
        "report.html",
        "speed.json",
        "trials.sqlite",
    ] {
        assert!(place.path().join("arena").join(name).is_file(), "no {name}");
    }
    let second = anyformer(place.path(), WORDS).ok();
    assert!(second.err.contains("kept from before"), "{}", second.err);
    assert_eq!(second.json()["speed"], first["speed"]);
}

#[test]
fn the_published_sizes_are_priced_without_training() {
    let place = folder();
    let words = [
        "lra",
        "--preset=paper",
        "--plan",
        "--models=attention,s4d",
        "--json",
    ];
    let plan = anyformer(place.path(), &words).ok().json();
    assert!(plan["rows"][0].to_string().contains("8,948,746"), "{plan}");
    assert_eq!(files(place.path()).len(), 0);
}

#[test]
fn what_cannot_be_run_is_refused() {
    let place = folder();
    for (change, words) in [
        ("--tasks=listop", &["listops", "pathx"][..]),
        ("--models=glaa", &["did you mean \"gla\"?"]),
        ("--models=gla,gla", &["twice"]),
        ("--dialect=s5", &["s4"]),
        ("--preset=large", &["smoke"]),
    ] {
        anyformer(place.path(), &["lra", "--out=no", change]).bad(words);
        assert_eq!(files(place.path()).len(), 0, "{change}");
    }
}
