//! Which instructions the kernels of a thread may use: those that the machine has, or fewer where a test or a measurement
//! says so.
//!
//! Most kernels are plain loops that the compiler vectorises for AVX-512, for AVX2 with FMA and for the target's baseline; the
//! form is chosen when a loop is called. A few loops are written with AVX-512 intrinsics; where those may not be used, the
//! plain loop or the `gemm` crate does the work. There is no code of our own for NEON: it is the baseline of aarch64, so the
//! plain loops use it, and the `gemm` crate has its own.

use std::cell::Cell;

use rayon::ThreadPoolBuilder;

/// A set of instructions; each holds those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instructions {
    /// What every processor of the target has: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// AVX2 and FMA (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL (x86-64-v4).
    Avx512,
}

thread_local! {
    static LIMIT: Cell<Instructions> = const { Cell::new(Instructions::Avx512) };
}

impl Instructions {
    /// The most that this machine has.
    pub fn best() -> Self {
        use Instructions::{Avx2, Avx512, Portable};
        let more = [Avx512, Avx2].into_iter().find(|level| level.present());
        more.unwrap_or(Portable)
    }

    /// All that this machine has, the fewest first.
    pub fn all() -> Vec<Self> {
        use Instructions::{Avx2, Avx512, Portable};
        let known = [Portable, Avx2, Avx512];
        known.into_iter().filter(|level| level.present()).collect()
    }

    /// Lets the kernels that the calling thread runs use no more than these. Loops over many threads ask each of their own: give
    /// it to the start handler of a pool.
    pub fn limit_this_thread(self) {
        LIMIT.set(self);
    }

    /// Runs `work` on a pool of `threads` threads that use no more than these instructions.
    ///
    /// Panics when the threads cannot be made.
    pub fn run<T: Send>(self, threads: usize, work: impl FnOnce() -> T + Send) -> T {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .start_handler(move |_| self.limit_this_thread())
            .build();
        match pool {
            Ok(pool) => pool.install(work),
            Err(error) => panic!("failed to start {threads} threads: {error}"),
        }
    }

    /// Whether the calling thread may use these and the machine has them.
    #[inline]
    pub(crate) fn usable(self) -> bool {
        self <= LIMIT.get() && self.present()
    }

    #[inline]
    fn present(self) -> bool {
        match self {
            Instructions::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => pulp::x86::V3::is_available(),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => pulp::x86::V4::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

/// Runs `work` compiled for the most instructions that the calling thread may use.
#[inline(always)]
pub(crate) fn dispatch<F: pulp::NullaryFnOnce>(work: F) -> F::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if Instructions::Avx512 <= LIMIT.get()
            && let Some(wide) = pulp::x86::V4::try_new()
        {
            return wide.vectorize(work);
        }
        if Instructions::Avx2 <= LIMIT.get()
            && let Some(middle) = pulp::x86::V3::try_new()
        {
            return middle.vectorize(work);
        }
    }
    work.call()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_on_every_thread_of_its_pool_and_nowhere_else() {
        use rayon::prelude::*;
        for level in Instructions::all() {
            level.run(2, || {
                (0..64).into_par_iter().for_each(|_| {
                    for other in Instructions::all() {
                        assert_eq!(other.usable(), other <= level);
                    }
                });
            });
        }
        assert!(Instructions::best().usable());
        assert_eq!(Instructions::all().last(), Some(&Instructions::best()));
    }
}
