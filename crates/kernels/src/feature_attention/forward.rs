//! The forward pass: the sums over the keys, part by part, then the queries.

use super::map::{Prepared, Side};
use super::rows::{add_row, scale, total};
use super::{FeatureAttention, Part, SMALLEST_DIVISOR, split};
use crate::gemm::{Rows, row_dots};
use crate::math::exp;
use crate::simd::{collect_if, each_if};

/// Computes the outputs, `[total, heads, value_dim]`, which are overwritten. Gives what [`super::backward`] wants: the sums of
/// every sequence and head.
pub fn forward(attention: &FeatureAttention, o: &mut [f32]) -> Vec<f32> {
    attention.check();
    assert_eq!(o.len(), attention.v.len(), "feature attention o");
    let (heads, width) = (attention.heads, attention.value_dim);
    let parts = attention.parts();
    let map = Prepared::new(attention.map, heads, attention.dim);
    let parallel = attention.parallel();
    let sums = collect_if(parallel, parts.iter(), |part| {
        key_sums(attention, &map, part)
    });
    let held = attention.held();
    let mut saved = vec![0.0; attention.sequences() * heads * held];
    each_if(
        parallel,
        saved.chunks_mut(held).enumerate(),
        |(index, saved)| {
            let own = parts.iter().zip(&sums);
            let own = own.filter(|(part, _)| part.sequence == index / heads);
            let own: Vec<&Sums> = own.map(|(_, sums)| sums).collect();
            merge(attention, &map, index % heads, &own, saved);
        },
    );
    let outputs = split(o, heads * width, &parts);
    each_if(parallel, parts.iter().zip(outputs), |(part, o)| {
        let saved = &saved[part.sequence * heads * held..][..heads * held];
        queries(attention, &map, part, saved, o);
    });
    saved
}

/// What the keys of a part sum to.
struct Sums {
    /// `[heads, features, value_dim]`.
    s: Vec<f32>,
    /// `[heads, width]`.
    z: Vec<f32>,
    /// The largest exponent so far, where exponentials are less that; `[heads]`.
    most: Vec<f32>,
    /// The plain sums of the values and their number, where a constant is added to exponentials later.
    values: Vec<f32>,
    count: usize,
}

fn key_sums(attention: &FeatureAttention, map: &Prepared, part: &Part) -> Sums {
    let (heads, dim, width) = (attention.heads, attention.dim, attention.value_dim);
    let (size, wide) = (attention.features() * width, attention.wide());
    let stabilised = attention.map.eps().is_some();
    let mut sums = Sums {
        s: vec![0.0; heads * size],
        z: vec![0.0; wide],
        most: vec![f32::NEG_INFINITY; heads],
        values: vec![0.0; usize::from(stabilised) * heads * width],
        count: part.tokens.len(),
    };
    let mut phi = attention.room();
    for block in attention.blocks(part) {
        let x = &attention.k[block.start * heads * dim..block.end * heads * dim];
        let v = &attention.v[block.start * heads * width..block.end * heads * width];
        let phi = &mut phi[..block.len() * wide];
        let Sums {
            s, z, most, values, ..
        } = &mut sums;
        match stabilised {
            true => {
                let one = wide / heads;
                map.keys_so_far(x, phi, most, |head, factor| {
                    let s = s[head * size..][..size].iter_mut();
                    s.chain(&mut z[head * one..][..one])
                        .for_each(|value| *value *= factor);
                });
                total(v, values);
            }
            false => map.forward(x, block.start, Side::Key(&[]), phi),
        }
        attention.add_products(phi, v, s, size);
        total(phi, z);
    }
    sums
}

/// The sums of the parts of a sequence, of one head: S, z and the stabiliser.
fn merge(
    attention: &FeatureAttention,
    map: &Prepared,
    head: usize,
    parts: &[&Sums],
    saved: &mut [f32],
) {
    let (features, width) = (attention.features(), attention.value_dim);
    let (size, one) = (features * width, attention.wide() / attention.heads);
    let (s, rest) = saved.split_at_mut(size);
    let (z, most) = rest.split_at_mut(features);
    let eps = attention.map.eps();
    if eps.is_some() && !parts.is_empty() {
        let all = parts.iter().map(|part| part.most[head]);
        most[0] = all.fold(f32::NEG_INFINITY, f32::max);
    }
    for part in parts {
        let factor = match eps {
            Some(_) => map.scale() * exp(part.most[head] - most[0]),
            None => 1.0,
        };
        add_row(s, factor, &part.s[head * size..][..size]);
        add_row(z, factor, &part.z[head * one..][..features]);
        let Some(eps) = eps else { continue };
        let each = map.scale() * eps;
        add_row(s, each, &part.values[head * width..][..width]);
        z.iter_mut().for_each(|z| *z += each * part.count as f32);
    }
}

/// The outputs of a part.
fn queries(
    attention: &FeatureAttention,
    map: &Prepared,
    part: &Part,
    saved: &[f32],
    o: &mut [f32],
) {
    let (heads, dim, width) = (attention.heads, attention.dim, attention.value_dim);
    let (features, wide, held) = (attention.features(), attention.wide(), attention.held());
    let mut phi = attention.room();
    for block in attention.blocks(part) {
        let x = &attention.q[block.start * heads * dim..block.end * heads * dim];
        let phi = &mut phi[..block.len() * wide];
        map.forward(x, block.start, Side::Query, phi);
        let first = (block.start - part.tokens.start) * heads * width;
        let o = &mut o[first..first + block.len() * heads * width];
        let from = (&*phi, features, wide / heads);
        attention.through(from, (saved, held), (&mut *o, width, width), false);
        if attention.normalise {
            let (inverse, _) = divisors(attention, phi, saved);
            scale(o, width, &inverse);
        }
    }
}

/// One over `phi . z` of each row of a block, and one where that has a gradient, else zero; `[tokens, heads]`.
pub(super) fn divisors(
    attention: &FeatureAttention,
    phi: &[f32],
    saved: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let (heads, features, wide) = (attention.heads, attention.features(), attention.wide());
    let mut divisors = vec![0.0; phi.len() / wide * heads];
    for (head, saved) in saved.chunks(attention.held()).enumerate() {
        let z = &saved[features * attention.value_dim..];
        let rows = Rows(&phi[head * (wide / heads)..], wide);
        row_dots(features, rows, Rows(z, 0), &mut divisors[head..], heads);
    }
    let small = |divisor: f32| divisor.abs() < SMALLEST_DIVISOR;
    let live = divisors
        .iter()
        .map(|divisor| if small(*divisor) { 0.0 } else { 1.0 })
        .collect();
    for divisor in &mut divisors {
        let own = *divisor;
        *divisor = 1.0 / if small(own) { SMALLEST_DIVISOR } else { own };
    }
    (divisors, live)
}
