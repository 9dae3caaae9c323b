//! Who holds a store: an operating-system lock on a file beside it, which a killed process gives back by itself.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// A process that holds a store or claimed a trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Process id.
    pub pid: u32,
    /// Start of the process in clock ticks since boot, which tells two processes of one id apart (Linux).
    pub process_start: Option<u64>,
    /// Identity of the boot, which tells two boots apart (Linux).
    pub boot: Option<String>,
    /// Which opening of the store within the process.
    pub opening: u64,
    /// When the store was opened, in seconds since 1970.
    pub since: i64,
}

impl Owner {
    /// This process, and an opening number that no other call in it gets.
    pub(crate) fn here() -> Self {
        static OPENINGS: AtomicU64 = AtomicU64::new(0);
        Self {
            pid: std::process::id(),
            process_start: process_start(),
            boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .ok()
                .map(|text| text.trim().to_string()),
            opening: OPENINGS.fetch_add(1, Ordering::Relaxed),
            since: crate::units::now(),
        }
    }

    /// The owner for a message.
    pub fn describe(&self) -> String {
        format!(
            "process {} since {}",
            self.pid,
            crate::units::utc(self.since)
        )
    }
}

/// Field 22 of `/proc/self/stat`; the second field may hold spaces, so counting starts after its closing parenthesis.
fn process_start() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    text.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

/// The lock, held until dropped or until the process dies.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

/// Why the lock was not had.
#[derive(Debug)]
pub(crate) enum LockFailure {
    Held(Option<Owner>),
    Io(io::Error),
}

/// The lock file of a store: its name with `.lock` added.
pub(crate) fn lock_path(store: &Path) -> PathBuf {
    let mut name = store.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

impl Lock {
    /// Takes the lock of the store at `store` for `owner`, without waiting.
    pub(crate) fn take(store: &Path, owner: &Owner) -> Result<Self, LockFailure> {
        let path = lock_path(store);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(LockFailure::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                return Err(LockFailure::Held(serde_json::from_str(&text).ok()));
            }
            Err(TryLockError::Error(error)) => return Err(LockFailure::Io(error)),
        }
        let text = serde_json::to_string(owner).unwrap_or_default();
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(text.as_bytes())
        };
        write(&mut file).map_err(LockFailure::Io)?;
        Ok(Self { file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The file stays (removing it would race with the next holder); empty, it names nobody.
        let _ = self.file.set_len(0);
        let _ = self.file.unlock();
    }
}
