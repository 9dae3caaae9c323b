//! The portable form of the recurrence.

use burn::tensor::Tensor;

use super::{Gate, Write};

/// The equation over time with tensor ops: the portable form.
pub(super) fn composed(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gate: Gate,
    write: Write,
    initial: Option<Tensor<4>>,
    scale: f32,
    offsets: &[usize],
) -> (Tensor<4>, Tensor<4>) {
    let [batch, time, heads, value_dim] = v.dims();
    let [_, _, key_heads, key_dim] = k.dims();
    let total = batch * time;
    // Every query and key head stands once for each head that it serves.
    let spread = |x: Tensor<4>| {
        x.reshape([total, key_heads, 1, key_dim])
            .repeat_dim(2, heads / key_heads)
            .reshape([total, heads, key_dim])
    };
    let (q, k) = (spread(q).mul_scalar(scale), spread(k));
    let v = v.reshape([total, heads, value_dim]);
    let decay: Option<Tensor<3>> = match gate {
        Gate::None => None,
        Gate::Scalar(gate) => Some(gate.reshape([total, heads, 1]).exp()),
        Gate::Vector(gate) => Some(gate.reshape([total, heads, key_dim]).exp()),
    };
    let beta = match write {
        Write::Additive => None,
        Write::Delta(beta) => Some(beta.reshape([total, heads, 1])),
    };
    let at = |x: &Tensor<3>, t: usize| {
        let [_, heads, width] = x.dims();
        x.clone().slice([t..t + 1]).reshape([heads, width])
    };
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for (row, pair) in offsets.windows(2).enumerate() {
        let mut state: Tensor<3> = match &initial {
            Some(initial) => initial
                .clone()
                .slice([row..row + 1])
                .reshape([heads, key_dim, value_dim]),
            None => Tensor::zeros([heads, key_dim, value_dim], &v.device()),
        };
        for t in pair[0]..pair[1] {
            if let Some(decay) = &decay {
                state = state * at(decay, t).unsqueeze_dim(2);
            }
            let key: Tensor<3> = at(&k, t).unsqueeze_dim(2);
            let mut value = at(&v, t);
            if let Some(beta) = &beta {
                let held = (state.clone() * key.clone()).sum_dim(1).squeeze_dim(1);
                value = (value - held) * at(beta, t);
            }
            state = state + key * value.unsqueeze_dim(1);
            let query: Tensor<3> = at(&q, t).unsqueeze_dim(2);
            outputs.push((state.clone() * query).sum_dim(1));
        }
        states.push(state.unsqueeze::<4>());
    }
    let o = match outputs.is_empty() {
        true => v,
        false => Tensor::cat(outputs, 1).swap_dims(0, 1),
    };
    (
        o.reshape([batch, time, heads, value_dim]),
        Tensor::cat(states, 0),
    )
}
