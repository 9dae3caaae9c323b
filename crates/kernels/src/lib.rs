//! Anyformer kernels.
