//! A folder that appears whole or not at all, with a checksum of every file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::atomic::{fill_file, is_temporary, parent, sync_folder, temporary_name};
use crate::error::{Damage, HubError};
use crate::weights::unreadable;

/// The file with the checksums of the others, in the format of `sha256sum -c`.
pub const MANIFEST_FILE: &str = "SHA256SUMS";

/// The largest file that a manifest, config or other text may be.
const LARGEST_TEXT: u64 = 64 << 20;

/// Writes the files of one folder beside its final name; [`FolderWriter::commit`] renames it. Dropped before that, it
/// removes what it wrote.
#[derive(Debug)]
pub struct FolderWriter {
    temporary: PathBuf,
    target: PathBuf,
    sums: BTreeMap<String, String>,
    committed: bool,
}

impl FolderWriter {
    /// Begins a folder. `target` must not exist or be empty; the folders above it are made.
    pub fn create(target: &Path) -> Result<Self, HubError> {
        let wrong = |error| HubError::write(target, error);
        if fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(HubError::Exists(target.to_path_buf()));
        }
        fs::create_dir_all(parent(target)).map_err(wrong)?;
        let temporary = temporary_name(target).map_err(wrong)?;
        fs::create_dir(&temporary).map_err(wrong)?;
        Ok(FolderWriter {
            temporary,
            target: target.to_path_buf(),
            sums: BTreeMap::new(),
            committed: false,
        })
    }

    /// Writes one file through `fill`, flushes it to disk, and notes its checksum; `name` may be a path of folders below, which
    /// are made.
    pub fn file(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), HubError> {
        let mut sum = Sha256::new();
        let path = self.temporary.join(name);
        let wrong = |error| HubError::write(&self.target.join(name), error);
        // The folder itself is flushed at the end, once.
        let below = Some(parent(&path)).filter(|folder| *folder != self.temporary);
        if let Some(below) = below {
            fs::create_dir_all(below).map_err(wrong)?;
        }
        fill_file(&path, |file| {
            let mut writer = BufWriter::with_capacity(
                1 << 20,
                Summed {
                    file,
                    sum: &mut sum,
                },
            );
            fill(&mut writer)?;
            writer.flush()
        })
        .and_then(|()| below.map_or(Ok(()), sync_folder))
        .map_err(wrong)?;
        self.sums.insert(name.to_string(), hex(&sum.finalize()));
        Ok(())
    }

    /// Writes the checksums and gives the folder its final name.
    pub fn commit(mut self) -> Result<(), HubError> {
        let lines: Vec<String> = self
            .sums
            .iter()
            .map(|(name, sum)| format!("{sum}  {name}\n"))
            .collect();
        self.file(MANIFEST_FILE, |file| {
            file.write_all(lines.concat().as_bytes())
        })?;
        let rename = || {
            sync_folder(&self.temporary)?;
            fs::rename(&self.temporary, &self.target)?;
            sync_folder(parent(&self.target))
        };
        match rename() {
            Ok(()) => {
                self.committed = true;
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists
                ) =>
            {
                Err(HubError::Exists(self.target.clone()))
            }
            Err(error) => Err(HubError::write(&self.target, error)),
        }
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

struct Summed<'a> {
    file: &'a mut File,
    sum: &'a mut Sha256,
}

impl Write for Summed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.sum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Removes what killed writers left in `folder`. Call it only where no other process writes there.
pub fn clean_temporaries(folder: &Path) -> Result<(), HubError> {
    let wrong = |error| HubError::write(folder, error);
    for entry in fs::read_dir(folder).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        if !entry.file_name().to_str().is_some_and(is_temporary) {
            continue;
        }
        match entry.file_type().map_err(wrong)?.is_dir() {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        }
        .map_err(wrong)?;
    }
    Ok(())
}

/// The checksums of a folder.
#[derive(Clone, Debug, Default)]
pub struct Manifest {
    folder: PathBuf,
    sums: Option<BTreeMap<String, String>>,
}

impl Manifest {
    /// Reads the checksums of `folder`; a folder made by other tools has none, and then nothing is compared.
    pub fn open(folder: &Path) -> Result<Self, HubError> {
        let path = folder.join(MANIFEST_FILE);
        let sums = match read_limited(&path) {
            Ok(bytes) => Some(parse(&path, &bytes)?),
            Err(HubError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Manifest {
            folder: folder.to_path_buf(),
            sums,
        })
    }

    /// Whether the folder has checksums.
    pub fn present(&self) -> bool {
        self.sums.is_some()
    }

    /// Whether the folder holds a file of this name, or should.
    pub fn has(&self, name: &str) -> bool {
        match &self.sums {
            Some(sums) => sums.contains_key(name) || self.folder.join(name).exists(),
            None => self.folder.join(name).exists(),
        }
    }

    /// Reads a file and compares its checksum.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, HubError> {
        let path = self.folder.join(name);
        let bytes = read(&path)?;
        self.check(name, &bytes)?;
        Ok(bytes)
    }

    /// As [`Manifest::read`], for a text; a byte that is no UTF-8 is an error.
    pub fn read_text(&self, name: &str) -> Result<String, HubError> {
        let path = self.folder.join(name);
        let bytes = read_limited(&path)?;
        self.check(name, &bytes)?;
        String::from_utf8(bytes)
            .map_err(|error| HubError::damaged(&path, Damage::Text(format!("not UTF-8: {error}"))))
    }

    /// Compares the bytes of the file `name` with its checksum.
    pub fn check(&self, name: &str, bytes: &[u8]) -> Result<(), HubError> {
        self.compare(name, || Ok(hex(&Sha256::digest(bytes))))
    }

    /// Compares a file with its checksum, reading it piece by piece.
    pub(crate) fn check_file(&self, name: &str) -> Result<(), HubError> {
        let path = self.folder.join(name);
        self.compare(name, || {
            let mut sum = Sha256::new();
            let mut file = File::open(&path)?;
            let mut piece = vec![0; 1 << 20];
            loop {
                match file.read(&mut piece)? {
                    0 => return Ok(hex(&sum.finalize())),
                    count => sum.update(&piece[..count]),
                }
            }
        })
    }

    fn compare(
        &self,
        name: &str,
        sum: impl FnOnce() -> io::Result<String>,
    ) -> Result<(), HubError> {
        let Some(sums) = &self.sums else {
            return Ok(());
        };
        let path = self.folder.join(name);
        let Some(expected) = sums.get(name).cloned() else {
            return Err(HubError::damaged(&path, Damage::Missing(MANIFEST_FILE)));
        };
        let got = sum().map_err(unreadable(&path))?;
        match expected == got {
            true => Ok(()),
            false => Err(HubError::damaged(&path, Damage::Checksum { expected, got })),
        }
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, HubError> {
    fs::read(path).map_err(unreadable(path))
}

fn read_limited(path: &Path) -> Result<Vec<u8>, HubError> {
    let size = fs::metadata(path).map_or(0, |data| data.len());
    if size > LARGEST_TEXT {
        let message = format!(
            "{size} bytes are more than the {LARGEST_TEXT} that a text of a model folder may have"
        );
        return Err(HubError::damaged(path, Damage::Text(message)));
    }
    read(path)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, String>, HubError> {
    let wrong = |message: String| HubError::damaged(path, Damage::Text(message));
    let text = std::str::from_utf8(bytes).map_err(|error| wrong(format!("not UTF-8: {error}")))?;
    let mut sums = BTreeMap::new();
    for (line, content) in text.lines().enumerate() {
        let fields = content.split_once("  ");
        let valid = |sum: &str| sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit());
        match fields {
            Some((sum, name)) if valid(sum) && !name.is_empty() => {
                sums.insert(name.to_string(), sum.to_ascii_lowercase());
            }
            _ => {
                let line = line + 1;
                return Err(wrong(format!(
                    "line {line} is not \"SHA256  NAME\"; make it anew with sha256sum"
                )));
            }
        }
    }
    Ok(sums)
}
