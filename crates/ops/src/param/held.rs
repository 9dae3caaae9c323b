//! In what form a parameter holds its values.

use std::sync::Arc;

use anyformer_kernels::matmul::Panelled;
use anyformer_kernels::quant::Packed;
use burn::tensor::{Device, Tensor};

use super::leaf;

/// The values, in one of four forms.
#[derive(Debug)]
pub(super) enum Held {
    Dense(Tensor<1>),
    /// Of 8 or 4 bits, on this device where they are widened.
    Packed(Arc<Packed>, Device),
    /// In the order in which products read them, on this device where anything else asks for them.
    Panelled(Arc<Panelled>, Device),
    /// All 0, without memory for it.
    Unset(usize, Device),
}

impl Held {
    /// The values as f32, untracked where they are packed.
    pub(super) fn dense(&self) -> Tensor<1> {
        match self {
            Held::Dense(value) => value.clone(),
            Held::Packed(packed, device) => {
                let values = packed.widened(0..packed.shape()[0]);
                leaf(values, device, false)
            }
            Held::Panelled(panels, device) => leaf(panels.rows(), device, false),
            Held::Unset(count, device) => leaf(vec![0.0; *count], device, false),
        }
    }
}
