//! Anyformer kernels.
pub mod attention;
pub mod conv;
pub mod scan;
mod disjoint;
pub mod activation;
pub mod adamw;
pub mod cross_entropy;
pub mod embedding;
pub mod math;
pub mod norm;
pub mod pool;
pub mod rope;
pub mod softmax;
mod simd;
#[cfg(test)]
mod testing;
pub mod gemm;
pub mod memory;
pub mod recurrence;
