//! Differentiable ops over burn tensors: for each a naive twin, a CPU kernel and a composed form that runs on any
//! burn backend. The only crate of the workspace that names a backend.

pub mod activation;
pub mod adapter;
pub mod attention;
pub mod cache;
#[cfg(test)]
pub(crate) mod check;
pub mod conv;
pub mod device;
pub mod diagonal;
pub mod dropout;
pub mod embedding;
pub mod feature_attention;
pub mod fourier;
pub mod inverse;
pub mod lengths;
pub mod linear;
pub mod long_conv;
pub mod loss;
pub mod meter;
pub mod nearest;
pub mod norm;
pub mod param;
pub mod pool;
pub mod profile;
pub mod quantised;
pub mod recompute;
pub mod recurrence;
pub mod rope;
pub mod scan;
pub mod sinkhorn;
pub mod workers;

pub use adapter::{
    Array, Erased, Forward, Kernel, View, apply, device_is_cpu, erase, on_cpu, portable,
};
pub use burn::tensor::{Device, Gradients, Int, Tensor};
pub use device::{DeviceError, device, has_gpu};
pub use linear::{Linear, Precision, linear};
pub use param::{Builder, Init, LinearInit, Param, ParamStore, tensor_values};
