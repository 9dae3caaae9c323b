//! The forward pass: the sums over the keys of a head, then its queries.

use rayon::prelude::*;

use super::map::Side;
use super::{FeatureAttention, Head, ROWS, SMALLEST_DIVISOR, across};
use crate::disjoint::Disjoint;
use crate::gemm::Matrix;
use crate::simd::dispatched;

/// What [`forward`] gives.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[total, heads, value_dim]`.
    pub o: Vec<f32>,
    /// What [`super::backward`] wants: the sums of every sequence and head.
    pub saved: Vec<f32>,
}

/// Computes the outputs.
pub fn forward(attention: &FeatureAttention) -> Output {
    attention.check();
    let mut o = vec![0.0; attention.v.len()];
    let held = attention.held();
    let mut saved = vec![0.0; attention.sequences() * attention.heads * held];
    let shared = Disjoint::new(&mut o);
    let tasks = attention.tasks();
    tasks
        .into_par_iter()
        .zip(saved.par_chunks_mut(held))
        .with_max_len(1)
        .for_each_init(
            || Scratch::new(attention),
            |scratch, (head, saved)| {
                sums(attention, head, scratch, saved);
                outputs(attention, head, scratch, saved, &shared);
            },
        );
    Output { o, saved }
}

/// Buffers of one thread.
pub(super) struct Scratch {
    /// `[dim, ROWS]`.
    pub(super) x: Vec<f32>,
    /// `[features, ROWS]`.
    pub(super) phi: Vec<f32>,
    /// `[value_dim, ROWS]`.
    pub(super) values: Vec<f32>,
    /// `[ROWS, dim]` or `[ROWS, value_dim]`.
    pub(super) turned: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(attention: &FeatureAttention) -> Self {
        let zeros = |rows: usize| vec![0.0; rows * ROWS];
        Scratch {
            x: zeros(attention.dim),
            phi: zeros(attention.features()),
            values: zeros(attention.value_dim),
            turned: zeros(attention.dim.max(attention.value_dim)),
        }
    }
}

/// S, z and the stabiliser of a head.
fn sums(attention: &FeatureAttention, head: Head, scratch: &mut Scratch, saved: &mut [f32]) {
    let FeatureAttention {
        k,
        v,
        map,
        dim,
        value_dim,
        ..
    } = *attention;
    let features = attention.features();
    let Scratch { x, phi, .. } = scratch;
    let (s, rest) = saved.split_at_mut(features * value_dim);
    let (z, most) = rest.split_at_mut(features);
    if map.has_most() {
        most[0] = f32::NEG_INFINITY;
        for (from, count) in head.blocks() {
            let block = (head.head, from, count);
            attention.gather(k, dim, block, map.factor(dim), x);
            most[0] = most[0].max(map.most(x, count, phi));
        }
    }
    for (from, count) in head.blocks() {
        let block = (head.head, from, count);
        attention.gather(k, dim, block, map.factor(dim), x);
        map.forward(x, from, Side::Key(most[0]), phi);
        attention.add_products(phi, v, block, s);
        add_rows(phi, count, z);
    }
}

fn outputs(
    attention: &FeatureAttention,
    head: Head,
    scratch: &mut Scratch,
    saved: &[f32],
    shared: &Disjoint,
) {
    let FeatureAttention {
        q,
        map,
        dim,
        value_dim,
        ..
    } = *attention;
    let features = attention.features();
    let Scratch {
        x,
        phi,
        values,
        turned,
    } = scratch;
    let (s, rest) = saved.split_at(features * value_dim);
    for (from, count) in head.blocks() {
        let block = (head.head, from, count);
        attention.gather(q, dim, block, map.factor(dim), x);
        map.forward(x, from, Side::Query, phi);
        let left = Matrix::rows(s, value_dim).transposed();
        across([value_dim, features], left, phi, values);
        if attention.normalise {
            let (inverse, _) = divisors(phi, &rest[..features]);
            multiply(values, &inverse);
        }
        attention.scatter(values, value_dim, block, 1.0, turned, shared);
    }
}

dispatched! {
    /// Sums of the first `count` lanes of each row.
    pub(super) fn add_rows<'a>(rows: &'a [f32], count: usize, sums: &'a mut [f32]) {
        for (row, sum) in rows.chunks_exact(ROWS).zip(sums) {
            *sum += crate::simd::sum(&row[..count]);
        }
    }
}

dispatched! {
    /// One over `phi . z` for each lane, and one where it has a gradient, else zero.
    pub(super) fn divisors<'a>(phi: &'a [f32], z: &'a [f32]) -> ([f32; ROWS], [f32; ROWS]) {
        let (mut divisor, mut live) = ([0.0; ROWS], [0.0; ROWS]);
        for (phi, z) in phi.chunks_exact(ROWS).zip(z) {
            for l in 0..ROWS {
                divisor[l] = phi[l].mul_add(*z, divisor[l]);
            }
        }
        for l in 0..ROWS {
            let small = divisor[l].abs() < SMALLEST_DIVISOR;
            divisor[l] = 1.0 / if small { SMALLEST_DIVISOR } else { divisor[l] };
            live[l] = if small { 0.0 } else { 1.0 };
        }
        (divisor, live)
    }
}

dispatched! {
    /// Each row times `factors`.
    pub(super) fn multiply<'a>(rows: &'a mut [f32], factors: &'a [f32; ROWS]) {
        for row in rows.chunks_exact_mut(ROWS) {
            for l in 0..ROWS {
                row[l] *= factors[l];
            }
        }
    }
}
