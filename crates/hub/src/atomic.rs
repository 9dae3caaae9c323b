//! Whole files or none: written under a temporary name in the same folder, flushed to disk, then renamed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::HubError;

/// Ends every temporary name; such names also begin with a dot.
const ENDING: &str = ".tmp";

/// Writes `path` through `fill`. On any error the file that stood there is untouched and the temporary one is gone.
pub fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), HubError> {
    let temporary = temporary_name(path).map_err(|error| HubError::write(path, error))?;
    let outcome = fill_file(&temporary, |file| {
        let mut writer = BufWriter::new(file);
        fill(&mut writer)?;
        writer.flush()
    })
    .and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = outcome {
        let _ = fs::remove_file(&temporary);
        return Err(HubError::write(path, error));
    }
    sync_folder(parent(path)).map_err(|error| HubError::write(path, error))
}

/// Creates a new file, fills it, and flushes it to disk.
pub(crate) fn fill_file(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    fill(&mut file)?;
    file.sync_all()
}

/// A name beside `path` that no other call of this process, and no other process, gives.
pub(crate) fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| {
        let message = format!("{} names no file", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })?;
    let (process, call) = (std::process::id(), CALLS.fetch_add(1, Ordering::Relaxed));
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{process}.{call}{ENDING}"));
    Ok(path.with_file_name(hidden))
}

/// Whether a name in a folder is one that [`write_file`] or a folder writer leaves when it is killed.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(ENDING)
}

/// The folder that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes renames in `folder` durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_keeps_the_old_file_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        write_file(&path, |file| file.write_all(b"old")).unwrap();
        let outcome = write_file(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("no space"))
        });
        assert!(
            outcome
                .unwrap_err()
                .to_string()
                .contains("run.toml: no space")
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
