//! Generated files, in two modes: write them, or say which are stale.

use std::path::{Path, PathBuf};

/// A generated file: its path below the root and its text.
pub type Page = (PathBuf, String);

/// Writes every page that differs.
pub fn write(root: &Path, pages: Result<Vec<Page>, String>) -> Result<String, String> {
    let mut written = 0;
    for (path, text) in pages? {
        let path = root.join(path);
        if std::fs::read_to_string(&path).is_ok_and(|held| held == text) {
            continue;
        }
        let fail = |error: std::io::Error| format!("failed to write {}: {error}", path.display());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(fail)?;
        }
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, text).map_err(fail)?;
        std::fs::rename(&temporary, &path).map_err(fail)?;
        written += 1;
    }
    Ok(format!("{written} generated files written"))
}

/// Names every page that differs from what would be written.
pub fn check(root: &Path, pages: Result<Vec<Page>, String>) -> Result<String, String> {
    let pages = pages?;
    let stale: Vec<String> = pages
        .iter()
        .filter(|(path, text)| {
            std::fs::read_to_string(root.join(path)).map_or(true, |held| held != *text)
        })
        .map(|(path, _)| path.display().to_string())
        .collect();
    match stale.is_empty() {
        true => Ok(format!("{} generated files are up to date", pages.len())),
        false => Err(format!(
            "stale generated files, run the same command without --check:\n{}",
            stale.join("\n")
        )),
    }
}
