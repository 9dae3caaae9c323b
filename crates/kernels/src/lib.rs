//! Anyformer kernels.
pub mod activation;
pub mod adamw;
pub mod attention;
pub mod bf16;
pub mod conv;
pub mod cross_entropy;
pub mod diagonal;
mod disjoint;
pub mod dropout;
pub mod embedding;
pub mod feature_attention;
pub mod fourier;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod gemm;
pub mod glu;
pub mod instructions;
pub mod inverse;
pub mod largest;
pub mod long_conv;
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
pub mod sinkhorn;
pub mod softmax;
#[cfg(any(test, fuzzing))]
mod testing;
mod transpose;
