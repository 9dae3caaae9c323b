//! Products of strided matrices inside slices, on the calling thread: the blocks of which the chunked engines are made.
//!
//! With AVX-512 and an output that is contiguous along the dimension it shares with an operand that is, the loops are
//! ours and pack nothing; where only the right operand stands the wrong way it is turned over first. Every other product is the
//! `gemm` crate's. Triangles are multiplied by groups of rows, without what is zero farther from the diagonal.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod dots;
pub(crate) mod products;
#[cfg(target_arch = "x86_64")]
pub(crate) mod strip;
#[cfg(test)]
mod tests;
mod triangle;
#[cfg(target_arch = "x86_64")]
pub(crate) mod wide;

use std::borrow::Cow;
#[cfg(target_arch = "x86_64")]
use std::cell::RefCell;

pub(crate) use self::triangle::{lower_product, lower_transposed_product, product_below};
#[cfg(target_arch = "x86_64")]
use self::wide::{Ahead, Brief, Plain};
use crate::bf16::{self, Held};
use crate::simd::{dispatched, dot};
#[cfg(target_arch = "x86_64")]
use crate::transpose::transpose;

/// A matrix within a slice: element `(i, j)` is at `i * strides.0 + j * strides.1`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Holds every element, maybe among others.
    pub data: &'a [f32],
    /// From row to row, from column to column.
    pub strides: (usize, usize),
}

impl<'a> Matrix<'a> {
    /// Contiguous rows of `columns` values.
    #[inline(always)]
    pub fn rows(data: &'a [f32], columns: usize) -> Self {
        Matrix {
            data,
            strides: (columns, 1),
        }
    }

    /// What is left from a row and a column on.
    #[inline(always)]
    pub(crate) fn from(self, row: usize, column: usize) -> Self {
        Matrix {
            data: &self.data[row * self.strides.0 + column * self.strides.1..],
            strides: self.strides,
        }
    }

    /// The same matrix with rows and columns exchanged.
    #[inline(always)]
    pub fn transposed(self) -> Self {
        Matrix {
            data: self.data,
            strides: (self.strides.1, self.strides.0),
        }
    }
}

/// Values from the first element to the last.
pub(crate) fn span(rows: usize, columns: usize, strides: (usize, usize)) -> usize {
    if rows == 0 || columns == 0 {
        0
    } else {
        (rows - 1) * strides.0 + (columns - 1) * strides.1 + 1
    }
}

/// `out = alpha a b`, or `out += alpha a b` where `add`; `a` is `[m, k]`, `b` `[k, n]`, `out` `[m, n]` with the given
/// strides, which must keep its elements apart.
///
/// Panics when an operand reaches past its slice.
pub fn product(
    [m, k, n]: [usize; 3],
    alpha: f32,
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
    #[cfg(target_arch = "x86_64")]
    if wide::there() && in_strips([m, k, n], alpha, a, b, out, strides, add) {
        return;
    }
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
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Rows of `dim` values that a loop asks for while it works, for the one that comes after it; rows past the last one may
/// be asked for.
#[derive(Clone, Copy)]
pub(crate) struct Next<'a> {
    rows: Held<'a>,
    stride: usize,
    dim: usize,
}

impl<'a> Next<'a> {
    /// Rows as they are held, and what is from one to the next.
    pub(crate) fn new((rows, stride): (Held<'a>, usize), dim: usize) -> Self {
        Next { rows, stride, dim }
    }
}

#[cfg(target_arch = "x86_64")]
fn ahead(next: Option<Next>) -> Ahead {
    next.map_or(Ahead::NONE, |next| {
        Ahead::new(next.rows, next.stride, next.dim)
    })
}

/// `rows` rows of `dim` values, `stride` apart, as f32.
fn widened<'a>(
    values: Held<'a>,
    rows: usize,
    stride: usize,
    dim: usize,
) -> (Cow<'a, [f32]>, usize) {
    match values {
        Held::F32(values) => (Cow::Borrowed(values), stride),
        Held::Bf16(values) => {
            let mut wide = vec![0.0; rows * dim];
            for (row, wide) in wide.chunks_exact_mut(dim.max(1)).enumerate() {
                bf16::widen(&values[row * stride..][..dim], wide);
            }
            (Cow::Owned(wide), dim)
        }
    }
}

/// `out[r][j] = rows[r] . keys[j]` for up to four rows and `count` keys that are `stride` apart; `out` is `[rows, out_stride]`.
///
/// Panics when an operand reaches past its slice.
pub(crate) fn dots(
    rows: &[&[f32]],
    keys: Held,
    stride: usize,
    count: usize,
    out: &mut [f32],
    out_stride: usize,
    next: Option<Next>,
) {
    let dim = rows.first().map_or(0, |row| row.len());
    assert!(
        rows.len() <= 4
            && rows.iter().all(|row| row.len() == dim)
            && span(count, dim, (stride, 1)) <= keys.len()
            && span(rows.len(), count, (out_stride, 1)) <= out.len(),
        "dot products reach past their operands"
    );
    #[cfg(target_arch = "x86_64")]
    if wide::there() && count > 0 {
        let ahead = ahead(next);
        let to = out.as_mut_ptr();
        // SAFETY: every element lies within its slice, as just checked; the level was detected.
        unsafe {
            match keys {
                Held::F32(keys) => {
                    let keys = Plain(keys.as_ptr());
                    dots::dots(rows, dim, keys, stride, count, to, out_stride, ahead);
                }
                Held::Bf16(keys) => {
                    let keys = Brief(keys.as_ptr());
                    dots::dots(rows, dim, keys, stride, count, to, out_stride, ahead);
                }
            }
        };
        return;
    }
    let _ = next;
    let (keys, stride) = widened(keys, count, stride, dim);
    few_dots(rows, &keys, stride, count, out, out_stride);
}

/// Rows within a slice and what is from one to the next; 0: one row for all.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a>(pub(crate) &'a [f32], pub(crate) usize);

/// `out[i * out_stride] = a[i] . b[i]` for rows of `dim` values, as many as `out` has room for.
///
/// Panics when an operand reaches past its slice.
pub(crate) fn row_dots(dim: usize, a: Rows, b: Rows, out: &mut [f32], out_stride: usize) {
    let count = out.len().div_ceil(out_stride);
    assert!(
        [a, b]
            .iter()
            .all(|rows| span(count, dim, (rows.1, 1)) <= rows.0.len()),
        "dot products of rows reach past their operands"
    );
    #[cfg(target_arch = "x86_64")]
    if wide::there() {
        let (a, b) = ((a.0.as_ptr(), a.1), (b.0.as_ptr(), b.1));
        // SAFETY: every element lies within its slice, as just checked; the level was detected.
        unsafe { dots::pairs(dim, a, b, count, out.as_mut_ptr(), out_stride) };
        return;
    }
    few_pairs(dim, a, b, out, out_stride);
}

/// `out += weights values` for `weights [m, k]` and contiguous rows `values [k, n]` and `out [m, n]`, each with a stride.
///
/// Panics when an operand reaches past its slice.
pub(crate) fn weigh(
    [m, k, n]: [usize; 3],
    weights: Matrix,
    values: Held,
    stride: usize,
    out: &mut [f32],
    out_stride: usize,
    next: Option<Next>,
) {
    #[cfg(target_arch = "x86_64")]
    if wide::there() && suits(k, n) {
        assert!(
            span(m, k, weights.strides) <= weights.data.len()
                && span(k, n, (stride, 1)) <= values.len()
                && span(m, n, (out_stride, 1)) <= out.len(),
            "weighted sums reach past their operands"
        );
        let (to, ahead) = ((out.as_mut_ptr(), out_stride), ahead(next));
        // SAFETY: every element lies within its slice, as just checked; `out` is borrowed mutably; the level was detected.
        unsafe {
            match values {
                Held::F32(values) => {
                    let right = Plain(values.as_ptr());
                    strip::Strip::new(weights, right, stride, to, 1.0, true, ahead)
                        .multiply(m, k, n);
                }
                Held::Bf16(values) => {
                    let right = Brief(values.as_ptr());
                    strip::Strip::new(weights, right, stride, to, 1.0, true, ahead)
                        .multiply(m, k, n);
                }
            }
        }
        return;
    }
    let _ = next;
    let (values, stride) = widened(values, k, stride, n);
    let values = Matrix {
        data: &values,
        strides: (stride, 1),
    };
    product([m, k, n], 1.0, weights, values, out, (out_stride, 1), true);
}

/// True when strips are worth it: longer, those of the right operand leave the first cache level; narrower, most lanes idle.
#[cfg(target_arch = "x86_64")]
fn suits(k: usize, columns: usize) -> bool {
    k <= 512 && columns >= 8
}

dispatched! {
    fn few_dots<'a>(
        rows: &'a [&'a [f32]],
        keys: &'a [f32],
        stride: usize,
        count: usize,
        out: &'a mut [f32],
        out_stride: usize,
    ) {
        for j in 0..count {
            for (r, row) in rows.iter().enumerate() {
                out[r * out_stride + j] = dot(row, &keys[j * stride..][..row.len()]);
            }
        }
    }
}

dispatched! {
    fn few_pairs<'a>(dim: usize, a: Rows<'a>, b: Rows<'a>, out: &'a mut [f32], out_stride: usize) {
        for (i, out) in out.iter_mut().step_by(out_stride).enumerate() {
            *out = dot(&a.0[i * a.1..][..dim], &b.0[i * b.1..][..dim]);
        }
    }
}

/// [`product`] by our own loops, where the layout allows it; false where it does not, and nothing was done.
#[cfg(target_arch = "x86_64")]
fn in_strips(
    [m, k, n]: [usize; 3],
    alpha: f32,
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    strides: (usize, usize),
    add: bool,
) -> bool {
    // The transposed product has the transposed operands in the other order.
    let (rows, columns, left, right, stride) = if b.strides.1 == 1 && strides.1 == 1 {
        (m, n, a, b, strides.0)
    } else if a.strides.0 == 1 && strides.0 == 1 {
        (n, m, b.transposed(), a.transposed(), strides.1)
    } else if strides.1 == 1 && b.strides.0 == 1 && m >= TURNED {
        (m, n, a, b, strides.0)
    } else {
        return false;
    };
    if !suits(k, columns) {
        return false;
    }
    let to = (out.as_mut_ptr(), stride);
    let multiply = |values: *const f32, from: usize| {
        let strip = strip::Strip::new(left, Plain(values), from, to, alpha, add, Ahead::NONE);
        // SAFETY: the caller checked that every element lies within its slice, what was turned over has as many; `out` is
        // borrowed mutably; AVX-512 was detected.
        unsafe { strip.multiply(rows, k, columns) };
    };
    if right.strides.1 == 1 {
        multiply(right.data.as_ptr(), right.strides.0);
    } else {
        SCRATCH.with_borrow_mut(|turned| {
            turned.resize(turned.len().max(k * columns), 0.0);
            let from = right.strides.1;
            transpose([columns, k], 1.0, right.data, from, turned, columns);
            multiply(turned.as_ptr(), columns);
        });
    }
    true
}

#[cfg(target_arch = "x86_64")]
thread_local! {
    /// A right operand that was turned over.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Fewest rows for which a right operand is turned over.
#[cfg(target_arch = "x86_64")]
const TURNED: usize = 16;
