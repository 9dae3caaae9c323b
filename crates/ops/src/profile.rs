//! Where the time of a thread goes: seconds, calls, bytes and operations of each kernel, forward and backward.
//!
//! Off unless [`record`] runs. A kernel's bytes are those of the arrays that it reads and writes, each counted once; its
//! operations are what [`crate::Kernel::flops`] says. What tensor operations outside of kernels take is not seen here:
//! the difference to the time of the whole.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Instant;

/// A direction of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// Inputs to outputs.
    Forward,
    /// Gradients of outputs to those of inputs.
    Backward,
    /// The optimiser's update.
    Update,
}

impl Pass {
    /// As tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::Update => "update",
        }
    }
}

/// What one kernel took in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Took {
    /// How often it ran.
    pub calls: u64,
    /// Wall-clock time.
    pub seconds: f64,
    /// Read and written.
    pub bytes: u64,
    /// Additions and multiplications, where the kernel counts them; else 0.
    pub flops: u64,
}

thread_local! {
    static TAKEN: RefCell<Option<BTreeMap<(&'static str, Pass), Took>>> = const { RefCell::new(None) };
}

/// Runs `work` and tells what the kernels that this thread called took, by name and direction.
pub fn record<T>(work: impl FnOnce() -> T) -> (T, BTreeMap<(&'static str, Pass), Took>) {
    let before = TAKEN.with(|taken| taken.replace(Some(BTreeMap::new())));
    let result = work();
    let taken = TAKEN.with(|taken| taken.replace(before));
    (result, taken.unwrap_or_default())
}

/// Runs `work` as a call of `name`; `size` gives the bytes and operations, asked for only while something records.
pub fn span<T>(
    name: &'static str,
    pass: Pass,
    size: impl FnOnce(&T) -> [u64; 2],
    work: impl FnOnce() -> T,
) -> T {
    if TAKEN.with(|taken| taken.borrow().is_none()) {
        return work();
    }
    let began = Instant::now();
    let result = work();
    let seconds = began.elapsed().as_secs_f64();
    let [bytes, flops] = size(&result);
    TAKEN.with(|taken| {
        if let Some(taken) = taken.borrow_mut().as_mut() {
            let took = taken.entry((name, pass)).or_default();
            took.calls += 1;
            took.seconds += seconds;
            took.bytes += bytes;
            took.flops += flops;
        }
    });
    result
}

/// Whether this thread records.
pub(crate) fn is_recording() -> bool {
    TAKEN.with(|taken| taken.borrow().is_some())
}

/// The last part of a type's name.
pub(crate) fn short(name: &'static str) -> &'static str {
    name.rsplit("::").next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Builder, Device, Linear, Tensor};

    #[test]
    fn a_linear_layer_is_seen_in_both_directions_and_only_while_recording() {
        let device = Device::flex().autodiff();
        let layer = Linear::new(&Builder::new(&device, 0), "layer", 5, 3, true);
        let x = Tensor::<2>::ones([7, 5], &device);
        let (_, taken) = record(|| layer.forward(x.clone()).sum().backward());
        let forward = taken[&("Affine", Pass::Forward)];
        assert_eq!((forward.calls, forward.flops), (1, 2 * 7 * 5 * 3));
        assert_eq!(forward.bytes, 4 * (7 * 5 + 5 * 3 + 3 + 7 * 3));
        let backward = taken[&("Affine", Pass::Backward)];
        assert_eq!(backward.flops, 2 * forward.flops);
        // x, the weight, the bias and the gradient are read; three gradients are written.
        assert_eq!(backward.bytes, 4 * (2 * (7 * 5 + 5 * 3 + 3) + 7 * 3));
        layer.forward(x);
        assert!(record(|| ()).1.is_empty());
    }
}
