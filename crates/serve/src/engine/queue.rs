//! The bounded queue between callers and the engine's thread.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::job::{Job, SubmitError};
use super::states::StateInfo;

/// A job with the moment it came.
pub(super) struct Waiting {
    pub job: Job,
    pub since: Instant,
}

/// What is asked about states; answered between two steps.
pub(super) enum Command {
    List(Box<dyn FnOnce(Vec<StateInfo>) + Send>),
    Delete(String, Box<dyn FnOnce(Result<bool, String>) + Send>),
    Fork {
        from: String,
        to: String,
        tokens: Option<usize>,
        answer: Box<dyn FnOnce(Result<Option<StateInfo>, String>) + Send>,
    },
}

#[derive(Default)]
pub(super) struct Inner {
    pub jobs: VecDeque<Waiting>,
    pub commands: VecDeque<Command>,
    /// Nothing more is taken; the engine ends when it has nothing left.
    pub closed: bool,
    /// Running answers end now.
    pub abort: bool,
}

/// Jobs wait here in the order in which they came.
pub(super) struct Queue {
    inner: Mutex<Inner>,
    wake: Condvar,
    limit: usize,
}

impl Queue {
    pub(super) fn new(limit: usize) -> Self {
        Queue {
            inner: Mutex::default(),
            wake: Condvar::new(),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All jobs or none. What matters is how many wait already: a request for more answers than may wait would otherwise never be
    /// taken.
    pub(super) fn submit(&self, jobs: Vec<Job>) -> Result<(), SubmitError> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(SubmitError::Closed);
        }
        if inner.jobs.len() >= self.limit {
            return Err(SubmitError::Full {
                queued: inner.jobs.len(),
            });
        }
        let since = Instant::now();
        let waiting = |job| Waiting { job, since };
        inner.jobs.extend(jobs.into_iter().map(waiting));
        self.wake.notify_one();
        Ok(())
    }

    /// False when the engine has stopped taking commands.
    pub(super) fn command(&self, command: Command) -> bool {
        let mut inner = self.lock();
        if inner.closed {
            return false;
        }
        inner.commands.push_back(command);
        self.wake.notify_one();
        true
    }

    pub(super) fn close(&self, abort: bool) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.abort |= abort;
        self.wake.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    pub(super) fn waiting(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Takes out whose caller went away, and returns how many these were.
    pub(super) fn drop_gone(&self) -> usize {
        let mut inner = self.lock();
        let before = inner.jobs.len();
        inner.jobs.retain(|waiting| !waiting.job.sink.is_gone());
        before - inner.jobs.len()
    }

    /// Up to `room` jobs, and all commands; waits while there is neither and `idle`. `None` at the end.
    pub(super) fn take(&self, room: usize, idle: bool) -> Option<Taken> {
        let mut inner = self.lock();
        while idle && inner.jobs.is_empty() && inner.commands.is_empty() {
            if inner.closed {
                return None;
            }
            inner = self
                .wake
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let count = room.min(inner.jobs.len());
        Some(Taken {
            jobs: inner.jobs.drain(..count).collect(),
            commands: inner.commands.drain(..).collect(),
            abort: inner.abort,
        })
    }
}

/// What came since the last step.
pub(super) struct Taken {
    pub jobs: Vec<Waiting>,
    pub commands: Vec<Command>,
    pub abort: bool,
}
