//! How a command ends: 0 done, 1 failed, 2 bad input, 130 interrupted. Decided here and nowhere else.

use std::process::ExitCode;

use crate::say::Say;

/// Why a verb did not finish.
#[derive(Debug)]
pub enum Failure {
    /// What the user gave cannot be used: flags, config, files to read. Nothing was written.
    Input(anyhow::Error),
    /// It was understood and did not work.
    Broken(anyhow::Error),
    /// The user asked to stop; the text says how to go on.
    Interrupted(String),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Failure::Broken(error)
    }
}

/// Names the kind of a failure where the error of a library becomes one.
pub trait Kind<T> {
    /// The user's input is at fault.
    fn input(self) -> Result<T, Failure>;
    /// Something else is.
    fn broken(self) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> Kind<T> for Result<T, E> {
    fn input(self) -> Result<T, Failure> {
        self.map_err(|error| Failure::Input(error.into()))
    }

    fn broken(self) -> Result<T, Failure> {
        self.map_err(|error| Failure::Broken(error.into()))
    }
}

/// Bad input with a message of our own: a lower-case fragment that finishes "failed to …".
pub fn bad_input(message: impl std::fmt::Display) -> Failure {
    Failure::Input(anyhow::anyhow!("{message}"))
}

/// Prints what the parser of the command line said: help and version are no failures.
pub fn usage(error: &clap::Error) -> ExitCode {
    // Nothing is left to do when even this cannot be written.
    let _ = error.print();
    match error.use_stderr() {
        true => ExitCode::from(2),
        false => ExitCode::SUCCESS,
    }
}

/// Reports a failure and chooses the exit code.
pub fn report(result: Result<(), Failure>, say: &Say) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Input(error)) => {
            say.error(&chain(&error));
            ExitCode::from(2)
        }
        Err(Failure::Broken(error)) => {
            say.error(&chain(&error));
            ExitCode::from(1)
        }
        Err(Failure::Interrupted(how)) => {
            say.stopped(&how);
            ExitCode::from(INTERRUPTED)
        }
    }
}

/// The shell's code for a process stopped by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// `failed to A` and, below it, each cause that says something new.
fn chain(error: &anyhow::Error) -> String {
    let mut said = error.to_string();
    let mut text = format!("failed to {said}");
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !said.contains(&cause) {
            text.push_str("\n  because: ");
            text.push_str(&cause);
        }
        said = cause;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn chains_say_each_thing_once() {
        let inner: Result<(), _> = Err(anyhow::anyhow!("read a.toml: line 3"));
        let error = inner.context("train").expect_err("an error");
        assert_eq!(
            chain(&error),
            "failed to train\n  because: read a.toml: line 3"
        );
        let inner: Result<(), _> = Err(anyhow::anyhow!("line 3"));
        let error = inner.context("read a.toml: line 3").expect_err("an error");
        assert_eq!(chain(&error), "failed to read a.toml: line 3");
    }
}
