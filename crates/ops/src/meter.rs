//! Counts the floating-point operations that ops perform, so that declared costs can be checked against counted ones.
//!
//! One multiply-add counts as two. Matrix products and sequence-mixing kernels report; elementwise work (norms,
//! activations, gates) does not, as is usual in published counts.

use std::cell::Cell;

thread_local! {
    static COUNT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Adds `flops` to the running count, if one is running on this thread.
pub fn add(flops: u64) {
    COUNT.with(|count| count.set(count.get().map(|total| total + flops)));
}

/// Runs `work` without counting what it does: its caller says it.
pub fn apart<T>(work: impl FnOnce() -> T) -> T {
    let before = COUNT.with(|count| count.replace(None));
    let result = work();
    COUNT.with(|count| count.set(before));
    result
}

/// Whether this thread counts.
pub(crate) fn is_counting() -> bool {
    COUNT.with(|count| count.get().is_some())
}

/// Runs `work` and returns its result with the operations that it reported.
pub fn count<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = COUNT.with(|count| count.replace(Some(0)));
    let result = work();
    let flops = COUNT.with(|count| count.replace(before)).unwrap_or(0);
    (result, flops)
}
