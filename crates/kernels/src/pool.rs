//! Average pooling as a token mixer (PoolFormer, Yu et al., 2022): the mean of a token's neighbourhood minus the token.
//!
//! The window is 3 in time, or 3 x 3 on a grid; cells outside do not count. Channels last. With `S` the sum over the
//! window and `n` the number of cells in it, `y = S x / n - x` and, the window being symmetric, `dx = S (dy / n) - dy`.

use crate::simd::{block_rows, dispatched, each};

/// Which pass: they differ in whose count divides a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// `x -> y`.
    Forward,
    /// `dy -> dx`.
    Backward,
}

/// Window 3 over time for packed sequences `[total, channels]`; nothing crosses the `offsets`.
pub fn pool_time(pass: Pass, channels: usize, offsets: &[usize], x: &[f32], y: &mut [f32]) {
    let total = offsets.last().copied().unwrap_or(0);
    assert_eq!(x.len(), total * channels, "pool: offsets and x");
    let grids = offsets.windows(2).map(|pair| [pair[1] - pair[0], 1]);
    pool(pass, channels, grids, x, y);
}

/// Window 3 x 3 for a batch of grids `[batch, height, width, channels]`.
pub fn pool_grid(
    pass: Pass,
    channels: usize,
    [height, width]: [usize; 2],
    x: &[f32],
    y: &mut [f32],
) {
    let size = height * width * channels;
    if size == 0 {
        assert!(
            x.is_empty() && y.is_empty(),
            "pool: an empty grid has values"
        );
        return;
    }
    assert_eq!(
        x.len() % size,
        0,
        "pool: {} values in grids of {size}",
        x.len()
    );
    let grids = std::iter::repeat_n([height, width], x.len() / size);
    pool(pass, channels, grids, x, y);
}

/// Means of the rows `bounds[i]..bounds[i + 1]` of `[total, channels]`, `[segments, channels]`; zero of no rows.
pub fn segment_means(channels: usize, bounds: &[usize], x: &[f32], y: &mut [f32]) {
    check_segments(channels, bounds, x, y);
    let segments = bounds.windows(2).zip(y.chunks_mut(channels));
    each(segments, x.len(), |(rows, y)| {
        mean(&x[rows[0] * channels..rows[1] * channels], y)
    });
}

/// The gradient of [`segment_means`].
pub fn segment_means_backward(channels: usize, bounds: &[usize], dy: &[f32], dx: &mut [f32]) {
    check_segments(channels, bounds, dx, dy);
    for (rows, dy) in bounds.windows(2).zip(dy.chunks(channels)) {
        let factor = 1.0 / (rows[1] - rows[0]) as f32;
        for dx in dx[rows[0] * channels..rows[1] * channels].chunks_mut(channels) {
            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = factor * dy);
        }
    }
}

fn check_segments(channels: usize, bounds: &[usize], rows: &[f32], means: &[f32]) {
    let total = bounds.last().copied().unwrap_or(0);
    let segments = bounds.len().saturating_sub(1);
    assert!(
        channels > 0 && bounds.first() == Some(&0),
        "segments: bounds"
    );
    assert_eq!(rows.len(), total * channels, "segments: bounds and x");
    assert_eq!(means.len(), segments * channels, "segments: bounds and y");
}

dispatched! {
    fn mean<'a>(x: &'a [f32], y: &'a mut [f32]) {
        let channels = y.len();
        y.fill(0.0);
        for x in x.chunks_exact(channels) {
            for c in 0..channels {
                y[c] += x[c];
            }
        }
        let factor = 1.0 / (x.len() / channels).max(1) as f32;
        for c in 0..channels {
            y[c] *= factor;
        }
    }
}

/// Grids one after the other; a sequence is a grid of width 1.
fn pool(
    pass: Pass,
    channels: usize,
    grids: impl Iterator<Item = [usize; 2]>,
    mut x: &[f32],
    y: &mut [f32],
) {
    assert_eq!(x.len(), y.len(), "pool: x and y");
    if x.is_empty() {
        return;
    }
    let values = x.len();
    let mut rest = y;
    let mut bands = Vec::new();
    for [height, width] in grids {
        let row = width * channels;
        let (grid, after) = x.split_at(height * row);
        let (out, out_after) = std::mem::take(&mut rest).split_at_mut(height * row);
        (x, rest) = (after, out_after);
        let rows = block_rows(row);
        for (index, out) in out.chunks_mut(rows * row).enumerate() {
            bands.push(Band {
                grid,
                height,
                width,
                first: index * rows,
                out,
            });
        }
    }
    each(bands.into_iter(), values, |band| {
        pool_band(pass, channels, band)
    });
}

/// Some rows of the output of a grid.
struct Band<'a> {
    grid: &'a [f32],
    height: usize,
    width: usize,
    first: usize,
    out: &'a mut [f32],
}

/// The neighbours of `at` among `0..size`, itself included.
#[inline(always)]
fn around(at: usize, size: usize) -> std::ops::Range<usize> {
    at.saturating_sub(1)..(at + 2).min(size)
}

dispatched! {
    fn pool_band<'a>(pass: Pass, channels: usize, band: Band<'a>) {
        let Band { grid, height, width, first, out } = band;
        for (index, out) in out.chunks_exact_mut(channels).enumerate() {
            let (row, column) = (first + index / width, index % width);
            let (rows, columns) = (around(row, height), around(column, width));
            let own = &grid[(row * width + column) * channels..][..channels];
            for (out, own) in out.iter_mut().zip(own) {
                *out = -own;
            }
            for r in rows.clone() {
                for c in columns.clone() {
                    let count = match pass {
                        Pass::Forward => rows.len() * columns.len(),
                        Pass::Backward => around(r, height).len() * around(c, width).len(),
                    };
                    let scale = 1.0 / count as f32;
                    let cell = &grid[(r * width + c) * channels..][..channels];
                    for (out, cell) in out.iter_mut().zip(cell) {
                        *out = cell.mul_add(scale, *out);
                    }
                }
            }
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

#[cfg(any(test, fuzzing))]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    fn naive(channels: usize, [height, width]: [usize; 2], x: &[f64]) -> Vec<f64> {
        let mut y = vec![0.0; x.len()];
        for row in 0..height as i64 {
            for column in 0..width as i64 {
                for channel in 0..channels {
                    let (mut sum, mut count) = (0.0, 0.0);
                    for r in row - 1..=row + 1 {
                        for c in column - 1..=column + 1 {
                            if (0..height as i64).contains(&r) && (0..width as i64).contains(&c) {
                                sum += x[(r as usize * width + c as usize) * channels + channel];
                                count += 1.0;
                            }
                        }
                    }
                    let at = (row as usize * width + column as usize) * channels + channel;
                    y[at] = sum / count - x[at];
                }
            }
        }
        y
    }

    #[test]
    fn packed_sequences_match_naive() {
        let channels = 5;
        let offsets = [0, 1, 1, 4, 6, 13];
        let n = 13 * channels;
        let (x, dy) = (rand_vec(1, n), rand_vec(2, n));
        let (want, grads) = differences(&[&x], &dy, |v| {
            offsets
                .windows(2)
                .flat_map(|o| {
                    naive(
                        channels,
                        [o[1] - o[0], 1],
                        &v[0][o[0] * channels..o[1] * channels],
                    )
                })
                .collect()
        });
        let (mut y, mut dx) = (vec![9.0; n], vec![9.0; n]);
        pool_time(Pass::Forward, channels, &offsets, &x, &mut y);
        pool_time(Pass::Backward, channels, &offsets, &dy, &mut dx);
        assert_close("pool", &y, &want, 1e-6);
        assert_close("pool dx", &dx, &grads[0], 1e-6);
        assert!(
            y[..channels].iter().all(|v| v.abs() < 1e-7),
            "a lone token pools to itself"
        );
    }

    #[test]
    fn grids_match_naive() {
        for [height, width] in [[1, 1], [1, 4], [2, 2], [3, 3], [5, 7]] {
            let (batch, channels) = (2, 3);
            let size = height * width * channels;
            let (x, dy) = (rand_vec(1, batch * size), rand_vec(2, batch * size));
            let (want, grads) = differences(&[&x], &dy, |v| {
                v[0].chunks(size)
                    .flat_map(|x| naive(channels, [height, width], x))
                    .collect()
            });
            let (mut y, mut dx) = (vec![9.0; x.len()], vec![9.0; x.len()]);
            pool_grid(Pass::Forward, channels, [height, width], &x, &mut y);
            pool_grid(Pass::Backward, channels, [height, width], &dy, &mut dx);
            assert_close("pool", &y, &want, 1e-6);
            assert_close("pool dx", &dx, &grads[0], 1e-6);
        }
    }

    /// A problem from bytes: a grid, against the naive form.
    pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
        let (grid, channels) = (
            [bytes.number(1, 20), bytes.number(1, 20)],
            bytes.number(1, 40),
        );
        let x = rand_vec(1, grid[0] * grid[1] * channels);
        let x64: Vec<f64> = x.iter().map(|v| *v as f64).collect();
        let want: Vec<f32> = naive(channels, grid, &x64)
            .iter()
            .map(|v| *v as f32)
            .collect();
        let mut y = vec![9.0; x.len()];
        pool_grid(Pass::Forward, channels, grid, &x, &mut y);
        assert_close("pool", &y, &want, 1e-6);
        // The backward is the adjoint: <pool x, d> = <x, back d>.
        let d = rand_vec(2, x.len());
        let mut dx = vec![9.0; x.len()];
        pool_grid(Pass::Backward, channels, grid, &d, &mut dx);
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
        };
        let (there, back) = (dot(&y, &d), dot(&x, &dx));
        let size = x.len() as f64;
        assert!(
            (there - back).abs() < 1e-6 * size,
            "{there} and {back} on {grid:?}"
        );
    }

    #[test]
    fn a_constant_pools_to_zero_and_blocks_do_not_show() {
        let (height, width, channels) = (60, 50, 17);
        let constant = vec![0.7; height * width * channels];
        let mut y = vec![9.0; constant.len()];
        pool_grid(Pass::Forward, channels, [height, width], &constant, &mut y);
        assert!(y.iter().all(|v| v.abs() < 1e-6));
        let x = rand_vec(3, constant.len());
        let x64: Vec<f64> = x.iter().map(|v| *v as f64).collect();
        pool_grid(Pass::Forward, channels, [height, width], &x, &mut y);
        let want = naive(channels, [height, width], &x64);
        let want: Vec<f32> = want.iter().map(|v| *v as f32).collect();
        assert_close("pool", &y, &want, 1e-6);
    }

    #[test]
    fn segment_means_match_their_equation() {
        let (channels, bounds) = (3, [0, 2, 2, 5, 6]);
        let (x, dy) = (rand_vec(1, 6 * channels), rand_vec(2, 4 * channels));
        let (want, grads) = differences(&[&x], &dy, |v| {
            let mean = |rows: &[usize], c: usize| {
                let sum: f64 = (rows[0]..rows[1]).map(|row| v[0][row * channels + c]).sum();
                sum / (rows[1] - rows[0]).max(1) as f64
            };
            let all = bounds
                .windows(2)
                .flat_map(|rows| (0..channels).map(move |c| (rows, c)));
            all.map(|(rows, c)| mean(rows, c)).collect()
        });
        let (mut y, mut dx) = (vec![0.0; 12], vec![0.0; 18]);
        segment_means(channels, &bounds, &x, &mut y);
        assert_close("means", &y, &want, 1e-6);
        segment_means_backward(channels, &bounds, &dy, &mut dx);
        assert_close("dx", &dx, &grads[0], 2e-5);
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[
            packed_sequences_match_naive,
            grids_match_naive,
            segment_means_match_their_equation,
        ]);
    }
}
