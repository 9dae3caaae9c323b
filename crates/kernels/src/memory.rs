//! An allocator that counts: how many bytes are allocated now, and the most since the peak was last reset.
//!
//! The binary wraps its allocator in [`Counting`], so that peak memory is exact and the same in every run, which resident
//! size as the system reports it is not. Tensors, scratch and everything else on the heap are counted.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// An allocator with counters around it; use it as `#[global_allocator]`.
#[derive(Debug, Default)]
pub struct Counting<A>(pub A);

/// Bytes allocated now; zero when no [`Counting`] allocator is installed.
pub fn allocated() -> usize {
    NOW.load(Relaxed)
}

/// Most bytes allocated at once since [`reset_peak`]; zero when no [`Counting`] allocator is installed.
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

/// Starts a new measurement of the peak.
pub fn reset_peak() {
    PEAK.store(NOW.load(Relaxed), Relaxed);
}

/// `mi_option_purge_delay` of mimalloc.h, versions 2 and 3, for which the bindings have no name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Tells mimalloc to keep freed pages for the next allocation. By default it gives them back to the system after 10 ms, and
/// a training step then faults its activations in again, page by page. Without effect on other allocators.
pub fn keep_freed_pages() {
    // SAFETY: sets a number in a table of the allocator that holds this index; it may be called at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// Runs `work`, whose freed pages mimalloc gives back to the system at once: for large arrays that are let go for good, whose place
/// in memory others would take only by chance. Without effect on other allocators.
pub fn give_back_freed_pages<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: reads a number out of the same table.
    let before = unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
    // SAFETY: as above.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 0) };
    let result = work();
    // SAFETY: as above.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, before) };
    result
}

fn grown(bytes: usize) {
    let now = NOW.fetch_add(bytes, Relaxed) + bytes;
    if now > PEAK.load(Relaxed) {
        PEAK.fetch_max(now, Relaxed);
    }
}

// SAFETY: every call is handed on unchanged to the inner allocator, which keeps the contract; the counters neither
// allocate nor touch the memory.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`.
        let pointer = unsafe { self.0.alloc(layout) };
        if !pointer.is_null() {
            grown(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        let pointer = unsafe { self.0.alloc_zeroed(layout) };
        if !pointer.is_null() {
            grown(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { self.0.dealloc(pointer, layout) };
        NOW.fetch_sub(layout.size(), Relaxed);
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `realloc`.
        let moved = unsafe { self.0.realloc(pointer, layout, size) };
        if !moved.is_null() {
            grown(size);
            NOW.fetch_sub(layout.size(), Relaxed);
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::alloc::System;

    #[test]
    fn counts_what_is_held_and_the_most_that_was() {
        let counting = Counting(System);
        let layout = Layout::from_size_align(1 << 20, 64).expect("a valid layout");
        let before = allocated();
        reset_peak();
        // SAFETY: the layout is not empty, and the pointer is given back with the layout it was made with.
        unsafe {
            let pointer = counting.alloc(layout);
            assert!(!pointer.is_null());
            assert_eq!(allocated() - before, 1 << 20);
            counting.dealloc(pointer, layout);
        }
        assert_eq!(allocated(), before);
        assert!(peak() >= before + (1 << 20));
    }
}
