//! The blocks of a large product: which panels are packed when, and which tiles a task computes.

use super::pack::{Panels, Side, with_buffer};
use super::tile::{HEIGHT, Tile, WIDTH};
use super::{Finish, Precision};
use crate::activation::Activation;
use crate::gemm::Matrix;
use crate::quant::Packed;
use crate::simd::each_if;

/// Units of the inner dimension that a tile sums at a time: a panel of the right operand is then 32 KiB.
const DEPTH: usize = 256;
/// Most rows or columns that a task packs at a time: with [`DEPTH`], 192 KiB of the second level cache.
const BLOCK: usize = 192;
/// Units of the smaller operand that are packed at a time: 8 MiB.
const PACKED: usize = 2 << 20;
/// Fewest tasks for each thread, so that the last one to finish is not waited for long.
const TASKS: usize = 4;

/// The output, of which tasks write tiles that do not overlap.
#[derive(Clone, Copy)]
pub(super) struct Out(pub(super) *mut f32);
// SAFETY: tasks write disjoint tiles of the output, which outlives them all.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// Element `at`, still within the output. A method, so that closures capture the whole.
    pub(super) fn at(&self, at: usize) -> *mut f32 {
        // SAFETY: callers stay within the `m * n` elements.
        unsafe { self.0.add(at) }
    }
}

/// Threads that a product is worth.
pub(super) fn threads([m, k, n]: [usize; 3]) -> usize {
    match m * k * n < 96 * 96 * 96 {
        true => 1,
        false => rayon::current_num_threads(),
    }
}

/// Where the right operand comes from.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// Packed as it is needed.
    Matrix(Matrix<'a>),
    /// Packed whole beforehand.
    Held(&'a Panels),
    /// A weight `[n, k]` of few bits, widened as it is packed.
    Brief(&'a Packed),
}

/// `out = a b`, or onto `out`, and then what `then` makes of it; other arguments as of [`super::matmul`].
///
/// # Safety
/// Every element of the operands lies within its slice; `out` holds `m * n` elements, initialised where `finish` adds to them,
/// and overlaps neither operand; AVX-512 (for bf16 AVX512-BF16) is there.
pub unsafe fn multiply(
    precision: Precision,
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Right,
    out: *mut f32,
    finish: Finish,
    then: Option<Activation>,
) {
    if m * n == 0 {
        return;
    }
    let out = Out(out);
    let left = Side::new(precision, m, k, a, HEIGHT);
    // Of what is held, only the sizes are asked for.
    let (right, held) = match b {
        Right::Matrix(b) => (Side::new(precision, n, k, b.transposed(), WIDTH), None),
        Right::Held(panels) => {
            let empty = Matrix::rows(&[], k);
            (Side::new(precision, n, k, empty, WIDTH), Some(panels))
        }
        Right::Brief(weight) => (Side::brief(precision, weight, WIDTH), None),
    };
    let shares_right = n <= m;
    let (shared, split) = match shares_right {
        true => (&right, &left),
        false => (&left, &right),
    };
    let units = left.units();
    let depth = units.div_ceil(units.div_ceil(DEPTH));
    let depth = depth.next_multiple_of(right.step());
    let threads = threads([m, k, n]);
    let given = held.filter(|_| shares_right);
    let chunk = match given {
        Some(_) => shared.outer,
        None => (PACKED / units).max(1),
    };
    let chunk = chunk.next_multiple_of(shared.width);
    let chunk = chunk.min(shared.outer.next_multiple_of(shared.width));
    let even = split.outer.div_ceil(threads * TASKS);
    let rounds = even.div_ceil(BLOCK);
    let block = split.outer.div_ceil(threads * TASKS * rounds);
    let block = block.next_multiple_of(split.width);
    let mut packed = match given {
        Some(_) => Panels::new(0, 0, shared.width),
        None => Panels::new(chunk, units, shared.width),
    };
    for from in (0..shared.outer).step_by(chunk) {
        let some = from..(from + chunk).min(shared.outer);
        if given.is_none() {
            packed.fill(shared, some.clone(), 0..units, threads > 1);
        }
        let packed = given.unwrap_or(&packed);
        let task = |index: usize| {
            let own = index * block..((index + 1) * block).min(split.outer);
            let (rows, columns) = match shares_right {
                true => (own.clone(), some.clone()),
                false => (some.clone(), own.clone()),
            };
            with_buffer(block, depth, split.width, |panels| {
                for first in (0..units).step_by(depth) {
                    let stretch = first..(first + depth).min(units);
                    if shares_right || held.is_none() {
                        panels.fill(split, own.clone(), stretch.clone(), false);
                    }
                    let bias = finish.bias.filter(|_| stretch.end == units);
                    for column in columns.clone().step_by(WIDTH) {
                        let wide = (columns.end - column).min(WIDTH);
                        for row in rows.clone().step_by(HEIGHT) {
                            let (i, j) = (
                                (row - rows.start) / HEIGHT,
                                (column - columns.start) / WIDTH,
                            );
                            let (a, b) = match (shares_right, held) {
                                (true, _) => (panels.panel(i, 0), packed.panel(j, first)),
                                (false, Some(whole)) => {
                                    (packed.panel(i, first), whole.panel(column / WIDTH, first))
                                }
                                (false, None) => (packed.panel(i, first), panels.panel(j, 0)),
                            };
                            let tile = Tile {
                                a,
                                b,
                                units: stretch.len(),
                                out: out.at(row * n + column),
                                stride: n,
                                size: [(rows.end - row).min(HEIGHT), wide],
                                keeps: finish.add || first > 0,
                                bias: bias.map(|bias| &bias[column..column + wide]),
                            };
                            // SAFETY: both panels hold `units` units, the tile lies within the output and no other
                            // task writes it; the level was checked to run on this machine.
                            unsafe { tile.multiply(precision) };
                        }
                    }
                }
                if let Some(then) = then {
                    for row in rows {
                        // SAFETY: this task has written these elements, and no other does.
                        let values = unsafe {
                            let from = out.at(row * n + columns.start);
                            std::slice::from_raw_parts_mut(from, columns.len())
                        };
                        then.replace(values);
                    }
                }
            });
        };
        let tasks = split.outer.div_ceil(block);
        each_if(threads > 1, 0..tasks, task);
    }
}
