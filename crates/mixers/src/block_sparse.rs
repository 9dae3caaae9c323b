//! Softmax attention in which each block of queries looks at a list of keys: the engine of Longformer, BigBird and the Sparse
//! Transformer, over [`anyformer_ops::attention::Plan`].
//!
//! A mixer says how a plan for a length is made; it is made once for a length and kept, since a model sees the same lengths
//! again and again. Time and memory follow the sum of the lists, not the square of the length.

use std::sync::{Arc, Mutex, PoisonError};

use anyformer_ops::Tensor;
use anyformer_ops::attention::{AttentionOptions, Plan, flash_attention};

use crate::mixer::Context;

/// Plans that are kept; a set of texts has many lengths, and a plan of a long one is large.
const KEPT: usize = 32;

/// Plans by length, those used last in front.
#[derive(Debug, Default)]
pub(crate) struct Plans(Mutex<Vec<Arc<Plan>>>);

impl Plans {
    /// The plan for `time` tokens.
    pub(crate) fn of(&self, time: usize, make: impl FnOnce() -> Plan) -> Arc<Plan> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match held.iter().position(|plan| plan.time() == time) {
            Some(at) => held.remove(at),
            None => Arc::new(make()),
        };
        held.insert(0, plan.clone());
        held.truncate(KEPT);
        plan
    }

    /// `softmax(q kᵀ / sqrt(head_dim)) v` over the pairs of each sequence's plan, which `make` gives for a length; all tensors
    /// `[batch, time, heads, head_dim]`. In training a weight is dropped at the chance `dropout`.
    pub(crate) fn attend(
        &self,
        [q, k, v]: [Tensor<4>; 3],
        context: &Context,
        dropout: f64,
        make: impl Fn(usize) -> Plan,
    ) -> Tensor<4> {
        let [batch, time, _, _] = q.dims();
        let offsets = context.sequences(batch, time);
        let plans = offsets.windows(2).map(|ends| {
            let time = ends[1] - ends[0];
            self.of(time, || make(time))
        });
        let options = AttentionOptions {
            plans: Some(Arc::new(plans.collect())),
            q_offsets: context.offsets.clone(),
            k_offsets: context.offsets.clone(),
            ..context.attention(dropout, 0)
        };
        flash_attention(q, k, v, &options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_made_once_and_the_oldest_goes() {
        let plans = Plans::default();
        let make =
            |time: usize| move || Plan::new(time, 1, 4, |_, keys| vec![keys], |_, _, _| true);
        let first = plans.of(8, make(8));
        assert!(Arc::ptr_eq(&first, &plans.of(8, make(8))));
        for time in 10..10 + KEPT {
            plans.of(time, make(time));
        }
        assert!(!Arc::ptr_eq(&first, &plans.of(8, make(8))));
        assert_eq!(plans.0.lock().expect("no panic").len(), KEPT);
    }
}
