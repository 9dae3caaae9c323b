//! Products in which one matrix is small: the layers of a narrow model over many tokens, and the gradients of their weights.
//!
//! Packing takes as long there as it saves: each packed value meets few others. The loops of [`crate::gemm`] read both operands
//! where they are; only a weight that stands the wrong way is turned over first.

use super::Finish;
use super::blocked::{Out, threads};
use crate::gemm::Matrix;
use crate::gemm::strip::Strip;
use crate::gemm::wide::{Ahead, Plain};
use crate::simd::{add_partials, collect_if, each_if};
use crate::transpose::transpose;

/// Most values of the small matrix: it stays in the second cache level beside the rows at hand.
const SMALL: usize = 1 << 18;
/// Most values of a result of which each task makes a part.
const TINY: usize = 1 << 14;
/// Fewest rows on the long side.
const LONG: usize = 32;
/// Fewest rows for which a weight is turned over.
const TURNED: usize = 192;
/// Most rows of a task.
const ROWS: usize = 96;
/// Inner elements that a task sums at a time.
const STRETCH: usize = 512;
/// Fewest tasks for each thread.
const TASKS: usize = 4;
/// Farthest from row to row along a long inner dimension: further apart, rows push each other out of the first cache level.
const NEAR: usize = 512;
/// Most partial sums.
const PARTIALS: usize = 32;

/// What the sizes of a product ask for.
enum Way {
    /// Many rows times a small matrix.
    Rows,
    /// A small result of a long inner dimension.
    Inner,
}

fn way([m, k, n]: [usize; 3], a: Matrix, b: Matrix) -> Option<Way> {
    if m * k * n == 0 {
        return None;
    }
    let turns = b.strides.0 == 1 && b.strides.1 >= k && m >= TURNED;
    if m >= LONG && k * n <= SMALL && (b.strides.1 == 1 || turns) {
        return Some(Way::Rows);
    }
    let near = a.strides.1 <= NEAR && b.strides.0 <= NEAR;
    if k < LONG || m * n > SMALL || b.strides.1 != 1 || !near {
        return None;
    }
    Some(if m * n <= TINY { Way::Inner } else { Way::Rows })
}

/// `out = a b` or onto `out` where the sizes are of this kind, whether they are.
///
/// # Safety
/// As of [`super::blocked::multiply`].
pub unsafe fn multiply(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: *mut f32,
    finish: Finish,
) -> bool {
    match way([m, k, n], a, b) {
        None => return false,
        Some(Way::Rows) => {
            let turned;
            let b = match b.strides.1 {
                1 => b,
                _ => {
                    turned = turn(k, n, b);
                    Matrix::rows(&turned, n)
                }
            };
            // SAFETY: as promised by the caller.
            unsafe { by_rows([m, k, n], a, b, out, finish) };
        }
        Some(Way::Inner) => {
            let sums = by_inner([m, k, n], a, b);
            // SAFETY: `out` holds that many elements.
            unsafe { end(out, n, &sums, finish) };
        }
    }
    true
}

/// `[k, n]` of contiguous columns as contiguous rows.
fn turn(k: usize, n: usize, b: Matrix) -> Vec<f32> {
    let mut rows = vec![0.0; k * n];
    transpose([n, k], 1.0, b.data, b.strides.1, &mut rows, n);
    rows
}

/// Rows of `b` and `out` are contiguous.
///
/// # Safety
/// As of [`multiply`].
unsafe fn by_rows([m, k, n]: [usize; 3], a: Matrix, b: Matrix, out: *mut f32, finish: Finish) {
    let out = Out(out);
    let threads = threads([m, k, n]);
    let even = m.div_ceil(TASKS * threads);
    let block = even.next_multiple_of(6).min(ROWS);
    let task = |first: usize| {
        let rows = (m - first).min(block);
        let to = out.at(first * n);
        for from in (0..k).step_by(STRETCH) {
            let left = Matrix {
                data: &a.data[first * a.strides.0 + from * a.strides.1..],
                strides: a.strides,
            };
            let right = Plain(b.data[from * b.strides.0..].as_ptr());
            let add = finish.add || from > 0;
            let strip = Strip::new(left, right, b.strides.0, (to, n), 1.0, add, Ahead::NONE);
            // SAFETY: these rows of `out` are this task's; sizes and the level were checked.
            unsafe { strip.multiply(rows, STRETCH.min(k - from), n) };
        }
        if let Some(bias) = finish.bias {
            // SAFETY: the product has written every element of these rows.
            let written = unsafe { std::slice::from_raw_parts_mut(to, rows * n) };
            for row in written.chunks_exact_mut(n) {
                row.iter_mut()
                    .zip(bias)
                    .for_each(|(value, bias)| *value += bias);
            }
        }
    };
    each_if(threads > 1, (0..m).step_by(block), task);
}

/// Sums over stretches of the inner dimension, which is along the rows of both operands.
fn by_inner([m, k, n]: [usize; 3], a: Matrix, b: Matrix) -> Vec<f32> {
    let stretch = STRETCH.max(k.div_ceil(PARTIALS));
    let sum = |first: usize| {
        let inner = stretch.min(k - first);
        let left = Matrix {
            data: &a.data[first * a.strides.1..],
            strides: a.strides,
        };
        let mut sums = Vec::with_capacity(m * n);
        let right = Plain(b.data[first * b.strides.0..].as_ptr());
        let to = (sums.as_mut_ptr(), n);
        let strip = Strip::new(left, right, b.strides.0, to, 1.0, false, Ahead::NONE);
        // SAFETY: the operands reach so far, `sums` has room for the product, which writes every element of it.
        unsafe {
            strip.multiply(m, inner, n);
            sums.set_len(m * n);
        }
        sums
    };
    let firsts = (0..k).step_by(stretch);
    let mut parts = collect_if(threads([m, k, n]) > 1, firsts, sum);
    match parts.len() {
        1 => parts.remove(0),
        _ => {
            let mut total = vec![0.0; m * n];
            add_partials(&mut total, &parts);
            total
        }
    }
}

/// Writes sums `[m, n]` as `finish` says.
///
/// # Safety
/// `out` holds as many elements, initialised where it is added to.
unsafe fn end(out: *mut f32, n: usize, sums: &[f32], finish: Finish) {
    for (at, sum) in sums.iter().enumerate() {
        let bias = finish.bias.map_or(0.0, |bias| bias[at % n]);
        // SAFETY: as promised by the caller.
        unsafe {
            let to = out.add(at);
            let held = if finish.add { to.read() } else { 0.0 };
            to.write(held + sum + bias);
        }
    }
}
