//! Work that begins on a worker thread.
//!
//! A parallel loop that a thread outside of the pool begins costs two changes of threads; a token of a small model takes
//! hundreds of loops. Begun on a worker, a loop costs none.

/// Runs `work` on a worker of the thread pool and waits for it. In place, where this thread measures or observes what it
/// runs.
pub fn on_worker<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let bound = crate::adapter::is_portable()
        || crate::meter::is_counting()
        || crate::profile::is_recording()
        || crate::quantised::is_observing();
    match bound {
        true => work(),
        false => rayon::scope(|_| work()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_on_a_worker_unless_this_thread_watches() {
        let worker = || rayon::current_thread_index().is_some();
        assert!(on_worker(worker));
        assert!(!crate::portable(|| on_worker(worker)));
        assert!(!crate::meter::count(|| on_worker(worker)).0);
        assert!(!crate::profile::record(|| on_worker(worker)).0);
        assert!(!crate::quantised::observe(None, || on_worker(worker)).0);
    }
}
