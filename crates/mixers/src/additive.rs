//! Linear attention over features of queries and keys: causal with a carried state, or looking both ways. The mixers
//! linear_attention, performer and cosformer differ in their features only.

use anyformer_ops::Tensor;
use anyformer_ops::feature_attention::{
    FeatureMap, Side, feature_attention, feature_attention_flops,
};
use anyformer_ops::recurrence::{
    Gate, RecurrenceOptions, Write, linear_recurrence, recurrence_flops,
};

use crate::mixer::{Context, Cost, RunError, State};

/// How a mixer attends; queries and keys are seen through `map`.
pub(crate) struct Additive {
    pub(crate) map: FeatureMap,
    /// Factor of the causal form's queries, which its divisor has too.
    pub(crate) scale: f32,
    /// Divide by the sum of the weights.
    pub(crate) normalise: bool,
    pub(crate) causal: bool,
}

impl Additive {
    /// Outputs `[batch, time, heads, value_dim]` of q, k `[batch, time, heads, dim]` and v, and the state where the context asks
    /// for it. A form that looks both ways refuses a state in the name `refusal`.
    pub(crate) fn attend(
        &self,
        [q, k, v]: [Tensor<4>; 3],
        context: &Context,
        state: Option<&State>,
        refusal: &'static str,
    ) -> Result<(Tensor<4>, Option<State>), RunError> {
        if self.causal {
            let q = self.map.apply(q, Side::Query);
            let k = self.map.apply(k, Side::CausalKey);
            return Ok(causal(
                [q, k, v],
                self.scale,
                self.normalise,
                context,
                state,
            ));
        }
        if state.is_some() {
            return Err(RunError::CannotStream(refusal));
        }
        let offsets = context.offsets.as_ref();
        let o = feature_attention(q, k, v, &self.map, self.normalise, offsets);
        Ok((o, None))
    }
}

/// `o_i = scale phi(q_i) sum_(j <= i) phi(k_j)^T v_j`, divided by `scale phi(q_i) . sum phi(k_j)` where `normalise` is set.
/// Features `[batch, time, heads, features]`, values `[batch, time, heads, value_dim]`. State: `kv [sequences, heads, features,
/// value_dim]` and, where normalised, `z [sequences, heads, features]`; given back where the context asks for it.
fn causal(
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

/// Operations over one sequence and bytes of the state, features not counted; `width` counts the normaliser's column.
pub(crate) fn cost(causal: bool, time: usize, heads: usize, features: usize, width: usize) -> Cost {
    let (flops, state) = match causal {
        true => (
            recurrence_flops(time, heads, features, width, false),
            heads * features * width,
        ),
        false => (feature_attention_flops(time, heads, features, width), 0),
    };
    Cost {
        params: 0,
        flops,
        state_bytes: 4 * state as u64,
    }
}
