//! The perceptron of `fire`.

use anyformer_ops::activation::relu;
use anyformer_ops::{Device, Linear, Param, Tensor, meter};

/// FIRE's perceptron over every pair.
pub(super) fn fire(
    w1: &Linear,
    w2: &Linear,
    scales: &Param,
    heads: usize,
    queries: usize,
    keys: usize,
    device: &Device,
) -> Tensor<3> {
    let numbers = |values: Vec<f32>| Tensor::<1>::from_data(values.as_slice(), device);
    let scales = scales.tensor::<1>().exp();
    let (c, longest) = (scales.clone().narrow(0, 0, 1), scales.narrow(0, 1, 1));
    let place = |query: usize| (keys - queries + query) as f32;
    let back = (0..queries * keys)
        .map(|at| (place(at / keys) - (at % keys) as f32).max(0.0))
        .collect();
    let back = numbers(back).reshape([queries, keys]);
    let here = numbers((0..queries).map(place).collect());
    // max(i, L), its gradient going to L where L is larger.
    let limit = relu(longest.clone() - here.clone()) + here;
    let wide = c.clone().reshape([1, 1]);
    let top = (back * wide + 1.0).log();
    let below = (limit * c + 1.0).log().reshape([queries, 1]);
    let inputs = (top / below).reshape([1, queries * keys, 1]);
    // Biases of pairs are elementwise work: their operations are not counted.
    let pairs = meter::apart(|| w2.forward(relu(w1.forward(inputs))));
    pairs.reshape([queries, keys, heads]).permute([2, 0, 1])
}
