//! The only place that writes to the terminal. Results go to standard output, everything else to standard error.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::exit::Failure;

/// Where a verb says things.
#[derive(Debug)]
pub struct Say {
    json: bool,
    quiet: bool,
    lost: Mutex<Option<io::Error>>,
}

impl Say {
    /// `json`: results as JSON instead of text. `quiet`: results and errors only.
    pub fn new(json: bool, quiet: bool) -> Self {
        Say {
            json,
            quiet,
            lost: Mutex::new(None),
        }
    }

    /// True when results are wanted as JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// True when notes and progress are not wanted.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// True when progress may redraw a line: a terminal, and not quiet.
    pub fn can_redraw(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    /// Writes to standard output as it is, and flushes. A reader that went away (`| head`) is no failure; a full disk
    /// is, told by [`Say::finish`].
    pub fn raw(&self, bytes: &[u8]) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if lost.is_some() {
            return;
        }
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_all(bytes).and_then(|()| out.flush()) {
            *lost = Some(error);
        }
    }

    /// True once nobody reads standard output any more.
    pub fn is_gone(&self) -> bool {
        self.lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// A result, one or more lines.
    pub fn line(&self, text: impl AsRef<str>) {
        self.raw(format!("{}\n", text.as_ref().trim_end_matches('\n')).as_bytes());
    }

    /// A result: the value when JSON is wanted, otherwise the text.
    pub fn result(&self, value: &impl Serialize, text: impl FnOnce() -> String) {
        if !self.json {
            return self.line(text());
        }
        match serde_json::to_string_pretty(value) {
            Ok(json) => self.line(json),
            Err(error) => self.error(&format!("failed to write JSON: {error}")),
        }
    }

    /// Something worth knowing that is not the result.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.stderr(text.as_ref());
        }
    }

    /// What went wrong.
    pub fn error(&self, text: &str) {
        self.stderr(&format!("error: {text}"));
    }

    /// How to go on after a stop; said even when quiet.
    pub fn stopped(&self, text: &str) {
        self.stderr(text);
    }

    fn stderr(&self, text: &str) {
        // Nothing is left to do when even this cannot be written.
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    /// Tells whether every result could be written.
    pub fn finish(&self) -> Result<(), Failure> {
        let lost = self
            .lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match lost {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Broken(
                anyhow::Error::new(error).context("write to standard output"),
            )),
            _ => Ok(()),
        }
    }
}
