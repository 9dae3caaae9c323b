//! The `anyformer` binary: the allocator and the exit code; everything else is in the library beside it.

use std::process::ExitCode;

use anyformer_kernels::memory::{Counting, keep_freed_pages};

/// A pooling allocator (page faults were a third of a training step without it), counted so that peak memory is exact.
#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

fn main() -> ExitCode {
    keep_freed_pages();
    anyformer_cli::main()
}
