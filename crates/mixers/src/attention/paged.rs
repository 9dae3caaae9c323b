//! Attention over keys and values in pages: the CPU's way from token to token, without gradients.

use anyformer_ops::Tensor;
use anyformer_ops::attention::{AttentionOptions, cached_attention, flash_attention};
use anyformer_ops::cache::{Cache, Element};
use serde::{Deserialize, Serialize};

use super::Attention;
use crate::mixer::{Context, State};

/// How keys and values are kept from token to token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bf16.
    Bf16,
}

impl Attention {
    /// The pages of this name in the state, none where there is no state, with new rows `[1, total, kv_heads, head_dim]` of each
    /// sequence behind; `counts` are cumulative.
    pub(super) fn grown(
        &self,
        state: Option<&State>,
        name: &str,
        rows: Tensor<4>,
        counts: &[usize],
    ) -> Cache {
        let held = state.and_then(|state| state.cache(name, self.cache));
        let empty = || Cache::new(self.cache, counts.len() - 1, self.kv_heads, self.head_dim);
        held.unwrap_or_else(empty).with_rows(rows, counts)
    }

    /// Attention whose keys and values are kept in pages, which grow in place and are shared between copies of a state.
    pub(super) fn paged(
        &self,
        [q, k, v]: [Tensor<4>; 3],
        mut options: AttentionOptions,
        context: &Context,
        state: Option<&State>,
    ) -> (Tensor<4>, Option<State>) {
        let [batch, time, heads, head_dim] = q.dims();
        let new = context.sequences(batch, time);
        let flat = |x: Tensor<4>| {
            let [_, _, heads, head_dim] = x.dims();
            x.reshape([1, batch * time, heads, head_dim])
        };
        let grown = |name: &str, x: &Tensor<4>| self.grown(state, name, flat(x.clone()), &new);
        let (keys, values) = (grown("k", &k), grown("v", &v));
        options.q_offsets = Some(new.clone());
        let y = match (state, self.cache) {
            // What has just been read need not be looked up.
            (None, Element::F32) => {
                options.k_offsets = Some(new.clone());
                flash_attention(flat(q), flat(k), flat(v), &options)
            }
            _ => cached_attention(flat(q), &keys, &values, &options),
        };
        let next = context.keep_state.then(|| {
            let times = context.times_after(batch, time, state);
            // Pages that no later query sees are let go.
            let kept: Vec<usize> = times.iter().map(|time| self.kept(*time)).collect();
            State::new(times)
                .with_cache("k", keys.last(&kept))
                .with_cache("v", values.last(&kept))
        });
        (y.reshape([batch, time, heads, head_dim]), next)
    }
}
