//! Linear layers whose weight is of 8 or 4 bits, and what a layer's inputs look like.
//!
//! A parameter may hold its values packed ([`crate::Param::pack`]): a [`crate::Linear`] then multiplies with them as they are,
//! and everything else sees them widened to f32. Packed values are for inference: gradients go through such a layer to its
//! inputs and its bias, and no further.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyformer_kernels::gemm::Matrix;
use anyformer_kernels::matmul::{Precision, column_sums};
pub use anyformer_kernels::quant;
use burn::tensor::Tensor;
use quant::Packed;
use quant::gptq::Inputs;

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase};

/// Inputs: `x [rows, in]` and, for layers with one, `bias [out]`.
#[derive(Debug)]
struct Quantised {
    weight: Arc<Packed>,
    precision: Precision,
    /// Inputs are rounded to 8 bits.
    rounds: bool,
}

impl Kernel for Quantised {
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let [out, width] = self.weight.shape();
        let once = 2 * (inputs[0].shape[0] * out * width) as u64;
        [once, once]
    }

    fn own_bytes(&self) -> u64 {
        self.weight.bytes() as u64
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let x = inputs[0];
        let bias = inputs.get(1).map(|bias| bias.data);
        let product = match self.rounds {
            true => quant::rounded_product,
            false => quant::product,
        };
        let y = product(self.precision, x.data, &self.weight, bias);
        output(&[x.shape[0], self.weight.shape()[0]], y)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (x, dy) = (inputs[0], only(grads).data);
        let [out, width] = self.weight.shape();
        let weight = self.weight.widened(0..out);
        let dx = anyformer_kernels::matmul::product(
            self.precision,
            [x.shape[0], out, width],
            Matrix::rows(dy, out),
            Matrix::rows(&weight, width),
            None,
        );
        let bias = inputs
            .get(1)
            .map(|_| Some(Array::new([out], column_sums(dy, out))));
        [Some(Array::new(x.shape, dx))]
            .into_iter()
            .chain(bias)
            .collect()
    }
}

/// `x Wᵀ + b` for `x [rows, in]` and a packed weight `[out, in]`, on the CPU.
pub(crate) fn quantised_linear(
    x: Tensor<2>,
    weight: Arc<Packed>,
    bias: Option<Tensor<1>>,
    precision: Precision,
    rounds: bool,
) -> Tensor<2> {
    let layer = Quantised {
        weight,
        precision,
        rounds,
    };
    match bias {
        Some(bias) => single(layer, [erase(x), erase(bias)]),
        None => single(layer, [erase(x)]),
    }
}

/// What [`observe`] gathers, and of which layers (`None`: their names only).
struct Seen {
    wanted: Option<BTreeSet<String>>,
    inputs: BTreeMap<String, Inputs>,
}

thread_local! {
    static SEEN: RefCell<Option<Seen>> = const { RefCell::new(None) };
}

/// Runs `work` and tells, by the names of their weights, what the inputs of the linear layers were that this thread ran: those
/// of the weights in `wanted`, or of none, when only the names are asked for.
pub fn observe<T>(
    wanted: Option<BTreeSet<String>>,
    work: impl FnOnce() -> T,
) -> (T, BTreeMap<String, Inputs>) {
    let inputs = BTreeMap::new();
    let before = SEEN.with(|seen| seen.replace(Some(Seen { wanted, inputs })));
    let result = work();
    let seen = SEEN.with(|seen| seen.replace(before));
    (result, seen.map(|seen| seen.inputs).unwrap_or_default())
}

/// Whether this thread observes.
pub(crate) fn is_observing() -> bool {
    SEEN.with(|seen| seen.borrow().is_some())
}

/// Shows the rows of a layer to whoever observes.
pub(crate) fn show<const D: usize>(name: &str, x: &Tensor<D>) {
    SEEN.with(|seen| {
        let mut seen = seen.borrow_mut();
        let Some(seen) = seen.as_mut() else { return };
        let width = x.dims()[D - 1];
        match &seen.wanted {
            None => {
                let none = || Inputs::new(0);
                seen.inputs.entry(name.to_string()).or_insert_with(none);
            }
            Some(wanted) if wanted.contains(name) => {
                let values = crate::tensor_values(x.clone());
                let entry = seen.inputs.entry(name.to_string());
                entry.or_insert_with(|| Inputs::new(width)).add(&values);
            }
            Some(_) => {}
        }
    });
}

#[cfg(test)]
mod tests {
    use super::quant::round::{Scheme, nearest};
    use super::*;
    use crate::check::{close, values};
    use crate::{Builder, Device, Linear, portable, tensor_values};

    fn layer(device: &Device, bias: bool) -> (Linear, Vec<f32>) {
        let layer = Linear::new(&Builder::new(device, 0), "layer", 40, 24, bias);
        let scheme = Scheme {
            bits: quant::Bits::Four,
            group: 8,
            zeros: true,
        };
        let quants = nearest(scheme, [24, 40], &layer.weight.values()).expect("fits");
        let packed = Packed::new(&quants).expect("fits");
        let widened = packed.widened(0..24);
        layer.weight.pack(packed).expect("of its shape");
        (layer, widened)
    }

    #[test]
    fn a_packed_layer_is_the_layer_of_the_widened_weight() {
        let device = Device::flex();
        let (layer, widened) = layer(&device, true);
        assert_eq!(layer.weight.values(), widened);
        let x = || {
            Tensor::<3>::from_data(
                burn::tensor::TensorData::new(values(3, 2 * 3 * 40), [2, 3, 40]),
                &device,
            )
        };
        let got = tensor_values(layer.forward(x()));
        let composed = portable(|| tensor_values(layer.forward(x())));
        close("composed", &got, &composed, 1e-5);
        layer.weight.set(widened).expect("as many");
        assert!(layer.weight.packed().is_none());
        close("dense", &got, &tensor_values(layer.forward(x())), 1e-5);
    }

    #[test]
    fn inputs_are_rounded_where_that_is_asked_for() {
        let device = Device::flex();
        let builder = Builder::new(&device, 0);
        let layer = Linear::new(&builder, "layer", 64, 24, true);
        let scheme = Scheme {
            bits: quant::Bits::Four,
            group: 32,
            zeros: false,
        };
        let quants = nearest(scheme, [24, 64], &layer.weight.values()).expect("fits");
        layer
            .weight
            .pack(Packed::new(&quants).expect("fits"))
            .expect("of its shape");
        let x = Tensor::<1>::from_data(values(3, 5 * 64).as_slice(), &device).reshape([5, 64]);
        let exact = tensor_values(layer.forward(x.clone()));
        builder.store().round_inputs(true);
        let near = tensor_values(layer.forward(x.clone()));
        assert_ne!(near, exact);
        close("near", &near, &exact, 0.02);
        builder.store().round_inputs(false);
        assert_eq!(tensor_values(layer.forward(x)), exact);
    }

    #[test]
    fn gradients_reach_the_inputs_and_not_the_weight() {
        let device = Device::flex().autodiff();
        let (layer, widened) = layer(&device, true);
        let x = Tensor::<2>::from_data(
            burn::tensor::TensorData::new(values(3, 80), [2, 40]),
            &device,
        )
        .require_grad();
        let mut gradients = layer.forward(x.clone()).sum().backward();
        let dx = tensor_values(x.grad(&gradients).expect("tracked"));
        let sums: Vec<f32> = (0..40)
            .map(|at| (0..24).map(|row| widened[row * 40 + at]).sum())
            .collect();
        close("dx", &dx[..40], &sums, 1e-5);
        assert_eq!(layer.weight.gradient(&mut gradients), None);
        let bias = layer.bias.as_ref().expect("has one");
        assert_eq!(bias.gradient(&mut gradients), Some(vec![2.0; 24]));
    }

    #[test]
    fn inputs_are_seen_of_the_layers_that_are_asked_for() {
        let device = Device::flex();
        let (layer, _) = layer(&device, false);
        let other = Linear::new(&Builder::new(&device, 0), "other", 24, 2, false);
        let x = Tensor::<2>::ones([5, 40], &device);
        let both = || other.forward(layer.forward(x.clone()));
        let names: Vec<String> = observe(None, both).1.into_keys().collect();
        assert_eq!(names, ["layer.weight", "other.weight"]);
        let wanted = BTreeSet::from(["layer.weight".to_string()]);
        let seen = observe(Some(wanted), || (both(), both())).1;
        let inputs = &seen["layer.weight"];
        assert_eq!(
            (seen.len(), inputs.rows, inputs.products[41]),
            (1, 10, 10.0)
        );
        both();
        assert!(observe(None, || ()).1.is_empty());
    }
}
