//! A parameter's values in a form that only linear layers read: of 8 or 4 bits, or in the order of their products.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use anyformer_kernels::matmul::{Panelled, Precision};
use anyformer_kernels::memory::give_back_freed_pages;
use anyformer_kernels::quant::Packed;
use burn::tensor::Device;

use super::held::Held;
use super::{Param, WrongSize};
use crate::adapter::{device_is_cpu, erase, with_values};
use crate::recompute;

impl Param {
    /// Holds the values packed from now on, of 8 or 4 bits: for inference, and of a matrix. They are widened where anything
    /// but a linear layer asks for them.
    pub fn pack(&self, packed: Packed) -> Result<(), WrongSize> {
        if self.shape() != packed.shape() {
            return Err(WrongSize {
                name: self.name().to_string(),
                shape: self.shape().to_vec(),
                expected: self.count(),
                got: packed.shape().iter().product(),
            });
        }
        let mut guard = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        let device = match guard.as_ref() {
            Some(Held::Dense(value)) => value.device(),
            Some(Held::Packed(_, device) | Held::Panelled(_, device) | Held::Unset(_, device)) => {
                device.clone()
            }
            None => panic!("{} was built without a device", self.name()),
        };
        *guard = Some(Held::Packed(Arc::new(packed), device));
        Ok(())
    }

    /// Whether a layer with this weight packed rounds its inputs.
    pub(crate) fn rounds_inputs(&self) -> bool {
        self.0.rounds.load(Ordering::Relaxed)
    }

    /// The packed values, where they are.
    pub fn packed(&self) -> Option<Arc<Packed>> {
        self.packed_on().map(|(packed, _)| packed)
    }

    /// As [`Param::packed`], with the device for new tensors.
    pub(crate) fn packed_on(&self) -> Option<(Arc<Packed>, Device)> {
        let guard = self.0.value.read().unwrap_or_else(PoisonError::into_inner);
        match guard.as_ref()? {
            Held::Dense(_) | Held::Panelled(..) | Held::Unset(..) => None,
            Held::Packed(packed, device) => {
                let tracking = self.0.tracking.load(Ordering::Relaxed) && !recompute::off_record();
                let device = match tracking || !device.is_autodiff() {
                    true => device.clone(),
                    false => device.clone().inner(),
                };
                Some((packed.clone(), device))
            }
        }
    }

    /// Holds the values of a matrix from now on, rounded as `precision` says, in the order in which products on the CPU read them,
    /// so that none packs them again: for inference. Nothing is done where the values are packed already or may be trained, the
    /// device is not the CPU, or this machine has no such products; anything but a linear layer then gets a copy.
    pub fn panel(&self, precision: Precision) {
        let Ok([out, width]) = <[usize; 2]>::try_from(self.0.shape.clone()) else {
            return;
        };
        let mut guard = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        let Some(Held::Dense(value)) = guard.as_ref() else {
            return;
        };
        let device = value.device();
        if device.is_autodiff() || !device_is_cpu(&device) {
            return;
        }
        let shape = [out, width];
        let panels = with_values(erase(value.clone()), |values| {
            Panelled::new(precision, shape, values)
        });
        if let Some(panels) = panels {
            let panelled = Some(Held::Panelled(Arc::new(panels), device));
            // Beside a model of some hundred megabytes what these leave behind is a seventh.
            give_back_freed_pages(|| *guard = panelled);
        }
    }

    /// The values in the order of products, where [`Param::panel`] has put them so.
    pub(crate) fn panelled(&self) -> Option<Arc<Panelled>> {
        let guard = self.0.value.read().unwrap_or_else(PoisonError::into_inner);
        match guard.as_ref()? {
            Held::Panelled(panels, _) => Some(panels.clone()),
            _ => None,
        }
    }
}
