//! Rotary position embedding (Su et al., 2021), half-split layout: value `i` of a head turns with value `i + half`.
//!
//! `y_i = x_i cos - x_(i+half) sin`, `y_(i+half) = x_(i+half) cos + x_i sin`, with the angle `position * inv_freq_i`. A head
//! longer than twice the frequencies keeps its remaining values. The map is orthogonal: the backward turns back.

use crate::math;
use crate::simd::{BLOCK, block_rows, dispatched, each};

/// Cosines and sines of the angles of each position, `[positions, half]`.
#[derive(Clone, Debug)]
pub struct Rotations {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotations {
    /// The angles `position * inv_freq`; the product is rounded to f32 first, as the reference implementations do.
    pub fn new(positions: &[usize], inv_freq: &[f32]) -> Self {
        let half = inv_freq.len();
        let (mut cos, mut sin) = (
            vec![0.0; positions.len() * half],
            vec![0.0; positions.len() * half],
        );
        if half > 0 {
            let rows = block_rows(half);
            let outputs = cos.chunks_mut(rows * half).zip(sin.chunks_mut(rows * half));
            let blocks = positions.chunks(rows).zip(outputs);
            // An angle costs about as much as eight of the values that a block is measured in.
            each(
                blocks,
                8 * positions.len() * half,
                |(positions, (cos, sin))| {
                    angles(positions, inv_freq, cos, sin);
                },
            );
        }
        Rotations { half, cos, sin }
    }

    /// Frequencies: values that turn are twice as many.
    pub fn half(&self) -> usize {
        self.half
    }

    /// Cosines, `[positions, half]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines, `[positions, half]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// True when there is no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Frequencies `base^(-2 i / dim)` for `i` in `0..dim / 2`.
pub fn inverse_frequencies(dim: usize, base: f64) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| base.powf(-2.0 * i as f64 / dim as f64) as f32)
        .collect()
}

/// Turns `x` (`[total, heads, head_dim]`); row `t` by position `t % rotations.len()`, so that the positions of one
/// sequence serve a batch of equal ones. `inverse` turns back, which is the backward.
pub fn rotate(
    heads: usize,
    head_dim: usize,
    rotations: &Rotations,
    inverse: bool,
    x: &[f32],
    y: &mut [f32],
) {
    let width = heads * head_dim;
    let half = rotations.half;
    assert_eq!(x.len(), y.len(), "rope: x and y");
    assert!(
        2 * half <= head_dim,
        "rope: {half} frequencies for head_dim {head_dim}"
    );
    if x.is_empty() {
        return;
    }
    assert_eq!(
        x.len() % width,
        0,
        "rope: {} values in rows of {width}",
        x.len()
    );
    if half == 0 {
        y.copy_from_slice(x);
        return;
    }
    let rows = x.len() / width;
    assert!(
        !rotations.is_empty() && rows.is_multiple_of(rotations.len()),
        "rope: {} positions for {rows} rows",
        rotations.len()
    );
    let per_block = (BLOCK / width).max(1);
    let blocks = x
        .chunks(per_block * width)
        .zip(y.chunks_mut(per_block * width))
        .enumerate();
    let sign = if inverse { -1.0 } else { 1.0 };
    each(blocks, x.len(), |(index, (x, y))| {
        rotate_block([width, head_dim], rotations, index * per_block, sign, x, y);
    });
}

dispatched! {
    fn angles<'a>(positions: &'a [usize], inv_freq: &'a [f32], cos: &'a mut [f32], sin: &'a mut [f32]) {
        let half = inv_freq.len();
        let rows = cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half));
        for (position, (cos, sin)) in positions.iter().zip(rows) {
            let position = *position as f32;
            for i in 0..half {
                (sin[i], cos[i]) = math::sin_cos(position * inv_freq[i]);
            }
        }
    }
}

dispatched! {
    fn rotate_block<'a>(
        extents: [usize; 2],
        rotations: &'a Rotations,
        first: usize,
        sign: f32,
        x: &'a [f32],
        y: &'a mut [f32],
    ) {
        let [width, head_dim] = extents;
        let half = rotations.half;
        let count = rotations.cos.len() / half;
        for (row, (x, y)) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).enumerate() {
            let at = (first + row) % count * half;
            let (cos, sin) = (&rotations.cos[at..][..half], &rotations.sin[at..][..half]);
            for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
                let (x_low, x_rest) = x.split_at(half);
                let (x_high, x_kept) = x_rest.split_at(half);
                let (y_low, y_rest) = y.split_at_mut(half);
                let (y_high, y_kept) = y_rest.split_at_mut(half);
                for i in 0..half {
                    let s = sign * sin[i];
                    y_low[i] = x_low[i] * cos[i] - x_high[i] * s;
                    y_high[i] = x_high[i] * cos[i] + x_low[i] * s;
                }
                y_kept.copy_from_slice(x_kept);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    fn naive(extents: [usize; 3], positions: &[usize], inv_freq: &[f32], x: &[f64]) -> Vec<f64> {
        let [rows, heads, dim] = extents;
        let half = inv_freq.len();
        let mut y = x.to_vec();
        for row in 0..rows {
            for head in 0..heads {
                let at = (row * heads + head) * dim;
                for i in 0..half {
                    let angle = (positions[row % positions.len()] as f32 * inv_freq[i]) as f64;
                    let (low, high) = (x[at + i], x[at + half + i]);
                    y[at + i] = low * angle.cos() - high * angle.sin();
                    y[at + half + i] = high * angle.cos() + low * angle.sin();
                }
            }
        }
        y
    }

    #[test]
    fn rotation_and_its_inverse() {
        for (rows, heads, dim, rotary, period) in [
            (1, 1, 2, 2, 1),
            (6, 3, 10, 10, 3),
            (5, 2, 37, 20, 5),
            (4, 1, 7, 0, 4),
        ] {
            let positions: Vec<usize> = (0..period).map(|t| (t * 7919 + 3) % 100_000).collect();
            let inv_freq = inverse_frequencies(rotary, 10_000.0);
            let n = rows * heads * dim;
            let (x, dy) = (rand_vec(1, n), rand_vec(2, n));
            let (want, grads) = differences(&[&x], &dy, |v| {
                naive([rows, heads, dim], &positions, &inv_freq, v[0])
            });
            let rotations = Rotations::new(&positions, &inv_freq);
            let (mut y, mut dx, mut back) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            rotate(heads, dim, &rotations, false, &x, &mut y);
            rotate(heads, dim, &rotations, true, &dy, &mut dx);
            rotate(heads, dim, &rotations, true, &y, &mut back);
            assert_close("rope", &y, &want, 1e-6);
            assert_close("rope dx", &dx, &grads[0], 1e-6);
            assert_close("rope there and back", &back, &x, 1e-6);
        }
    }

    #[test]
    fn many_rows_over_blocks() {
        let (rows, heads, dim) = (700, 3, 32);
        let positions: Vec<usize> = (0..350).collect();
        let inv_freq = inverse_frequencies(dim, 10_000.0);
        let x = rand_vec(1, rows * heads * dim);
        let x64: Vec<f64> = x.iter().map(|v| *v as f64).collect();
        let mut y = vec![0.0; x.len()];
        rotate(
            heads,
            dim,
            &Rotations::new(&positions, &inv_freq),
            false,
            &x,
            &mut y,
        );
        let want = naive([rows, heads, dim], &positions, &inv_freq, &x64);
        let want: Vec<f32> = want.iter().map(|v| *v as f32).collect();
        assert_close("rope", &y, &want, 1e-6);
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[rotation_and_its_inverse, many_rows_over_blocks]);
    }
}
