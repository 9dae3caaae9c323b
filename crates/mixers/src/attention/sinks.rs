//! Attention sinks: the first tokens of a text are kept beside the window of the last ones.
//!
//! Xiao et al., StreamingLLM (2024), arXiv 2309.17453. A query sees the first `sinks` keys and the last `window`, its own
//! among these. Positions are places in what is kept, not in the text: to the sinks a query stands at most `sinks +
//! window - 1` places from the start, so that no distance grows beyond what the model knows. Both parts are attention of
//! their own, with queries turned by their own positions, and are joined by their sums of exponentials.

use std::ops::Range;
use std::sync::Arc;

use anyformer_ops::Tensor;
use anyformer_ops::adapter::{is_tracked, on_cpu};
use anyformer_ops::attention::{
    AttentionOptions, attention_with_sums, cached_attention_with_sums, joined,
};
use anyformer_ops::cache::Cache;
use anyformer_ops::lengths::cumulative;

use super::Attention;
use super::rows::{behind, last, rows};
use crate::mixer::{Context, State};

/// Keys and values of one part of each sequence, those that were kept and the new ones.
#[allow(clippy::large_enum_variant)]
enum Part {
    Pages([Cache; 2]),
    /// With cumulative counts.
    Rows([Tensor<4>; 2], Arc<Vec<usize>>),
}

/// Names of the tensors of a part in the state.
type Names = [&'static str; 2];

const SINKS: Names = ["sink_k", "sink_v"];
const WINDOW: Names = ["k", "v"];

impl Part {
    /// Keys and values `[1, total, kv_heads, head_dim]` of the new rows `ranges` after those of the state, of which each
    /// sequence has `held`.
    fn new(
        mixer: &Attention,
        new: &[Tensor<4>; 2],
        ranges: &[Range<usize>],
        (state, held): (Option<&State>, &[usize]),
        (names, paged): (Names, bool),
    ) -> Self {
        let fresh = new.each_ref().map(|x| rows(x, ranges.iter().cloned()));
        let counts = cumulative(ranges.iter().map(ExactSizeIterator::len));
        if paged {
            let [k, v] = fresh;
            let parts = [(names[0], k), (names[1], v)];
            return Part::Pages(parts.map(|(name, x)| mixer.grown(state, name, x, &counts)));
        }
        let before = cumulative(held.iter().copied());
        let all: Vec<usize> = before.iter().zip(&counts).map(|(a, b)| a + b).collect();
        let [k, v] = fresh;
        let both = [(names[0], k), (names[1], v)].map(|(name, fresh)| {
            let Some(old) = state.and_then(|state| state.find::<3>(name)) else {
                return fresh;
            };
            behind(old, fresh, &before, &counts)
        });
        Part::Rows(both, Arc::new(all))
    }

    /// Outputs and sums of exponentials of queries `[1, total, heads, head_dim]`.
    fn attend(&self, q: &Tensor<4>, options: &AttentionOptions) -> (Tensor<4>, Tensor<3>) {
        match self {
            Part::Pages([k, v]) => cached_attention_with_sums(q.clone(), k, v, options),
            Part::Rows([k, v], offsets) => {
                let options = AttentionOptions {
                    k_offsets: Some(offsets.clone()),
                    ..options.clone()
                };
                attention_with_sums(q.clone(), k.clone(), v.clone(), &options)
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Part::Pages([k, _]) => k.lengths().iter().all(|length| *length == 0),
            Part::Rows(_, offsets) => offsets[offsets.len() - 1] == 0,
        }
    }

    /// The state with the last `kept` rows of each sequence.
    fn keep(self, state: State, names: Names, kept: &[usize]) -> State {
        match self {
            Part::Pages(caches) => {
                let named = names.into_iter().zip(caches);
                named.fold(state, |state, (name, cache)| {
                    state.with_cache(name, cache.last(kept))
                })
            }
            Part::Rows(..) if kept.iter().all(|kept| *kept == 0) => state,
            Part::Rows(tensors, offsets) => {
                let named = names.into_iter().zip(tensors);
                named.fold(state, |state, (name, x)| {
                    state.with_rows(name, last(x, &offsets, kept), kept.to_vec())
                })
            }
        }
    }
}

impl Attention {
    /// Rows that the two parts of a sequence keep after `time` tokens.
    fn kept_parts(&self, time: usize) -> [usize; 2] {
        let sinks = time.min(self.sinks);
        [sinks, self.kept_of_window(time - sinks)]
    }

    /// Rows of a sequence that the cache keeps after `time` tokens.
    pub(super) fn kept(&self, time: usize) -> usize {
        self.kept_parts(time).into_iter().sum()
    }

    /// How far from the start each query stands for the sinks.
    pub(super) fn sink_positions(&self, positions: &[usize]) -> Vec<usize> {
        let most = self.sinks + self.window.unwrap_or(usize::MAX / 2) - 1;
        positions.iter().map(|at| (*at).min(most)).collect()
    }

    /// Attention of `q` over the window and of `far`, the queries as they are turned for them, over the sinks: all of
    /// `[batch, time, heads, head_dim]`.
    pub(super) fn with_sinks(
        &self,
        [q, far, k, v]: [Tensor<4>; 4],
        options: &AttentionOptions,
        context: &Context,
        state: Option<&State>,
    ) -> (Tensor<4>, Option<State>) {
        let [batch, time, heads, head_dim] = q.dims();
        let paged = (context.keep_state || state.is_some()) && on_cpu(&q) && !is_tracked(&q);
        let new = context.sequences(batch, time);
        let flat = |x: Tensor<4>| {
            let [_, _, heads, head_dim] = x.dims();
            x.reshape([1, batch * time, heads, head_dim])
        };
        let before = match state {
            Some(state) => state.times.clone(),
            None => vec![0; new.len() - 1],
        };
        // The new tokens that are sinks, and the others.
        let ends = new.windows(2).zip(&before);
        let middle = ends.map(|(pair, before)| {
            let sinks = self.sinks.saturating_sub(*before).min(pair[1] - pair[0]);
            pair[0] + sinks
        });
        let middle: Vec<usize> = middle.collect();
        let cut = new.windows(2).zip(&middle);
        let (first, last): (Vec<_>, Vec<_>) =
            cut.map(|(pair, at)| (pair[0]..*at, *at..pair[1])).unzip();
        let held = before.iter().map(|time| self.kept_parts(*time));
        let (held_sinks, held_window): (Vec<_>, Vec<_>) = held.map(|[a, b]| (a, b)).unzip();
        let fresh = [flat(k), flat(v)];
        let sinks = Part::new(self, &fresh, &first, (state, &held_sinks), (SINKS, paged));
        let window = Part::new(self, &fresh, &last, (state, &held_window), (WINDOW, paged));
        let shared = AttentionOptions {
            q_offsets: Some(new.clone()),
            k_offsets: None,
            ..options.clone()
        };
        let near = AttentionOptions {
            window: None,
            starts: Some(Arc::new(before)),
            dropout: context.weights(self.dropout, 1),
            ..shared.clone()
        };
        let of_sinks = sinks.attend(&flat(far), &near);
        let y = match window.is_empty() {
            true => of_sinks.0,
            false => joined(vec![of_sinks, window.attend(&flat(q), &shared)]),
        };
        let next = context.keep_state.then(|| {
            let times = context.times_after(batch, time, state);
            let kept = times.iter().map(|time| self.kept_parts(*time));
            let (of_sinks, of_window): (Vec<_>, Vec<_>) = kept.map(|[a, b]| (a, b)).unzip();
            let next = sinks.keep(State::new(times), SINKS, &of_sinks);
            window.keep(next, WINDOW, &of_window)
        });
        (y.reshape([batch, time, heads, head_dim]), next)
    }
}
