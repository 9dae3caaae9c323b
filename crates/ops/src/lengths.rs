//! Lengths of packed sequences.

/// Cumulative sums of lengths, with a leading zero.
pub fn cumulative(lengths: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + length);
    }
    offsets
}
