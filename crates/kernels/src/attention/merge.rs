//! Joining attention over different keys.

use crate::math::{exp, ln};

/// Joins two attention results of the same queries over disjoint sets of keys into the first: `o` is `[rows,
/// value_dim]`, `lse` `[rows]`. Associative and commutative up to rounding; `(0, -inf)` is the identity.
pub fn merge(first: (&mut [f32], &mut [f32]), second: (&[f32], &[f32])) {
    let (o, lse) = first;
    let (other, other_lse) = second;
    assert_eq!(
        (o.len(), lse.len()),
        (other.len(), other_lse.len()),
        "merged results"
    );
    if lse.is_empty() {
        return;
    }
    let value_dim = o.len() / lse.len();
    for (row, (lse, &other_lse)) in lse.iter_mut().zip(other_lse).enumerate() {
        let largest = lse.max(other_lse);
        if largest == f32::NEG_INFINITY {
            continue;
        }
        let (mine, theirs) = (exp(*lse - largest), exp(other_lse - largest));
        let sum = mine + theirs;
        let (mine, theirs) = (mine / sum, theirs / sum);
        let range = row * value_dim..(row + 1) * value_dim;
        for (o, other) in o[range.clone()].iter_mut().zip(&other[range]) {
            *o = mine * *o + theirs * other;
        }
        *lse = largest + ln(sum);
    }
}
