//! Feature maps over blocks of tokens `[dim, ROWS]`, and their gradients.

use super::{ROWS, across};
use crate::gemm::Matrix;
use crate::math::exp;
use crate::simd::dispatched;

/// What makes non-negative features of queries and keys (of any sign for [`Map::Identity`]).
#[derive(Clone, Copy, Debug)]
pub enum Map<'a> {
    /// `x`.
    Identity,
    /// `elu(x) + 1`: `x + 1` above zero, `e^x` below (arXiv 2006.16236).
    Elu,
    /// `max(x, 0) + add`.
    Relu {
        /// Added to each feature.
        add: f32,
    },
    /// `[max(x, 0) sin a, max(x, 0) cos a]` with an angle for each token (cosFormer, arXiv 2202.08791).
    Turned {
        /// `sin a`, `[total]`.
        sin: &'a [f32],
        /// `cos a`, `[total]`.
        cos: &'a [f32],
    },
    /// `max(W x, 0) + add` (the generalised kernel of arXiv 2009.14794).
    RandomRelu {
        /// W, `[features, dim]`.
        rows: &'a [f32],
        /// Added to each feature.
        add: f32,
    },
    /// `features^(-1/2) (exp(W x' - |x'|^2 / 2 - c) + eps)` with `x' = dim^(-1/4) x` (the softmax kernel of arXiv 2009.14794); c
    /// is the largest `W x'` of a query, and of all keys of a head, and counts as a constant.
    RandomExp {
        /// W, `[features, dim]`.
        rows: &'a [f32],
        /// Added to each exponential.
        eps: f32,
    },
}

/// Whose features.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    Query,
    /// With the stabiliser of the head's keys.
    Key(f32),
}

impl Map<'_> {
    /// Features that come of `dim`.
    pub fn features(&self, dim: usize) -> usize {
        match self {
            Map::Identity | Map::Elu | Map::Relu { .. } => dim,
            Map::Turned { .. } => 2 * dim,
            Map::RandomRelu { rows, .. } | Map::RandomExp { rows, .. } => rows.len() / dim.max(1),
        }
    }

    /// Operations of the map over `rows` queries or keys; zero where it is elementwise.
    pub fn flops(&self, rows: usize) -> u64 {
        match self {
            Map::RandomRelu { rows: matrix, .. } | Map::RandomExp { rows: matrix, .. } => {
                2 * (rows * matrix.len()) as u64
            }
            _ => 0,
        }
    }

    pub(super) fn check(&self, total: usize, dim: usize) {
        match self {
            Map::Turned { sin, cos } => {
                assert_eq!([sin.len(), cos.len()], [total; 2], "feature map angles");
            }
            Map::RandomRelu { rows, .. } | Map::RandomExp { rows, .. } => {
                assert!(
                    !rows.is_empty() && rows.len().is_multiple_of(dim),
                    "feature map rows"
                );
            }
            _ => {}
        }
    }

    /// Factor of queries and keys before the map.
    pub(super) fn factor(&self, dim: usize) -> f32 {
        match self {
            Map::RandomExp { .. } => (dim as f32).powf(-0.25),
            _ => 1.0,
        }
    }

    /// True where keys have a stabiliser.
    pub(super) fn has_most(&self) -> bool {
        matches!(self, Map::RandomExp { .. })
    }

    /// The largest `W x'` of `count` tokens; `scratch` is `[features, ROWS]`.
    pub(super) fn most(&self, x: &[f32], count: usize, scratch: &mut [f32]) -> f32 {
        let (features, dim) = (scratch.len() / ROWS, x.len() / ROWS);
        match self {
            Map::RandomExp { rows, .. } => {
                across([features, dim], Matrix::rows(rows, dim), x, scratch);
                let lanes = largest(scratch);
                lanes[..count]
                    .iter()
                    .fold(f32::NEG_INFINITY, |a, b| a.max(*b))
            }
            _ => 0.0,
        }
    }

    /// Features `[features, ROWS]` of tokens `[dim, ROWS]` that begin at token `from`.
    pub(super) fn forward(&self, x: &[f32], from: usize, side: Side, phi: &mut [f32]) {
        let (features, dim) = (phi.len() / ROWS, x.len() / ROWS);
        match self {
            Map::Identity => phi.copy_from_slice(x),
            Map::Elu => elu(x, phi),
            Map::Relu { add } => relu(x, *add, phi),
            Map::Turned { sin, cos } => turn(x, &angles(sin, from), &angles(cos, from), phi),
            Map::RandomRelu { rows, add } => {
                across([features, dim], Matrix::rows(rows, dim), x, phi);
                relu_here(phi, *add);
            }
            Map::RandomExp { rows, eps } => {
                across([features, dim], Matrix::rows(rows, dim), x, phi);
                let most = match side {
                    Side::Query => largest(phi),
                    Side::Key(most) => [most; ROWS],
                };
                exponentials(x, &most, *eps, phi);
            }
        }
    }

    /// Gradients of tokens from those of their features, which are used up. `phi` is what [`Self::forward`] gave for `x`.
    pub(super) fn backward(
        &self,
        x: &[f32],
        from: usize,
        phi: &[f32],
        dphi: &mut [f32],
        dx: &mut [f32],
    ) {
        let (features, dim) = (phi.len() / ROWS, x.len() / ROWS);
        let turned = |rows| Matrix::rows(rows, dim).transposed();
        match self {
            Map::Identity => dx.copy_from_slice(dphi),
            Map::Elu => elu_back(x, phi, dphi, dx),
            Map::Relu { .. } => relu_back(x, dphi, dx),
            Map::Turned { sin, cos } => {
                turn_back(x, &angles(sin, from), &angles(cos, from), dphi, dx);
            }
            Map::RandomRelu { rows, add } => {
                keep_above(phi, *add, dphi);
                across([dim, features], turned(rows), dphi, dx);
            }
            Map::RandomExp { rows, eps } => {
                let sums = exponentials_back(phi, *eps, dphi);
                across([dim, features], turned(rows), dphi, dx);
                subtract(x, &sums, dx);
            }
        }
    }
}

/// The values of a block's tokens; zero past the last one.
fn angles(values: &[f32], from: usize) -> [f32; ROWS] {
    let mut block = [0.0; ROWS];
    let count = ROWS.min(values.len() - from);
    block[..count].copy_from_slice(&values[from..from + count]);
    block
}

dispatched! {
    /// The largest of each lane.
    fn largest<'a>(phi: &'a [f32]) -> [f32; ROWS] {
        let mut most = [f32::NEG_INFINITY; ROWS];
        for row in phi.chunks_exact(ROWS) {
            for l in 0..ROWS {
                most[l] = if row[l] > most[l] { row[l] } else { most[l] };
            }
        }
        most
    }
}

dispatched! {
    fn elu<'a>(x: &'a [f32], phi: &'a mut [f32]) {
        for (x, phi) in x.chunks_exact(ROWS).zip(phi.chunks_exact_mut(ROWS)) {
            for l in 0..ROWS {
                let low = exp(x[l]);
                phi[l] = if x[l] > 0.0 { x[l] + 1.0 } else { low };
            }
        }
    }
}

dispatched! {
    fn elu_back<'a>(x: &'a [f32], phi: &'a [f32], dphi: &'a [f32], dx: &'a mut [f32]) {
        for i in 0..x.len() {
            dx[i] = if x[i] > 0.0 { dphi[i] } else { dphi[i] * phi[i] };
        }
    }
}

dispatched! {
    fn relu<'a>(x: &'a [f32], add: f32, phi: &'a mut [f32]) {
        for i in 0..x.len() {
            phi[i] = if x[i] > 0.0 { x[i] + add } else { add };
        }
    }
}

dispatched! {
    fn relu_here<'a>(phi: &'a mut [f32], add: f32) {
        for value in phi {
            *value = if *value > 0.0 { *value + add } else { add };
        }
    }
}

dispatched! {
    fn relu_back<'a>(x: &'a [f32], dphi: &'a [f32], dx: &'a mut [f32]) {
        for i in 0..x.len() {
            dx[i] = if x[i] > 0.0 { dphi[i] } else { 0.0 };
        }
    }
}

dispatched! {
    fn keep_above<'a>(phi: &'a [f32], least: f32, dphi: &'a mut [f32]) {
        for i in 0..phi.len() {
            dphi[i] = if phi[i] > least { dphi[i] } else { 0.0 };
        }
    }
}

dispatched! {
    fn turn<'a>(x: &'a [f32], sin: &'a [f32; ROWS], cos: &'a [f32; ROWS], phi: &'a mut [f32]) {
        let (first, second) = phi.split_at_mut(x.len());
        let rows = first.chunks_exact_mut(ROWS).zip(second.chunks_exact_mut(ROWS));
        for (x, (first, second)) in x.chunks_exact(ROWS).zip(rows) {
            for l in 0..ROWS {
                let x = if x[l] > 0.0 { x[l] } else { 0.0 };
                first[l] = x * sin[l];
                second[l] = x * cos[l];
            }
        }
    }
}

dispatched! {
    fn turn_back<'a>(
        x: &'a [f32],
        sin: &'a [f32; ROWS],
        cos: &'a [f32; ROWS],
        dphi: &'a [f32],
        dx: &'a mut [f32],
    ) {
        let (first, second) = dphi.split_at(x.len());
        let rows = first.chunks_exact(ROWS).zip(second.chunks_exact(ROWS));
        let rows = rows.zip(x.chunks_exact(ROWS)).zip(dx.chunks_exact_mut(ROWS));
        for (((first, second), x), dx) in rows {
            for l in 0..ROWS {
                let sum = first[l].mul_add(sin[l], second[l] * cos[l]);
                dx[l] = if x[l] > 0.0 { sum } else { 0.0 };
            }
        }
    }
}

dispatched! {
    /// `W x'` becomes features.
    fn exponentials<'a>(x: &'a [f32], most: &'a [f32; ROWS], eps: f32, phi: &'a mut [f32]) {
        let factor = ((phi.len() / ROWS) as f32).powf(-0.5);
        let mut base = *most;
        for x in x.chunks_exact(ROWS) {
            for l in 0..ROWS {
                base[l] = (0.5 * x[l]).mul_add(x[l], base[l]);
            }
        }
        for phi in phi.chunks_exact_mut(ROWS) {
            for l in 0..ROWS {
                phi[l] = factor * (exp(phi[l] - base[l]) + eps);
            }
        }
    }
}

dispatched! {
    /// Gradients of features become those of exponents; gives their sums over the features.
    fn exponentials_back<'a>(phi: &'a [f32], eps: f32, dphi: &'a mut [f32]) -> [f32; ROWS] {
        let least = eps * ((phi.len() / ROWS) as f32).powf(-0.5);
        let mut sums = [0.0; ROWS];
        for (phi, dphi) in phi.chunks_exact(ROWS).zip(dphi.chunks_exact_mut(ROWS)) {
            for l in 0..ROWS {
                dphi[l] *= phi[l] - least;
                sums[l] += dphi[l];
            }
        }
        sums
    }
}

dispatched! {
    /// `dx -= sums x`.
    fn subtract<'a>(x: &'a [f32], sums: &'a [f32; ROWS], dx: &'a mut [f32]) {
        for (x, dx) in x.chunks_exact(ROWS).zip(dx.chunks_exact_mut(ROWS)) {
            for l in 0..ROWS {
                dx[l] = (-sums[l]).mul_add(x[l], dx[l]);
            }
        }
    }
}
