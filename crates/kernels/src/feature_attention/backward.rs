//! The backward pass: the queries, which give the gradients of the sums part by part, then the keys.

use super::forward::divisors;
use super::map::{Prepared, Side};
use super::rows::{add_row, divide, weigh};
use super::{FeatureAttention, Part, split};
use crate::gemm::{Rows, row_dots};
use crate::simd::{collect_if, each_if};

/// Gradients of q, k and v from that of `o`, in their shapes, overwritten; `saved` is what [`super::forward`] gave.
pub fn backward(
    attention: &FeatureAttention,
    saved: &[f32],
    d_o: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    attention.check();
    let (heads, dim, width) = (attention.heads, attention.dim, attention.value_dim);
    let held = attention.held();
    assert_eq!(
        [d_o.len(), dq.len(), dk.len(), dv.len()],
        [
            attention.v.len(),
            attention.q.len(),
            attention.k.len(),
            attention.v.len()
        ],
        "feature attention gradients"
    );
    assert_eq!(
        saved.len(),
        attention.sequences() * heads * held,
        "feature attention saved"
    );
    let parts = attention.parts();
    let map = Prepared::new(attention.map, heads, dim);
    let parallel = attention.parallel();
    let turned = attention.turned(saved, held);
    let part_of = |all: &'_ [f32], part: &Part| {
        let size = all.len() / attention.sequences();
        part.sequence * size..(part.sequence + 1) * size
    };
    let tasks = parts.iter().zip(split(dq, heads * dim, &parts));
    let sums = collect_if(parallel, tasks, |(part, dq)| {
        let (saved, turned) = (
            &saved[part_of(saved, part)],
            &turned[part_of(&turned, part)],
        );
        queries(attention, &map, part, [saved, turned], d_o, dq)
    });
    let stride = held - 1;
    let mut ds = vec![0.0; attention.sequences() * heads * stride];
    each_if(
        parallel,
        ds.chunks_mut(stride).enumerate(),
        |(index, ds)| {
            let own = parts.iter().zip(&sums);
            for (_, sums) in own.filter(|(part, _)| part.sequence == index / heads) {
                let from = &sums[index % heads * stride..];
                add_row(ds, 1.0, &from[..stride]);
            }
        },
    );
    let turned = attention.turned(&ds, stride);
    let tasks = parts.iter().zip(split(dk, heads * dim, &parts));
    let tasks = tasks.zip(split(dv, heads * width, &parts));
    each_if(parallel, tasks, |((part, dk), dv)| {
        let (saved, ds, turned) = (
            &saved[part_of(saved, part)],
            &ds[part_of(&ds, part)],
            &turned[part_of(&turned, part)],
        );
        keys(attention, &map, part, saved, [ds, turned], [dk, dv]);
    });
}

/// The gradients of the queries of a part; gives what they add to those of S and z, `[heads, features * (value_dim + 1)]`.
fn queries(
    attention: &FeatureAttention,
    map: &Prepared,
    part: &Part,
    [saved, turned]: [&[f32]; 2],
    d_o: &[f32],
    dq: &mut [f32],
) -> Vec<f32> {
    let (heads, dim, width) = (attention.heads, attention.dim, attention.value_dim);
    let (features, wide, held) = (attention.features(), attention.wide(), attention.held());
    let (one, size) = (wide / heads, features * width);
    let z = rows_of_a_token(saved, held, size, features, one);
    let mut sums = vec![0.0; heads * (held - 1)];
    let mut dz = vec![0.0; wide];
    let (mut phi, mut dphi) = (attention.room(), attention.room());
    for block in attention.blocks(part) {
        let x = &attention.q[block.start * heads * dim..block.end * heads * dim];
        let d_o = &d_o[block.start * heads * width..block.end * heads * width];
        let phi = &mut phi[..block.len() * wide];
        let dphi = &mut dphi[..block.len() * wide];
        map.forward(x, block.start, Side::Query, phi);
        let to = (&mut *dphi, features, one);
        attention.through((d_o, width, width), (turned, size), to, false);
        // The features keep their scale for the map; for the sums they are divided with their rows.
        let mut numbers = None;
        if attention.normalise {
            let (inverse, live) = divisors(attention, phi, saved);
            let mut through = vec![0.0; inverse.len()];
            for head in 0..heads {
                let [phi, dphi] = [&*phi, &*dphi].map(|rows| Rows(&rows[head * one..], wide));
                row_dots(features, phi, dphi, &mut through[head..], heads);
            }
            for ((through, inverse), live) in through.iter_mut().zip(&inverse).zip(live) {
                *through *= -inverse * live;
            }
            divide(dphi, one, &z, &through, &inverse);
            numbers = Some((inverse, through));
        }
        let first = (block.start - part.tokens.start) * heads * dim;
        let dq = &mut dq[first..first + x.len()];
        map.backward(x, block.start, phi, dphi, dq);
        if let Some((inverse, through)) = numbers {
            weigh(phi, one, &inverse, &through, &mut dz);
        }
        attention.add_products(phi, d_o, &mut sums, held - 1);
    }
    for (sums, dz) in sums.chunks_mut(held - 1).zip(dz.chunks(one)) {
        sums[size..].copy_from_slice(&dz[..features]);
    }
    sums
}

/// The gradients of the keys and values of a part.
fn keys(
    attention: &FeatureAttention,
    map: &Prepared,
    part: &Part,
    saved: &[f32],
    [ds, turned]: [&[f32]; 2],
    [dk, dv]: [&mut [f32]; 2],
) {
    let (heads, dim, width) = (attention.heads, attention.dim, attention.value_dim);
    let (features, wide, held) = (attention.features(), attention.wide(), attention.held());
    let (one, size) = (wide / heads, features * width);
    let most: Vec<f32> = saved.chunks(held).map(|saved| saved[held - 1]).collect();
    let dz = rows_of_a_token(ds, held - 1, size, features, one);
    let (mut phi, mut dphi) = (attention.room(), attention.room());
    for block in attention.blocks(part) {
        let x = &attention.k[block.start * heads * dim..block.end * heads * dim];
        let v = &attention.v[block.start * heads * width..block.end * heads * width];
        let phi = &mut phi[..block.len() * wide];
        let dphi = &mut dphi[..block.len() * wide];
        map.forward(x, block.start, Side::Key(&most), phi);
        if attention.normalise {
            dphi.chunks_exact_mut(wide)
                .for_each(|row| row.copy_from_slice(&dz));
        }
        let to = (&mut *dphi, features, one);
        let add = attention.normalise;
        attention.through((v, width, width), (turned, size), to, add);
        let first = block.start - part.tokens.start;
        let dv = &mut dv[first * heads * width..][..v.len()];
        let from = (&*phi, features, one);
        attention.through(from, (ds, held - 1), (dv, width, width), false);
        let dk = &mut dk[first * heads * dim..][..x.len()];
        map.backward(x, block.start, phi, dphi, dk);
    }
}

/// The sums over features of each head, which are at `from` of `stride` values, laid out as the features of a token.
fn rows_of_a_token(
    sums: &[f32],
    stride: usize,
    from: usize,
    features: usize,
    width: usize,
) -> Vec<f32> {
    let mut rows = vec![0.0; sums.len() / stride * width];
    for (row, sums) in rows.chunks_mut(width).zip(sums.chunks(stride)) {
        row[..features].copy_from_slice(&sums[from..from + features]);
    }
    rows
}
