//! The equation as loops, in f64, with every pair's weight.

use super::{FeatureAttention, Map, SMALLEST_DIVISOR};

/// What the softmax kernel subtracts from exponents: a constant of the equation, read from the values it stands for.
#[derive(Clone, Debug)]
pub struct Stabilisers {
    /// `[total, heads]`.
    pub q: Vec<f64>,
    /// `[total, heads]`, equal within a sequence and head.
    pub k: Vec<f64>,
}

/// The stabilisers of the arguments of `attention`.
pub fn stabilisers(attention: &FeatureAttention) -> Stabilisers {
    let rows = attention.q.len() / attention.dim;
    let Map::RandomExp { rows: matrix, .. } = attention.map else {
        return Stabilisers {
            q: vec![0.0; rows],
            k: vec![0.0; rows],
        };
    };
    let dim = attention.dim;
    let most = |x: &[f32]| {
        let dots = matrix.chunks(dim).map(|row| {
            let dot: f64 = row.iter().zip(x).map(|(a, b)| *a as f64 * *b as f64).sum();
            dot * (dim as f64).powf(-0.25)
        });
        dots.fold(f64::NEG_INFINITY, f64::max)
    };
    let mut k: Vec<f64> = attention.k.chunks(dim).map(most).collect();
    for pair in attention.offsets.windows(2) {
        for head in 0..attention.heads {
            let places = (pair[0]..pair[1]).map(|row| row * attention.heads + head);
            let all = places
                .clone()
                .map(|at| k[at])
                .fold(f64::NEG_INFINITY, f64::max);
            places.for_each(|at| k[at] = all);
        }
    }
    Stabilisers {
        q: attention.q.chunks(dim).map(most).collect(),
        k,
    }
}

/// Features of one token.
fn features(map: &Map, x: &[f64], token: usize, most: f64) -> Vec<f64> {
    let project = |rows: &[f32], factor: f64| -> Vec<f64> {
        let dot = |row: &[f32]| -> f64 { row.iter().zip(x).map(|(a, b)| *a as f64 * b).sum() };
        rows.chunks(x.len()).map(|row| factor * dot(row)).collect()
    };
    let relu = |add: f32| move |x: &f64| x.max(0.0) + add as f64;
    match map {
        Map::Identity => x.to_vec(),
        Map::Elu => x
            .iter()
            .map(|x| if *x > 0.0 { x + 1.0 } else { x.exp() })
            .collect(),
        Map::Relu { add } => x.iter().map(relu(*add)).collect(),
        Map::Turned { sin, cos } => {
            let by = |factor: f32| move |x: &f64| x.max(0.0) * factor as f64;
            let (sin, cos) = (sin[token], cos[token]);
            x.iter().map(by(sin)).chain(x.iter().map(by(cos))).collect()
        }
        Map::RandomRelu { rows, add } => project(rows, 1.0).iter().map(relu(*add)).collect(),
        Map::RandomExp { rows, eps } => {
            let factor = (x.len() as f64).powf(-0.25);
            let half = x.iter().map(|x| (x * factor).powi(2)).sum::<f64>() / 2.0;
            let all = project(rows, factor);
            let scale = (all.len() as f64).powf(-0.5);
            let feature = |dot: &f64| scale * ((dot - half - most).exp() + *eps as f64);
            all.iter().map(feature).collect()
        }
    }
}

/// The outputs for queries, keys and values in f64; everything else is read from `attention`.
pub fn forward(
    attention: &FeatureAttention,
    [q, k, v]: [&[f64]; 3],
    stabilisers: &Stabilisers,
) -> Vec<f64> {
    let FeatureAttention {
        heads,
        dim,
        value_dim,
        ..
    } = *attention;
    let made = |x: &[f64], most: &[f64]| -> Vec<Vec<f64>> {
        let rows = x.chunks(dim).zip(most).enumerate();
        rows.map(|(row, (x, most))| features(&attention.map, x, row / heads, *most))
            .collect()
    };
    let (q, k) = (made(q, &stabilisers.q), made(k, &stabilisers.k));
    let mut o = vec![0.0; v.len()];
    for pair in attention.offsets.windows(2) {
        for i in pair[0]..pair[1] {
            for head in 0..heads {
                let row = i * heads + head;
                let mut divisor = 0.0;
                for j in pair[0]..pair[1] {
                    let key = j * heads + head;
                    let weight: f64 = q[row].iter().zip(&k[key]).map(|(a, b)| a * b).sum();
                    divisor += weight;
                    for c in 0..value_dim {
                        o[row * value_dim + c] += weight * v[key * value_dim + c];
                    }
                }
                if attention.normalise {
                    let small = divisor.abs() < SMALLEST_DIVISOR as f64;
                    let divisor = if small {
                        SMALLEST_DIVISOR as f64
                    } else {
                        divisor
                    };
                    o[row * value_dim..][..value_dim]
                        .iter_mut()
                        .for_each(|o| *o /= divisor);
                }
            }
        }
    }
    o
}
