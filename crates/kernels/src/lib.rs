//! Anyformer kernels.
pub mod activation;
pub mod adamw;
pub mod attention;
pub mod bf16;
pub mod conv;
pub mod cross_entropy;
pub mod diagonal;
mod disjoint;
pub mod embedding;
pub mod feature_attention;
pub mod gemm;
pub mod glu;
pub mod inverse;
pub mod machine;
pub mod math;
pub mod matmul;
pub mod memory;
pub mod norm;
pub mod pool;
pub mod quant;
pub mod recurrence;
pub mod rope;
pub mod scan;
mod simd;
pub mod softmax;
#[cfg(test)]
mod testing;
mod transpose;
