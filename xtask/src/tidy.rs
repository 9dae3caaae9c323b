//! The house rules that a machine can check. ARCHITECTURE.md states them.

use std::path::{Path, PathBuf};

/// Crates in order: each may depend on those before it only.
const ORDER: &[&str] = &[
    "kernels", "ops", "mixers", "models", "hub", "data", "train", "lab", "serve", "testkit", "cli",
];
/// Longest source file, tests included.
const LINES: usize = 520;

struct Source {
    /// Path below the root.
    path: PathBuf,
    /// `kernels`, `ops`, … or `xtask`.
    krate: String,
    text: String,
}

impl Source {
    fn is_test(&self) -> bool {
        let path = self.path.to_string_lossy();
        path.contains("/tests/")
            || path.contains("/benches/")
            || path.ends_with("/testing.rs")
            || path.ends_with("/tests.rs")
    }

    /// The text up to the unit tests.
    fn code(&self) -> &str {
        match self.text.find("#[cfg(test)]\nmod tests") {
            Some(at) => &self.text[..at],
            None => &self.text,
        }
    }
}

/// Runs every check and lists all that is wrong.
pub fn run(root: &Path) -> Result<String, String> {
    let sources = sources(root)?;
    let mut wrong = Vec::new();
    for source in &sources {
        check_source(source, &mut wrong);
    }
    check_dependencies(root, &mut wrong)?;
    check_registry(root, &mut wrong)?;
    check_words(root, &mut wrong)?;
    match wrong.is_empty() {
        true => Ok(format!("{} source files are tidy", sources.len())),
        false => Err(wrong.join("\n")),
    }
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), String> {
    let fail = |error: std::io::Error| format!("failed to list {}: {error}", folder.display());
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_string();
        match path.is_dir() {
            true if name == "target" || name.starts_with('.') => {}
            true => walk(&path, found)?,
            false => found.push(path),
        }
    }
    found.sort();
    Ok(())
}

fn sources(root: &Path) -> Result<Vec<Source>, String> {
    let mut paths = Vec::new();
    for folder in ["crates", "xtask"] {
        walk(&root.join(folder), &mut paths)?;
    }
    let mut sources = Vec::new();
    for path in paths {
        if path.extension().is_none_or(|ending| ending != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("failed to read {}: {error}", path.display()))?;
        let path = path.strip_prefix(root).unwrap_or(&path).to_path_buf();
        let mut parts = path
            .components()
            .map(|part| part.as_os_str().to_string_lossy());
        let first = parts.next().unwrap_or_default().to_string();
        let krate = match first.as_str() {
            "crates" => parts.next().unwrap_or_default().to_string(),
            _ => first,
        };
        sources.push(Source { path, krate, text });
    }
    Ok(sources)
}

fn check_source(source: &Source, wrong: &mut Vec<String>) {
    let krate = source.krate.as_str();
    let mut report = |line: usize, what: &str| {
        wrong.push(format!("{}:{line}: {what}", source.path.display()));
    };
    let lines = source.text.lines().count();
    if lines > LINES {
        report(
            lines,
            &format!("more than {LINES} lines: one file, one idea"),
        );
    }
    if !source.text.starts_with("//!") && !source.is_test() {
        report(1, "a file says first what it is for (//!)");
    }
    let code = source.code();
    let mut previous: Vec<&str> = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let at = index + 1;
        let trimmed = line.trim_start();
        if trimmed.starts_with("//") {
            previous.push(trimmed);
            continue;
        }
        // xtask holds these very words.
        if krate == "xtask" {
            continue;
        }
        let mut forbid = |word: &str, crates: &[&str], what: &str| {
            if line.contains(word) && !crates.contains(&krate) && !source.is_test() {
                report(at, what);
            }
        };
        forbid("burn::", &["ops"], "only ops names the tensor framework");
        forbid("println!", &["cli"], "only cli prints");
        forbid("eprint!", &["cli"], "only cli prints");
        forbid("print!(", &["cli"], "only cli prints");
        forbid("dbg!(", &[], "no debug output");
        forbid("todo!(", &[], "no stubs");
        forbid("unimplemented!(", &[], "no stubs");
        forbid("env::var", &[], "no environment variables as settings");
        forbid(
            "rayon::ThreadPoolBuilder",
            &["cli", "kernels"],
            "threads are chosen once, by the binary",
        );
        forbid("TcpListener", &["serve"], "only serve listens on a port");
        for word in ["axum::", "hyper::"] {
            forbid(word, &["serve"], "only serve knows HTTP as a server");
        }
        if line.contains("ureq::")
            && !(krate == "data" && source.path.to_string_lossy().contains("src/fetch"))
        {
            report(at, "only data::fetch is an HTTP client");
        }
        if line.contains("unsafe ") && !line.contains("unsafe_code") {
            if !["kernels", "ops"].contains(&krate) {
                report(at, "unsafe belongs to kernels and ops");
            } else if !line.contains("unsafe fn")
                && !previous.iter().any(|line| line.contains("SAFETY"))
                && !line.contains("SAFETY")
            {
                report(at, "an unsafe block has a SAFETY comment above it");
            }
        }
        previous.clear();
    }
}

fn check_dependencies(root: &Path, wrong: &mut Vec<String>) -> Result<(), String> {
    let crates = root.join("crates");
    let listing = std::fs::read_dir(&crates)
        .map_err(|error| format!("failed to list {}: {error}", crates.display()))?;
    for entry in listing.flatten() {
        let name = entry.file_name().to_string_lossy().to_string();
        let path = entry.path().join("Cargo.toml");
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("failed to read {}: {error}", path.display()))?;
        let Some(own) = ORDER.iter().position(|krate| *krate == name) else {
            wrong.push(format!(
                "crates/{name}: not in the order of crates in xtask/src/tidy.rs"
            ));
            continue;
        };
        let mut development = false;
        for line in text.lines() {
            if line.starts_with('[') {
                development = line.contains("dev-dependencies");
            }
            let dependency = line
                .strip_prefix("anyformer-")
                .and_then(|rest| rest.split([' ', '=', '.']).next());
            if let Some(dependency) = dependency
                && !development
            {
                match ORDER.iter().position(|krate| *krate == dependency) {
                    Some(other) if other < own && (dependency != "testkit") => {}
                    _ => wrong.push(format!("crates/{name}: must not depend on {dependency}")),
                }
            }
            if line.starts_with("burn") && name != "ops" {
                wrong.push(format!("crates/{name}: only ops depends on burn"));
            }
        }
    }
    Ok(())
}

/// Every file of `mixers` that registers an entry stands in the list, and the list is sorted.
fn check_registry(root: &Path, wrong: &mut Vec<String>) -> Result<(), String> {
    let names = |entries: Vec<&str>, what: &str, wrong: &mut Vec<String>| {
        let mut sorted = entries.clone();
        sorted.sort_unstable();
        if sorted != entries {
            wrong.push(format!(
                "crates/mixers/src/all.rs: the {what} mixers are not sorted"
            ));
        }
    };
    let token = anyformer_mixers::token_mixers()
        .iter()
        .map(|entry| entry.card.name);
    names(token.clone().collect(), "token", wrong);
    let channel = anyformer_mixers::channel_mixers()
        .iter()
        .map(|entry| entry.card.name);
    names(channel.clone().collect(), "channel", wrong);
    let listed: Vec<&str> = token.chain(channel).collect();
    let folder = root.join("crates/mixers/src");
    let mut paths = Vec::new();
    walk(&folder, &mut paths)?;
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .to_string();
        if text.contains("pub static ENTRY") && !listed.contains(&name.as_str()) {
            wrong.push(format!(
                "crates/mixers/src/{name}.rs: not in all.rs under its file name"
            ));
        }
    }
    Ok(())
}

/// Words that mean unfinished work, in any text that is kept.
fn check_words(root: &Path, wrong: &mut Vec<String>) -> Result<(), String> {
    let mut paths = Vec::new();
    for folder in ["crates", "docs", "oracles", "bench", "recipes"] {
        if root.join(folder).is_dir() {
            walk(&root.join(folder), &mut paths)?;
        }
    }
    for path in paths {
        let ending = path
            .extension()
            .unwrap_or_default()
            .to_string_lossy()
            .to_string();
        if !["rs", "md", "toml", "py", "sh"].contains(&ending.as_str()) {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        for (index, line) in text.lines().enumerate() {
            for word in ["TODO", "FIXME", "XXX:"] {
                if line.contains(word) {
                    let path = path.strip_prefix(root).unwrap_or(&path);
                    wrong.push(format!("{}:{}: {word}", path.display(), index + 1));
                }
            }
        }
    }
    Ok(())
}
