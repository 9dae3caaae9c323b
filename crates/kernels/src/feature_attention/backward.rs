//! The backward pass: the queries of a head, which give the gradients of its sums, then its keys.

use rayon::prelude::*;

use super::forward::{Scratch, add_rows, divisors, multiply};
use super::map::Side;
use super::{FeatureAttention, Head, ROWS, across};
use crate::disjoint::Disjoint;
use crate::gemm::Matrix;
use crate::simd::dispatched;

/// Gradients in the shapes of the arguments.
#[derive(Clone, Debug)]
pub struct Grads {
    /// `[total, heads, dim]`.
    pub q: Vec<f32>,
    /// `[total, heads, dim]`.
    pub k: Vec<f32>,
    /// `[total, heads, value_dim]`.
    pub v: Vec<f32>,
}

/// Gradients from that of `o`; `o` and `saved` are what [`super::forward`] gave.
pub fn backward(attention: &FeatureAttention, o: &[f32], saved: &[f32], d_o: &[f32]) -> Grads {
    attention.check();
    let held = attention.held();
    assert_eq!(
        [o.len(), d_o.len()],
        [attention.v.len(); 2],
        "feature attention o"
    );
    assert_eq!(
        saved.len(),
        attention.sequences() * attention.heads * held,
        "feature attention saved"
    );
    let mut grads = Grads {
        q: vec![0.0; attention.q.len()],
        k: vec![0.0; attention.k.len()],
        v: vec![0.0; attention.v.len()],
    };
    let shared = [
        Disjoint::new(&mut grads.q),
        Disjoint::new(&mut grads.k),
        Disjoint::new(&mut grads.v),
    ];
    let scratch = || {
        let features = attention.features();
        Buffers {
            own: Scratch::new(attention),
            dphi: vec![0.0; features * ROWS],
            dx: vec![0.0; attention.dim * ROWS],
            o: vec![0.0; attention.value_dim * ROWS],
            ds: vec![0.0; features * attention.value_dim],
            dz: vec![0.0; features],
        }
    };
    attention
        .tasks()
        .into_par_iter()
        .zip(saved.par_chunks(held))
        .with_max_len(1)
        .for_each_init(scratch, |buffers, (head, saved)| {
            queries(attention, head, buffers, saved, [o, d_o], &shared[0]);
            keys(attention, head, buffers, saved, &shared[1], &shared[2]);
        });
    grads
}

/// Buffers of one thread.
struct Buffers {
    own: Scratch,
    /// `[features, ROWS]`.
    dphi: Vec<f32>,
    /// `[dim, ROWS]`.
    dx: Vec<f32>,
    /// `[value_dim, ROWS]`.
    o: Vec<f32>,
    /// `[features, value_dim]`.
    ds: Vec<f32>,
    /// `[features]`.
    dz: Vec<f32>,
}

fn queries(
    attention: &FeatureAttention,
    head: Head,
    buffers: &mut Buffers,
    saved: &[f32],
    [o, d_o]: [&[f32]; 2],
    dq: &Disjoint,
) {
    let FeatureAttention {
        q,
        map,
        dim,
        value_dim,
        ..
    } = *attention;
    let features = attention.features();
    let factor = map.factor(dim);
    let (s, rest) = saved.split_at(features * value_dim);
    let z = &rest[..features];
    buffers.ds.fill(0.0);
    buffers.dz.fill(0.0);
    for (from, count) in head.blocks() {
        let block = (head.head, from, count);
        let Scratch {
            x,
            phi,
            values,
            turned,
        } = &mut buffers.own;
        attention.gather(q, dim, block, factor, x);
        map.forward(x, from, Side::Query, phi);
        attention.gather(d_o, value_dim, block, 1.0, values);
        let dphi = &mut buffers.dphi;
        across(
            [features, value_dim],
            Matrix::rows(s, value_dim),
            values,
            dphi,
        );
        // The features keep their scale for the map; for the sums they are divided with their rows.
        let mut inverse = [1.0; ROWS];
        let mut through = [0.0; ROWS];
        if attention.normalise {
            attention.gather(o, value_dim, block, 1.0, &mut buffers.o);
            let (own, live) = divisors(phi, z);
            inverse = own;
            through = products(values, &buffers.o, &live);
            divide(dphi, z, &through, &inverse);
        }
        map.backward(x, from, phi, dphi, &mut buffers.dx);
        attention.scatter(&buffers.dx, dim, block, factor, turned, dq);
        multiply(phi, &inverse);
        attention.add_products(phi, d_o, block, &mut buffers.ds);
        if attention.normalise {
            multiply(phi, &through);
            add_rows(phi, count, &mut buffers.dz);
        }
    }
}

fn keys(
    attention: &FeatureAttention,
    head: Head,
    buffers: &mut Buffers,
    saved: &[f32],
    dk: &Disjoint,
    dv: &Disjoint,
) {
    let FeatureAttention {
        k,
        v,
        map,
        dim,
        value_dim,
        ..
    } = *attention;
    let features = attention.features();
    let factor = map.factor(dim);
    let most = saved[saved.len() - 1];
    let Buffers {
        own:
            Scratch {
                x,
                phi,
                values,
                turned,
            },
        dphi,
        dx,
        ds,
        dz,
        ..
    } = buffers;
    let ds = Matrix::rows(ds, value_dim);
    for (from, count) in head.blocks() {
        let block = (head.head, from, count);
        attention.gather(k, dim, block, factor, x);
        map.forward(x, from, Side::Key(most), phi);
        attention.gather(v, value_dim, block, 1.0, values);
        across([features, value_dim], ds, values, dphi);
        if attention.normalise {
            add_columns(dphi, dz);
        }
        across([value_dim, features], ds.transposed(), phi, values);
        attention.scatter(values, value_dim, block, 1.0, turned, dv);
        map.backward(x, from, phi, dphi, dx);
        attention.scatter(dx, dim, block, factor, turned, dk);
    }
}

dispatched! {
    /// Minus the dot products of the lanes, where they are live.
    fn products<'a>(a: &'a [f32], b: &'a [f32], live: &'a [f32; ROWS]) -> [f32; ROWS] {
        let mut sums = [0.0; ROWS];
        for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(ROWS)) {
            for l in 0..ROWS {
                sums[l] = a[l].mul_add(b[l], sums[l]);
            }
        }
        for l in 0..ROWS {
            sums[l] *= -live[l];
        }
        sums
    }
}

dispatched! {
    /// `dphi = (dphi + z through) inverse`.
    fn divide<'a>(
        dphi: &'a mut [f32],
        z: &'a [f32],
        through: &'a [f32; ROWS],
        inverse: &'a [f32; ROWS],
    ) {
        for (dphi, z) in dphi.chunks_exact_mut(ROWS).zip(z) {
            for l in 0..ROWS {
                dphi[l] = z.mul_add(through[l], dphi[l]) * inverse[l];
            }
        }
    }
}

dispatched! {
    /// Adds a value to each row.
    fn add_columns<'a>(rows: &'a mut [f32], column: &'a [f32]) {
        for (row, value) in rows.chunks_exact_mut(ROWS).zip(column) {
            for l in 0..ROWS {
                row[l] += *value;
            }
        }
    }
}
