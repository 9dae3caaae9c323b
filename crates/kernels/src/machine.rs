//! What the machine can do at most: the figures that a profile is held against.

use std::time::Instant;

use rayon::prelude::*;

use crate::gemm::Matrix;
use crate::matmul::{Finish, Precision, matmul};

/// Runs of which the fastest counts.
const RUNS: usize = 7;

fn fastest(mut work: impl FnMut()) -> f64 {
    (0..RUNS)
        .map(|_| {
            let began = Instant::now();
            work();
            began.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// Operations per second of our own product of two square matrices of 1,024 rows, on the threads of the current pool.
pub fn product_peak(precision: Precision) -> f64 {
    let n = 1024;
    let (a, b, mut out) = (vec![0.5; n * n], vec![0.25; n * n], vec![0.0; n * n]);
    let (left, right) = (Matrix::rows(&a, n), Matrix::rows(&b, n));
    let finish = Finish::default();
    let seconds = fastest(|| matmul(precision, [n; 3], left, right, &mut out, finish));
    2.0 * (n * n * n) as f64 / seconds
}

/// Bytes per second of the triad of the STREAM benchmark, `a = b + 3 c`, over arrays of 128 MiB; the line that a store
/// first reads is not counted, as there.
pub fn triad_peak() -> f64 {
    let n = 32 << 20;
    let (b, c, mut a) = (vec![1.0f32; n], vec![2.0f32; n], vec![0.0f32; n]);
    let part = n / rayon::current_num_threads().max(1);
    let seconds = fastest(|| {
        a.par_chunks_mut(part.max(1))
            .zip(b.par_chunks(part.max(1)))
            .zip(c.par_chunks(part.max(1)))
            .for_each(|((a, b), c)| {
                for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
                    *a = *b + 3.0 * c;
                }
            });
    });
    std::hint::black_box(&a);
    12.0 * n as f64 / seconds
}
