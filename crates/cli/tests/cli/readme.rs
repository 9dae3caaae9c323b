//! Every command in README.md runs, in order, in one folder.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::{binary, folder, root};

/// A command line of the README, and why it is not run, where it says so: `anyformer … # not run: reason`.
#[derive(Debug, PartialEq)]
struct Line {
    command: String,
    not_run: Option<String>,
}

/// Lines of code blocks that start with `anyformer ` or `cargo run --release -- `; a backslash at the end goes on.
fn lines(readme: &str) -> Vec<Line> {
    let mut found = Vec::new();
    let mut in_code = false;
    let mut open = String::new();
    for line in readme.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            continue;
        }
        if !in_code {
            continue;
        }
        open.push_str(line.trim().trim_start_matches("$ "));
        if let Some(front) = open.strip_suffix('\\') {
            open = front.to_string();
            continue;
        }
        let whole = std::mem::take(&mut open);
        let own = whole
            .strip_prefix("cargo run --release -- ")
            .map(|rest| format!("anyformer {rest}"));
        let own = own.unwrap_or(whole);
        if own.starts_with("anyformer ") {
            let (command, not_run) = match own.split_once("# not run:") {
                Some((command, reason)) => (command, Some(reason.trim().to_string())),
                None => (own.as_str(), None),
            };
            found.push(Line {
                command: command.trim().to_string(),
                not_run,
            });
        }
    }
    found
}

#[test]
fn command_lines_are_found() {
    let text = "anyformer no\n```sh\n$ anyformer a \\\n  b\ncargo run --release -- c # not run: long\nls\n```\n";
    let line = |command: &str, not_run: Option<&str>| Line {
        command: command.to_string(),
        not_run: not_run.map(str::to_string),
    };
    assert_eq!(
        lines(text),
        [
            line("anyformer a b", None),
            line("anyformer c", Some("long"))
        ]
    );
}

#[test]
fn every_command_of_the_readme_runs() {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let place = folder();
    for name in ["recipes", "docs", "crates", "bench"] {
        let from = root().join(name);
        std::os::unix::fs::symlink(from, place.path().join(name)).expect("a link");
    }
    let programs = binary()
        .parent()
        .unwrap_or(Path::new("."))
        .display()
        .to_string();
    let lines = lines(&readme);
    assert!(!lines.is_empty(), "README.md shows no command");
    for Line { command, not_run } in lines {
        if let Some(reason) = not_run {
            assert!(!reason.is_empty(), "{command}: why is it not run?");
            continue;
        }
        let script = format!("PATH='{programs}':\"$PATH\"\n{command}");
        let output = Command::new("sh")
            .arg("-c")
            .arg(script)
            .current_dir(place.path())
            .output()
            .expect("sh");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}\n{said}");
    }
}
