//! Feature maps over blocks of tokens, and their gradients.

use super::rows::{LANES, add, exponentials, exponentials_back, largest};
use crate::gemm::{Matrix, Rows, product, row_dots};
use crate::math::exp;
use crate::simd::dispatched;
use crate::transpose::transpose;

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
pub(super) enum Side<'a> {
    Query,
    /// With the stabiliser of each head's keys.
    Key(&'a [f32]),
}

impl<'a> Map<'a> {
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
        self.matrix()
            .map_or(0, |matrix| 2 * (rows * matrix.len()) as u64)
    }

    fn matrix(&self) -> Option<&'a [f32]> {
        match self {
            Map::RandomRelu { rows, .. } | Map::RandomExp { rows, .. } => Some(rows),
            _ => None,
        }
    }

    pub(super) fn check(&self, total: usize, dim: usize) {
        if let Map::Turned { sin, cos } = self {
            assert_eq!([sin.len(), cos.len()], [total; 2], "feature map angles");
        }
        if let Some(rows) = self.matrix() {
            assert!(
                !rows.is_empty() && rows.len().is_multiple_of(dim),
                "feature map rows"
            );
        }
    }

    /// Values from one head's features to the next one's. Features of a matrix are filled up to whole vectors, so that loops
    /// along a row have no rest.
    pub(super) fn width(&self, dim: usize) -> usize {
        let features = self.features(dim);
        match self.matrix() {
            Some(_) => features.next_multiple_of(LANES),
            None => features,
        }
    }

    /// Added to each exponential, where keys have a stabiliser.
    pub(super) fn eps(&self) -> Option<f32> {
        match self {
            Map::RandomExp { eps, .. } => Some(*eps),
            _ => None,
        }
    }
}

/// A map with what all blocks share.
pub(super) struct Prepared<'a> {
    map: Map<'a>,
    heads: usize,
    dim: usize,
    features: usize,
    width: usize,
    /// Factor of queries and keys before the map; the matrices have it.
    factor: f32,
    /// `[features, dim]`.
    rows: Vec<f32>,
    /// `[dim, width]`.
    turned: Vec<f32>,
}

impl<'a> Prepared<'a> {
    pub(super) fn new(map: Map<'a>, heads: usize, dim: usize) -> Self {
        let (features, width) = (map.features(dim), map.width(dim));
        let factor = match map.eps() {
            Some(_) => (dim as f32).powf(-0.25),
            None => 1.0,
        };
        let rows: Vec<f32> = map.matrix().unwrap_or_default().to_vec();
        let rows: Vec<f32> = rows.iter().map(|value| factor * value).collect();
        let mut turned = vec![0.0; if rows.is_empty() { 0 } else { dim * width }];
        if !rows.is_empty() {
            transpose([features, dim], 1.0, &rows, dim, &mut turned, width);
        }
        Prepared {
            map,
            heads,
            dim,
            features,
            width,
            factor,
            rows,
            turned,
        }
    }

    /// Factor of an exponential.
    pub(super) fn scale(&self) -> f32 {
        (self.features as f32).powf(-0.5)
    }

    /// `W x'` as rows of `width`.
    fn project(&self, x: &[f32], phi: &mut [f32]) {
        let shape = [x.len() / self.dim, self.dim, self.width];
        let (x, matrix) = (
            Matrix::rows(x, self.dim),
            Matrix::rows(&self.turned, self.width),
        );
        product(shape, 1.0, x, matrix, phi, (self.width, 1), false);
    }

    /// `|x'|^2 / 2` of each row.
    fn half_squares(&self, x: &[f32]) -> Vec<f32> {
        let mut halves = vec![0.0; x.len() / self.dim];
        let rows = Rows(x, self.dim);
        row_dots(self.dim, rows, rows, &mut halves, 1);
        let factor = 0.5 * self.factor * self.factor;
        halves.iter_mut().for_each(|half| *half *= factor);
        halves
    }

    /// Exponentials of keys less the largest exponent so far, `[heads]`, which this block may raise; without factor and eps.
    /// `raised` is called with a head and the factor of what came before.
    pub(super) fn keys_so_far(
        &self,
        x: &[f32],
        phi: &mut [f32],
        most: &mut [f32],
        mut raised: impl FnMut(usize, f32),
    ) {
        self.project(x, phi);
        let mut base = self.half_squares(x);
        let mut rows = vec![0.0; base.len()];
        largest(phi, self.width, self.features, &mut rows);
        for (head, most) in most.iter_mut().enumerate() {
            let own = rows.iter().skip(head).step_by(self.heads);
            let now = own.fold(*most, |a, b| a.max(*b));
            if now > *most {
                raised(head, exp(*most - now));
                *most = now;
            }
        }
        for (base, most) in base.iter_mut().zip(most.iter().cycle()) {
            *base += most;
        }
        exponentials(phi, self.width, self.features, &base, 0.0, 1.0);
    }

    /// Features `[tokens, heads, width]` of rows `[tokens, heads, dim]` that begin at token `from`.
    pub(super) fn forward(&self, x: &[f32], from: usize, side: Side, phi: &mut [f32]) {
        match self.map {
            Map::Identity => phi.copy_from_slice(x),
            Map::Elu => elu(x, phi),
            Map::Relu { add } => relu(x, add, phi),
            Map::Turned { sin, cos } => {
                let sizes = [self.heads, self.dim];
                turn(sizes, x, &sin[from..], &cos[from..], phi);
            }
            Map::RandomRelu { add, .. } => {
                self.project(x, phi);
                relu_here(phi, add);
            }
            Map::RandomExp { eps, .. } => {
                self.project(x, phi);
                let mut base = self.half_squares(x);
                match side {
                    Side::Query => {
                        let mut rows = vec![0.0; base.len()];
                        largest(phi, self.width, self.features, &mut rows);
                        base.iter_mut()
                            .zip(rows)
                            .for_each(|(base, most)| *base += most);
                    }
                    Side::Key(most) => base
                        .iter_mut()
                        .zip(most.iter().cycle())
                        .for_each(|(base, most)| *base += most),
                }
                exponentials(phi, self.width, self.features, &base, eps, self.scale());
            }
        }
    }

    /// Gradients of rows from those of their features, which are used up. `phi` is what [`Self::forward`] gave for `x`.
    pub(super) fn backward(
        &self,
        x: &[f32],
        from: usize,
        phi: &[f32],
        dphi: &mut [f32],
        dx: &mut [f32],
    ) {
        match self.map {
            Map::Identity => dx.copy_from_slice(dphi),
            Map::Elu => elu_back(x, phi, dphi, dx),
            Map::Relu { .. } => relu_back(x, dphi, dx),
            Map::Turned { sin, cos } => {
                let sizes = [self.heads, self.dim];
                turn_back(sizes, x, &sin[from..], &cos[from..], dphi, dx);
            }
            Map::RandomRelu { add, .. } => {
                keep_above(phi, add, dphi);
                self.project_back(dphi, dx);
            }
            Map::RandomExp { eps, .. } => {
                let mut sums = vec![0.0; x.len() / self.dim];
                let least = eps * self.scale();
                exponentials_back(phi, dphi, self.width, self.features, least, &mut sums);
                self.project_back(dphi, dx);
                let factor = -self.factor * self.factor;
                sums.iter_mut().for_each(|sum| *sum *= factor);
                add(dx, self.dim, x, &sums);
            }
        }
    }

    fn project_back(&self, dphi: &[f32], dx: &mut [f32]) {
        let shape = [dx.len() / self.dim, self.features, self.dim];
        let (d, matrix) = (
            Matrix::rows(dphi, self.width),
            Matrix::rows(&self.rows, self.dim),
        );
        product(shape, 1.0, d, matrix, dx, (self.dim, 1), false);
    }
}

dispatched! {
    fn elu<'a>(x: &'a [f32], phi: &'a mut [f32]) {
        for (phi, x) in phi.iter_mut().zip(x) {
            let low = exp(*x);
            *phi = if *x > 0.0 { *x + 1.0 } else { low };
        }
    }
}

dispatched! {
    fn elu_back<'a>(x: &'a [f32], phi: &'a [f32], dphi: &'a [f32], dx: &'a mut [f32]) {
        for ((dx, x), (dphi, phi)) in dx.iter_mut().zip(x).zip(dphi.iter().zip(phi)) {
            *dx = if *x > 0.0 { *dphi } else { dphi * phi };
        }
    }
}

dispatched! {
    fn relu<'a>(x: &'a [f32], add: f32, phi: &'a mut [f32]) {
        for (phi, x) in phi.iter_mut().zip(x) {
            *phi = if *x > 0.0 { *x + add } else { add };
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
        for ((dx, x), dphi) in dx.iter_mut().zip(x).zip(dphi) {
            *dx = if *x > 0.0 { *dphi } else { 0.0 };
        }
    }
}

dispatched! {
    fn keep_above<'a>(phi: &'a [f32], least: f32, dphi: &'a mut [f32]) {
        for (dphi, phi) in dphi.iter_mut().zip(phi) {
            *dphi = if *phi > least { *dphi } else { 0.0 };
        }
    }
}

dispatched! {
    /// Tokens of `heads` rows of `dim` values; the features of a row are those with the sine, then those with the cosine.
    fn turn<'a>(
        sizes: [usize; 2],
        x: &'a [f32],
        sin: &'a [f32],
        cos: &'a [f32],
        phi: &'a mut [f32],
    ) {
        let [heads, dim] = sizes;
        let tokens = x.chunks_exact(heads * dim).zip(phi.chunks_exact_mut(2 * heads * dim));
        for ((x, phi), (sin, cos)) in tokens.zip(sin.iter().zip(cos)) {
            for (x, phi) in x.chunks_exact(dim).zip(phi.chunks_exact_mut(2 * dim)) {
                let (first, second) = phi.split_at_mut(dim);
                for l in 0..dim {
                    let x = if x[l] > 0.0 { x[l] } else { 0.0 };
                    first[l] = x * sin;
                    second[l] = x * cos;
                }
            }
        }
    }
}

dispatched! {
    fn turn_back<'a>(
        sizes: [usize; 2],
        x: &'a [f32],
        sin: &'a [f32],
        cos: &'a [f32],
        dphi: &'a [f32],
        dx: &'a mut [f32],
    ) {
        let [heads, dim] = sizes;
        let tokens = x.chunks_exact(heads * dim).zip(dx.chunks_exact_mut(heads * dim));
        let tokens = tokens.zip(dphi.chunks_exact(2 * heads * dim));
        for (((x, dx), dphi), (sin, cos)) in tokens.zip(sin.iter().zip(cos)) {
            let rows = x.chunks_exact(dim).zip(dx.chunks_exact_mut(dim));
            for ((x, dx), dphi) in rows.zip(dphi.chunks_exact(2 * dim)) {
                let (first, second) = dphi.split_at(dim);
                for l in 0..dim {
                    let sum = first[l].mul_add(*sin, second[l] * cos);
                    dx[l] = if x[l] > 0.0 { sum } else { 0.0 };
                }
            }
        }
    }
}
