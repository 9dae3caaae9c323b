//! Inputs of a model, and packing: padded rows become one run of valid tokens, so that no operation sees padding.

use std::sync::Arc;

use crate::config::ModelError;

/// What one forward pass reads.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Token ids, `[batch, time]` row-major.
    Tokens {
        /// The ids.
        ids: &'a [u32],
        /// Number of rows.
        batch: usize,
    },
    /// Token ids with the type (segment) of each, for models that have token types.
    TypedTokens {
        /// The ids, `[batch, time]` row-major.
        ids: &'a [u32],
        /// Their types.
        types: &'a [u32],
        /// Number of rows.
        batch: usize,
    },
    /// Pictures `[batch, height, width, channels]`, values as the data gives them.
    Pixels {
        /// The values.
        values: &'a [f32],
        /// Number of pictures.
        batch: usize,
    },
}

/// Rows of unequal length laid end to end.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The valid ids of all rows.
    pub ids: Vec<u32>,
    /// Cumulative lengths.
    pub offsets: Arc<Vec<usize>>,
}

/// Drops the padding of `[batch, time]` rows of which row `i` is valid up to `lengths[i]`.
pub fn pack(ids: &[u32], batch: usize, lengths: &[usize]) -> Result<Packed, ModelError> {
    let time = ids.len().checked_div(batch).unwrap_or(0);
    if lengths.len() != batch || lengths.iter().any(|length| *length > time) {
        return Err(ModelError::Input(format!(
            "expected {batch} lengths of at most {time}, got {lengths:?}"
        )));
    }
    let mut offsets = vec![0];
    let mut packed = Vec::new();
    for (row, length) in lengths.iter().enumerate() {
        packed.extend_from_slice(&ids[row * time..row * time + length]);
        offsets.push(packed.len());
    }
    Ok(Packed {
        ids: packed,
        offsets: Arc::new(offsets),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_valid_tokens_in_order() {
        let packed = pack(&[1, 2, 9, 3, 9, 9, 4, 5, 6], 3, &[2, 1, 3]).expect("fits");
        assert_eq!(packed.ids, [1, 2, 3, 4, 5, 6]);
        assert_eq!(*packed.offsets, [0, 2, 3, 6]);
        assert!(pack(&[1, 2], 1, &[3]).is_err());
    }
}
