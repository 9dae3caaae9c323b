//! Which rows are near to which: choices that have no gradient, on values.

use anyformer_kernels::gemm::Matrix;
pub use anyformer_kernels::largest::largest;
use anyformer_kernels::matmul::{Precision, product};

/// Dot products of every row of `a` with every row of `b`, `[rows of a, rows of b]`; rows have `width` values.
///
/// Panics when either is not whole rows.
pub fn dot_products(a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
    assert!(
        a.len().is_multiple_of(width) && b.len().is_multiple_of(width),
        "dot products of rows of {width}: {} and {} values",
        a.len(),
        b.len()
    );
    let size = [a.len() / width, width, b.len() / width];
    let (a, b) = (Matrix::rows(a, width), Matrix::rows(b, width).transposed());
    product(Precision::F32, size, a, b, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_meet_rows() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.5, 0.5, 0.0, -1.0]);
        assert_eq!(dot_products(&a, &b, 2), [1.0, 1.5, -2.0, 3.0, 3.5, -4.0]);
    }
}
