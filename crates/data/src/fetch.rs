//! Fetching data sets: from their canonical address, a mirror, or a local copy; resumed, checked, never half there.
//!
//! A file is written to `NAME.part` and gets its name once its checksum is right. A transfer that was cut off goes on with
//! an HTTP `Range` request, in the same call (a few times) or in the next one. What fails its check is deleted.

mod catalogue;
mod download;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use flate2::read::{GzDecoder, MultiGzDecoder};
use sha2::{Digest, Sha256};

pub use catalogue::{Dataset, RemoteFile, datasets};

use crate::error::hint;

/// Why a data set cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No such data set.
    #[error("find data set {name:?}: no such name{hint}; the names are: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// `; did you mean …?` or empty.
        hint: String,
        /// All names.
        known: String,
    },
    /// It ships with the program.
    #[error("fetch data set {name}: it ships with the program; use it as {usage}")]
    Shipped {
        /// The data set.
        name: &'static str,
        /// How to use it.
        usage: &'static str,
    },
    /// A server that cannot be reached, or that answers otherwise than with the file.
    #[error(
        "fetch {address}: {message}; what has come so far is kept and the next try goes on from there, or give a local copy or a mirror"
    )]
    Transfer {
        /// The address.
        address: String,
        /// What happened.
        message: String,
    },
    /// The bytes are not those that were published.
    #[error(
        "check {name} from {source_name}: expected SHA-256 {expected}, got {got} ({bytes} bytes); nothing was kept"
    )]
    Checksum {
        /// The file.
        name: &'static str,
        /// Where it came from.
        source_name: String,
        /// As published.
        expected: &'static str,
        /// As found.
        got: String,
        /// Bytes that came.
        bytes: u64,
    },
    /// A local copy that lacks a file.
    #[error("find {name} in {path}: no such file; give the folder that holds {expected}")]
    Missing {
        /// The file.
        name: &'static str,
        /// Where it was sought.
        path: PathBuf,
        /// All files of the set.
        expected: String,
    },
    /// An archive that cannot be unpacked.
    #[error("unpack {path}: {message}")]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A file that cannot be read or written.
    #[error("{action} {path}: {error}")]
    File {
        /// `read`, `write` …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FetchError {
    move |error| FetchError::File {
        action,
        path: path.to_path_buf(),
        error,
    }
}

/// A data set that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Its folder, `DIR` in [`Dataset::usage`].
    pub folder: PathBuf,
    /// Everything was there before, with the right checksums (an archive: was unpacked before).
    pub present: bool,
    /// Files without a published checksum: what came was not verified.
    pub unverified: Vec<&'static str>,
}

/// The data set of that name.
pub fn dataset(name: &str) -> Result<&'static Dataset, FetchError> {
    let names = || datasets().iter().map(|set| set.name);
    datasets()
        .iter()
        .find(|set| set.name == name)
        .ok_or_else(|| FetchError::Unknown {
            name: name.to_string(),
            hint: hint(name, names()),
            known: names().collect::<Vec<_>>().join(", "),
        })
}

/// Lays a data set into `dest/name`.
///
/// `source` takes the place of the canonical addresses: an `http://` or `https://` address of a folder that holds the
/// files (or of the file, if there is one), or a local folder or file; checksums hold all the same. A local file may be
/// the content of a `.gz` file as well. `progress` gets the bytes of the whole set so far, and how many there are.
pub fn get(
    name: &str,
    dest: &Path,
    source: Option<&str>,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<Fetched, FetchError> {
    let set = dataset(name)?;
    if set.shipped {
        return Err(FetchError::Shipped {
            name: set.name,
            usage: set.usage,
        });
    }
    get_set(set, dest, source, progress)
}

/// [`get`] for a data set that need not be registered.
pub(crate) fn get_set(
    set: &Dataset,
    dest: &Path,
    source: Option<&str>,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<Fetched, FetchError> {
    let folder = dest.join(set.name);
    let mut fetched = Fetched {
        folder: folder.clone(),
        present: true,
        unverified: Vec::new(),
    };
    let (mut before, total) = (0, set.bytes());
    for file in set.files {
        if file.sha256.is_none() {
            fetched.unverified.push(file.name);
        }
        let home = if file.archive { dest } else { &folder };
        let path = home.join(file.name);
        // An archive becomes a folder by one rename, so a folder that is there is whole.
        let there = match file.archive {
            true => folder.is_dir(),
            false => present(file, &path)?,
        };
        if !there {
            fetched.present = false;
            std::fs::create_dir_all(home).map_err(file_error("make the folder", home))?;
            let mut moved = |done: u64| progress(before + done, total);
            // An archive that came whole before a failed unpacking is not fetched again.
            if !(file.archive && present(file, &path)?) {
                bring(set, file, &path, source, &mut moved)?;
            }
            if file.archive {
                unpack(&path, &folder)?;
            }
        }
        before += file.bytes.unwrap_or(0);
        progress(before, total);
    }
    Ok(fetched)
}

/// Whether the file is there with the published content; one without a checksum is if it is there at all.
fn present(file: &RemoteFile, path: &Path) -> Result<bool, FetchError> {
    if !path.is_file() {
        return Ok(false);
    }
    match verify(file, path) {
        Ok(()) => Ok(true),
        Err(FetchError::Checksum { .. }) => Ok(false),
        Err(other) => Err(other),
    }
}

/// Brings one file to `path`, checked.
fn bring(
    set: &Dataset,
    file: &RemoteFile,
    path: &Path,
    source: Option<&str>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), FetchError> {
    let part = path.with_file_name(format!("{}.part", file.name));
    let remote = |text: &str| text.starts_with("http://") || text.starts_with("https://");
    let from = match source {
        None => file.address(),
        Some(text) if remote(text) && text.ends_with(&format!("/{}", file.name)) => {
            text.to_string()
        }
        Some(text) if remote(text) => format!("{}/{}", text.trim_end_matches('/'), file.name),
        Some(text) => text.to_string(),
    };
    let origin = match remote(&from) {
        true => {
            let resumed = part.exists();
            download::download(&from, &part, progress)?;
            // What was here may have been the start of another file: once more, from nothing.
            if resumed && matches!(verify(file, &part), Err(FetchError::Checksum { .. })) {
                std::fs::remove_file(&part).map_err(file_error("delete", &part))?;
                download::download(&from, &part, progress)?;
            }
            from
        }
        false => copy(set, file, Path::new(&from), &part, progress)?
            .display()
            .to_string(),
    };
    if let Err(mut error) = verify(file, &part) {
        if let FetchError::Checksum { source_name, .. } = &mut error {
            *source_name = origin;
        }
        std::fs::remove_file(&part).map_err(file_error("delete", &part))?;
        return Err(error);
    }
    std::fs::rename(&part, path).map_err(file_error("rename to", path))
}

/// Copies a local file, packing it if the set wants `.gz` and the copy is unpacked; gives the path it was found at.
fn copy(
    set: &Dataset,
    file: &RemoteFile,
    source: &Path,
    part: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<PathBuf, FetchError> {
    let unpacked = file
        .name
        .strip_suffix(".gz")
        .filter(|_| file.content_sha256.is_some());
    let candidates: Vec<PathBuf> = match source.is_dir() {
        true => [Some(file.name), unpacked]
            .into_iter()
            .flatten()
            .map(|name| source.join(name))
            .collect(),
        false if set.files.len() == 1 => vec![source.to_path_buf()],
        false => Vec::new(),
    };
    let found = candidates
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| FetchError::Missing {
            name: file.name,
            path: source.to_path_buf(),
            expected: set
                .files
                .iter()
                .map(|file| file.name)
                .collect::<Vec<_>>()
                .join(", "),
        })?;
    let mut reader = File::open(&found).map_err(file_error("read", &found))?;
    let writer = File::create(part).map_err(file_error("write", part))?;
    let mut start = Vec::new();
    reader
        .by_ref()
        .take(2)
        .read_to_end(&mut start)
        .map_err(file_error("read", &found))?;
    let mut whole = start.as_slice().chain(&mut reader);
    match unpacked.is_some() && start != [0x1f, 0x8b] {
        true => {
            let mut packer = flate2::write::GzEncoder::new(writer, flate2::Compression::best());
            pump(&mut whole, &mut packer, 0, progress, &found, part)?;
            packer
                .finish()
                .and_then(|file| file.sync_all())
                .map_err(file_error("write", part))?;
        }
        false => {
            let mut writer = writer;
            pump(&mut whole, &mut writer, 0, progress, &found, part)?;
            writer.sync_all().map_err(file_error("write", part))?;
        }
    }
    Ok(found)
}

/// Copies a stream, telling `done` plus the bytes so far.
fn pump(
    reader: &mut dyn Read,
    writer: &mut dyn io::Write,
    mut done: u64,
    progress: &mut dyn FnMut(u64),
    from: &Path,
    to: &Path,
) -> Result<(), FetchError> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = reader.read(&mut buffer).map_err(file_error("read", from))?;
        if count == 0 {
            return Ok(());
        }
        writer
            .write_all(&buffer[..count])
            .map_err(file_error("write", to))?;
        done += count as u64;
        progress(done);
    }
}

/// SHA-256 in hexadecimal, and the number of bytes.
fn digest(mut reader: impl Read) -> io::Result<(String, u64)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        match reader.read(&mut buffer)? {
            0 => break,
            count => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
        }
    }
    Ok((
        hash.finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        bytes,
    ))
}

/// Checks a file, or else what it holds, against the published sums.
fn verify(file: &RemoteFile, path: &Path) -> Result<(), FetchError> {
    let Some(expected) = file.sha256 else {
        return Ok(());
    };
    let open = || File::open(path).map_err(file_error("read", path));
    let (got, bytes) = digest(open()?).map_err(file_error("read", path))?;
    if got == expected {
        return Ok(());
    }
    if let Some(content) = file.content_sha256
        && digest(MultiGzDecoder::new(open()?)).is_ok_and(|(got, _)| got == content)
    {
        return Ok(());
    }
    Err(FetchError::Checksum {
        name: file.name,
        source_name: path.display().to_string(),
        expected,
        got,
        bytes,
    })
}

/// Unpacks a `.tar.gz` with one folder in it, to `folder`, by way of a temporary name; then deletes the archive.
fn unpack(archive: &Path, folder: &Path) -> Result<(), FetchError> {
    let wrong = |message: String| FetchError::Archive {
        path: archive.to_path_buf(),
        message,
    };
    let mut name = folder.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    let part = folder.with_file_name(name);
    if part.exists() {
        std::fs::remove_dir_all(&part).map_err(file_error("delete", &part))?;
    }
    let file = File::open(archive).map_err(file_error("read", archive))?;
    let mut tar = tar::Archive::new(GzDecoder::new(io::BufReader::new(file)));
    tar.set_preserve_mtime(false);
    tar.unpack(&part).map_err(|error| {
        let cause =
            std::error::Error::source(&error).map_or(String::new(), |cause| format!(": {cause}"));
        wrong(format!("{error}{cause}"))
    })?;
    let entries = std::fs::read_dir(&part).map_err(file_error("read", &part))?;
    let entries = entries
        .collect::<Result<Vec<_>, _>>()
        .map_err(file_error("read", &part))?;
    let top = match entries.as_slice() {
        [one] if one.path().is_dir() => one.path(),
        other => {
            return Err(wrong(format!(
                "expected one folder in the archive, got {} entries",
                other.len()
            )));
        }
    };
    std::fs::rename(&top, folder).map_err(file_error("rename to", folder))?;
    std::fs::remove_dir(&part).map_err(file_error("delete", &part))?;
    std::fs::remove_file(archive).map_err(file_error("delete", archive))
}
