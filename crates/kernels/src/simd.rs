//! How the small kernels become SIMD code and use threads.
//!
//! [`dispatched!`] wraps a function so that its body is compiled for each instruction set and chosen at run time
//! (see [`crate::instructions`]). [`each`] and [`collect`] run it over fixed blocks, on the rayon pool when there is enough to
//! do. Blocks depend on the sizes only and partial results are combined in block order, so results do not depend on the
//! number of threads.
#![allow(unsafe_code)]

use rayon::prelude::*;

/// Values per block of an elementwise loop.
pub(crate) const BLOCK: usize = 16 * 1024;
/// Below this many values the threads cost more than they bring.
const PARALLEL: usize = 2 * BLOCK;
/// Below this many operations the threads cost more than they bring.
pub(crate) const PARALLEL_FLOPS: u64 = 400_000;
/// Most blocks of a reduction whose partial results are whole rows.
const REDUCTION_BLOCKS: usize = 32;

/// Rows of `width` values that make a block.
pub(crate) fn block_rows(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}

/// As [`block_rows`], with few enough blocks that one partial row for each is cheap.
pub(crate) fn reduction_rows(rows: usize, width: usize) -> usize {
    block_rows(width).max(rows.div_ceil(REDUCTION_BLOCKS))
}

/// Runs `work` on each block; `values` is the total amount of data and decides about threads.
pub(crate) fn each<I>(blocks: I, values: usize, work: impl Fn(I::Item) + Send + Sync)
where
    I: Iterator,
    I::Item: Send,
{
    each_if(values >= PARALLEL, blocks, work);
}

/// Runs `work` on each block, on all threads where `parallel` is set.
pub(crate) fn each_if<I>(parallel: bool, blocks: I, work: impl Fn(I::Item) + Send + Sync)
where
    I: Iterator,
    I::Item: Send,
{
    if parallel {
        let blocks: Vec<I::Item> = blocks.collect();
        blocks.into_par_iter().with_max_len(1).for_each(work);
    } else {
        blocks.for_each(work);
    }
}

/// As [`each`]; returns the results in block order.
pub(crate) fn collect<I, R>(
    blocks: I,
    values: usize,
    work: impl Fn(I::Item) -> R + Send + Sync,
) -> Vec<R>
where
    I: Iterator,
    I::Item: Send,
    R: Send,
{
    collect_if(values >= PARALLEL, blocks, work)
}

/// As [`each_if`]; returns the results in block order.
pub(crate) fn collect_if<I, R>(
    parallel: bool,
    blocks: I,
    work: impl Fn(I::Item) -> R + Send + Sync,
) -> Vec<R>
where
    I: Iterator,
    I::Item: Send,
    R: Send,
{
    if parallel {
        let blocks: Vec<I::Item> = blocks.collect();
        blocks.into_par_iter().with_max_len(1).map(work).collect()
    } else {
        blocks.map(work).collect()
    }
}

/// Adds the partial results of the blocks, in order.
pub(crate) fn add_partials(total: &mut [f32], partials: &[Vec<f32>]) {
    total.fill(0.0);
    for partial in partials {
        for (sum, value) in total.iter_mut().zip(partial) {
            *sum += value;
        }
    }
}

/// Defines a function whose body, with the `#[inline(always)]` functions it calls, is compiled for AVX-512, AVX2 and the
/// baseline, and chosen when called. Closures in the body are not certain to be inlined: write loops.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$life:lifetime $(, $kind:ident: $bound:path)?>
        ($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        dispatched! { $(#[$meta])* $vis fn $name<$life $(, $kind: $bound)?>($($arg: $ty),*) -> () $body }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$life:lifetime $(, $kind:ident: $bound:path)?>
        ($($arg:ident: $ty:ty),* $(,)?) -> $result:ty $body:block) => {
        $(#[$meta])*
        $vis fn $name<$life $(, $kind: $bound)?>($($arg: $ty),*) -> $result {
            struct Call<$life $(, $kind: $bound)?> {
                $($arg: $ty,)*
                life: std::marker::PhantomData<&$life ()>,
            }
            impl<$life $(, $kind: $bound)?> pulp::NullaryFnOnce for Call<$life $(, $kind)?> {
                type Output = $result;
                #[inline(always)]
                fn call(self) -> $result {
                    let Call { $($arg,)* life: _ } = self;
                    $body
                }
            }
            crate::instructions::dispatch(Call { $($arg,)* life: std::marker::PhantomData })
        }
    };
}
pub(crate) use dispatched;

/// Running sums of a reduction: as many as two AVX-512 registers hold.
pub(crate) const LANES: usize = 32;

/// Combines lane `i` with lane `i + 16`, then with `i + 8`, and so on. Four lanes at a time where that can be said: the compiler
/// takes them one by one, which for short rows takes longer than all else. The second operand of a maximum comes back where neither
/// is larger.
#[cfg(target_arch = "x86_64")]
macro_rules! tree {
    ($lanes:expr, $four:ident, $one:expr) => {{
        use std::arch::x86_64::*;
        let lanes: [f32; LANES] = $lanes;
        // SAFETY: every x86-64 processor has SSE.
        unsafe {
            let mut all: [__m128; 8] = std::array::from_fn(|i| {
                let at = 4 * i;
                _mm_setr_ps(lanes[at], lanes[at + 1], lanes[at + 2], lanes[at + 3])
            });
            for half in [4, 2, 1] {
                for i in 0..half {
                    all[i] = $four(all[i + half], all[i]);
                }
            }
            let two = $four(_mm_movehl_ps(all[0], all[0]), all[0]);
            _mm_cvtss_f32($four(_mm_shuffle_ps::<1>(two, two), two))
        }
    }};
}
#[cfg(not(target_arch = "x86_64"))]
macro_rules! tree {
    ($lanes:expr, $four:ident, $one:expr) => {{
        let lanes: [f32; LANES] = $lanes;
        let combine = $one;
        let a: [f32; 16] = std::array::from_fn(|i| combine(lanes[i], lanes[i + 16]));
        let b: [f32; 8] = std::array::from_fn(|i| combine(a[i], a[i + 8]));
        let c: [f32; 4] = std::array::from_fn(|i| combine(b[i], b[i + 4]));
        combine(combine(c[0], c[2]), combine(c[1], c[3]))
    }};
}

/// Sum of the lanes.
#[inline(always)]
pub(crate) fn fold(lanes: [f32; LANES]) -> f32 {
    tree!(lanes, _mm_add_ps, |a: f32, b: f32| a + b)
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// `sum a`.
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] += block[lane];
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value;
    }
    fold(lanes)
}

/// `sum a b`.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b[..a.len()].as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane = a.mul_add(*b, *lane);
    }
    fold(lanes)
}

/// Largest value; NaN is passed over, the maximum of nothing is -inf.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], block[lane]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, *value);
    }
    tree!(lanes, _mm_max_ps, larger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::rand_vec;

    #[test]
    fn reductions_match_f64_at_every_length() {
        for n in [0, 1, 2, 31, 32, 33, 64, 95, 257] {
            let (a, b) = (rand_vec(1, n), rand_vec(2, n));
            let term = |i: usize| (a[i] as f64, b[i] as f64);
            let total = |f: &dyn Fn((f64, f64)) -> f64| (0..n).map(|i| f(term(i))).sum::<f64>();
            assert!((sum(&a) as f64 - total(&|(a, _)| a)).abs() < 1e-5);
            assert!((dot(&a, &b) as f64 - total(&|(a, b)| a * b)).abs() < 1e-5);
            let want = a.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
            assert_eq!(max(&a), want);
        }
    }

    #[test]
    fn blocks_cover_everything_in_order() {
        for n in [1usize, 100, 5 * BLOCK + 3] {
            let starts = collect((0..n).step_by(BLOCK), n, |start| start);
            assert_eq!(starts, (0..n).step_by(BLOCK).collect::<Vec<_>>());
            let mut seen = vec![0.0; n];
            each(seen.chunks_mut(BLOCK), n, |block| {
                block.iter_mut().for_each(|v| *v += 1.0)
            });
            assert!(seen.iter().all(|v| *v == 1.0));
        }
    }
}
