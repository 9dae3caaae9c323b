//! The equations as loops in f64.

use super::Gate;

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// RMS norm of one row, gated or not.
pub fn rms(x: &[f64], gate: Option<(Gate, &[f64])>, w: &[f64], eps: f64, divisor: f64) -> Vec<f64> {
    let u: Vec<f64> = match gate {
        Some((Gate::BeforeNorm, z)) => x.iter().zip(z).map(|(x, z)| x * silu(*z)).collect(),
        _ => x.to_vec(),
    };
    let square: f64 = u.iter().map(|u| u * u).sum();
    let root = (square / divisor + eps).sqrt();
    (0..u.len())
        .map(|i| {
            let after = match gate {
                Some((Gate::AfterNorm, z)) => silu(z[i]),
                _ => 1.0,
            };
            u[i] / root * w[i] * after
        })
        .collect()
}

/// Layer norm of one row.
pub fn layer(x: &[f64], w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    (0..x.len())
        .map(|i| (x[i] - mean) / (var + eps).sqrt() * w[i] + b[i])
        .collect()
}
