//! Threads, device and Ctrl-C: what is chosen once for the whole process.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};

use anyformer_ops::Device;
use anyhow::Context;

use crate::args::Global;
use crate::exit::{Failure, INTERRUPTED, Kind};

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Starts the worker threads: `--threads`, else what the run says, else all cores. Returns the number.
///
/// The calling thread is one of them. So a parallel loop that it begins needs no change of threads, and its first half runs
/// here every time: what one kernel left in this core's caches the next one finds there.
pub fn start_threads(global: &Global, run: Option<usize>) -> Result<usize, Failure> {
    start(global, run, rayon::ThreadPoolBuilder::use_current_thread)
}

/// As [`start_threads`], for a calling thread that is going to wait while others compute: it is none of them.
pub fn start_threads_beside(global: &Global) -> Result<usize, Failure> {
    start(global, None, |pool| pool)
}

fn start(
    global: &Global,
    run: Option<usize>,
    with: impl FnOnce(rayon::ThreadPoolBuilder) -> rayon::ThreadPoolBuilder,
) -> Result<usize, Failure> {
    let asked = global
        .threads
        .map(usize::from)
        .or(run)
        .filter(|threads| *threads > 0);
    let threads = asked.unwrap_or_else(cores);
    with(rayon::ThreadPoolBuilder::new().num_threads(threads))
        .build_global()
        .with_context(|| format!("start {threads} worker threads"))
        .broken()?;
    Ok(threads)
}

/// The name of the device: `--device`, else what the run says, else the CPU.
pub fn device_name(global: &Global, run: Option<&str>) -> String {
    global
        .device
        .as_deref()
        .or(run)
        .unwrap_or("cpu")
        .to_string()
}

/// The device of that name, without autodiff.
pub fn device(name: &str) -> Result<Device, Failure> {
    anyformer_ops::device(name).input()
}

/// Calls `stop` at the first Ctrl-C (or polite kill); the second ends the process at once.
pub fn stop_on_signal(stop: impl Fn() + Send + 'static) -> Result<(), Failure> {
    let seen = AtomicBool::new(false);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
        stop();
    })
    .context("listen for Ctrl-C")
    .broken()
}
