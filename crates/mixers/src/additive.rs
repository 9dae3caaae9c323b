//! Linear attention over features that a mixer has made: causal with a carried state, or looking both ways. The mixers
//! linear_attention, performer and cosformer differ in their features only.

use anyformer_ops::recurrence::{
    Gate, RecurrenceOptions, Write, guard_divisor, linear_recurrence, recurrence_flops,
};
use anyformer_ops::{Tensor, meter};

use crate::mixer::{Context, Cost, State};

/// `o_i = scale phi(q_i) sum_(j <= i) phi(k_j)^T v_j`, divided by `scale phi(q_i) . sum phi(k_j)` where `normalise` is set.
/// Features `[batch, time, heads, features]`, values `[batch, time, heads, value_dim]`. State: `kv [sequences, heads, features,
/// value_dim]` and, where normalised, `z [sequences, heads, features]`; given back where the context asks for it.
pub(crate) fn causal(
    [q, k, v]: [Tensor<4>; 3],
    scale: f32,
    normalise: bool,
    context: &Context,
    state: Option<&State>,
) -> (Tensor<4>, Option<State>) {
    let [batch, time, _, value_dim] = v.dims();
    let options = RecurrenceOptions {
        scale,
        offsets: context.offsets.clone(),
        normaliser: normalise,
        ..RecurrenceOptions::default()
    };
    let initial = state.map(|state| {
        let kv: Tensor<4> = state.get("kv");
        match normalise {
            true => Tensor::cat(vec![kv, state.get::<3>("z").unsqueeze_dim(3)], 3),
            false => kv,
        }
    });
    let (o, last) = linear_recurrence(q, k, v, Gate::None, Write::Additive, initial, &options);
    let next = context.keep_state.then(|| {
        let state = State::new(context.times_after(batch, time, state));
        match normalise {
            true => {
                let parts = last.split_with_sizes(vec![value_dim, 1], 3);
                let z: Tensor<3> = parts[1].clone().squeeze_dim(3);
                state.with("kv", parts[0].clone()).with("z", z)
            }
            false => state.with("kv", last),
        }
    });
    (o, next)
}

/// Operations over one sequence and bytes of the state, of [`causal`] or else of [`both_ways`]; `width` counts the
/// normaliser's column.
pub(crate) fn cost(causal: bool, time: usize, heads: usize, features: usize, width: usize) -> Cost {
    let (flops, state) = match causal {
        true => (
            recurrence_flops(time, heads, features, width, false),
            heads * features * width,
        ),
        false => (both_ways_flops(time, heads, features, width), 0),
    };
    Cost {
        params: 0,
        flops,
        state_bytes: 4 * state as u64,
    }
}

/// Linear attention that looks both ways: `o = phi(q) (sum phi(k)^T v)`, divided by `phi(q) . sum phi(k)` where
/// `normalise` is set. Features `[batch, time, heads, features]`, values `[batch, time, heads, value_dim]`; each packed
/// sequence is summed on its own.
pub(crate) fn both_ways(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    normalise: bool,
    offsets: Option<&[usize]>,
) -> Tensor<4> {
    let one = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| {
        let [_, time, heads, features] = q.dims();
        let v = v.permute([0, 2, 1, 3]);
        let v = match normalise {
            true => {
                let ones = v.clone().slice([0..v.dims()[0], 0..heads, 0..time, 0..1]);
                Tensor::cat(vec![v, ones.ones_like()], 3)
            }
            false => v,
        };
        let width = v.dims()[3];
        meter::add(both_ways_flops(time, heads, features, width) * q.dims()[0] as u64);
        let sum = k.permute([0, 2, 3, 1]).matmul(v);
        let o = q.permute([0, 2, 1, 3]).matmul(sum);
        let o = match normalise {
            true => {
                let parts = o.split_with_sizes(vec![width - 1, 1], 3);
                parts[0].clone() / guard_divisor(parts[1].clone())
            }
            false => o,
        };
        o.permute([0, 2, 1, 3])
    };
    match offsets {
        None => one(q, k, v),
        Some(offsets) => {
            let pairs = offsets.windows(2).filter(|pair| pair[1] > pair[0]);
            let piece = |x: &Tensor<4>, pair: &[usize]| x.clone().slice([0..1, pair[0]..pair[1]]);
            let rows = pairs.map(|pair| one(piece(&q, pair), piece(&k, pair), piece(&v, pair)));
            Tensor::cat(rows.collect(), 1)
        }
    }
}

/// Operations of [`both_ways`] over one sequence; `width` counts the normaliser's column.
fn both_ways_flops(time: usize, heads: usize, features: usize, width: usize) -> u64 {
    4 * (time * heads * features * width) as u64
}
