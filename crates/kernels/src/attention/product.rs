//! Matrix products of blocks, on one thread.
#![allow(unsafe_code)]

/// A matrix within a slice: element `(i, j)` is at `i * strides.0 + j * strides.1`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) strides: (usize, usize),
}

fn span(rows: usize, cols: usize, strides: (usize, usize)) -> usize {
    if rows == 0 || cols == 0 {
        0
    } else {
        (rows - 1) * strides.0 + (cols - 1) * strides.1 + 1
    }
}

/// `out = a b`, or `out += a b` where `add`; a is `[m, k]`, b `[k, n]`, out `[m, n]` with the given strides.
pub(super) fn product(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    strides: (usize, usize),
    add: bool,
) {
    assert!(
        span(m, k, a.strides) <= a.data.len()
            && span(k, n, b.strides) <= b.data.len()
            && span(m, n, strides) <= out.len(),
        "a block product reaches past its operands"
    );
    // SAFETY: every element that the product reads or writes lies within its slice, as just checked; `out` is borrowed
    // mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            strides.1 as isize,
            strides.0 as isize,
            add,
            a.data.as_ptr(),
            a.strides.1 as isize,
            a.strides.0 as isize,
            b.data.as_ptr(),
            b.strides.1 as isize,
            b.strides.0 as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
