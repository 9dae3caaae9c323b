//! A mutable slice of which parallel tasks write parts that do not overlap but interleave (one head of every token,
//! one block of channels of every token), which `split_at_mut` cannot express.
#![allow(unsafe_code)]

use std::marker::PhantomData;

/// Shared access to `&mut [f32]`; the tasks promise to write different parts.
pub(crate) struct Disjoint<'a> {
    start: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from a `&mut [f32]` that is borrowed for 'a; access goes through `part`, whose callers
// promise that parts in use at one time do not overlap.
unsafe impl Send for Disjoint<'_> {}
// SAFETY: as above.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Disjoint {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            life: PhantomData,
        }
    }

    /// Room for `len` values that nobody zeroed, in an empty vector, whose length is set when all are written.
    ///
    /// # Safety
    /// Of each part nothing is read before it is written.
    pub(crate) unsafe fn unwritten(values: &'a mut Vec<f32>, len: usize) -> Self {
        values.reserve_exact(len);
        // Tests see what a kernel forgets.
        if cfg!(test) {
            values.resize(len, f32::NAN);
            values.clear();
        }
        Disjoint {
            start: values.as_mut_ptr(),
            len,
            life: PhantomData,
        }
    }

    /// The values `from..from + len`; panics when they are out of bounds.
    ///
    /// # Safety
    /// While the result lives nobody else may hold a part that overlaps it.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [f32] {
        assert!(
            from <= self.len && len <= self.len - from,
            "part {from}+{len} of {} values",
            self.len
        );
        // SAFETY: in bounds as just checked; no overlap by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}
