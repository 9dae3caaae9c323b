//! Keys and values as tensors: rows of several sequences, end to end.

use std::ops::Range;
use std::sync::Arc;

use anyformer_ops::Tensor;
use anyformer_ops::embedding::embedding;

/// Rows `[ranges]` of `[1, total, heads, head_dim]`, end to end.
pub(super) fn rows(x: &Tensor<4>, ranges: impl Iterator<Item = Range<usize>>) -> Tensor<4> {
    let [_, total, heads, head_dim] = x.dims();
    let ids: Vec<u32> = ranges.flatten().map(|row| row as u32).collect();
    let count = ids.len();
    match count {
        0 => Tensor::empty([1, 0, heads, head_dim], &x.device()),
        _ => {
            let table = x.clone().reshape([total, heads * head_dim]);
            embedding(table, Arc::new(ids), [1, count]).reshape([1, count, heads, head_dim])
        }
    }
}

/// Each sequence's rows of `fresh` behind those of `old` (`[total, heads, head_dim]`); `before` and `new` are their cumulative
/// counts.
pub(super) fn behind(
    old: Tensor<3>,
    fresh: Tensor<4>,
    before: &[usize],
    new: &[usize],
) -> Tensor<4> {
    let [total, heads, head_dim] = old.dims();
    let old = old.reshape([1, total, heads, head_dim]);
    if fresh.dims()[1] == 0 {
        return old;
    }
    let both = Tensor::cat(vec![old, fresh], 1);
    if before.len() == 2 {
        return both;
    }
    let ends = before.windows(2).zip(new.windows(2));
    let pieces = ends.flat_map(|(old, new)| [old[0]..old[1], total + new[0]..total + new[1]]);
    rows(&both, pieces)
}

/// The last `kept` rows of each sequence as `[total, heads, head_dim]`; `offsets` are the cumulative counts in `x`.
pub(super) fn last(x: Tensor<4>, offsets: &[usize], kept: &[usize]) -> Tensor<3> {
    let ends = offsets.windows(2).zip(kept);
    let whole = ends.clone().all(|(pair, kept)| pair[1] - pair[0] == *kept);
    let x = match whole {
        true => x,
        false => rows(&x, ends.map(|(pair, kept)| pair[1] - kept..pair[1])),
    };
    let [_, total, heads, head_dim] = x.dims();
    x.reshape([total, heads, head_dim])
}
