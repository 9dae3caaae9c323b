//! Rows of hidden vectors: which are scored, how they are picked, and fixed positions.

use std::sync::{Arc, Mutex, PoisonError};

use anyformer_ops::Tensor;
use anyformer_ops::embedding::embedding;

use crate::config::{ModelError, Pool};

/// The scored places: index of the hidden row and wanted token.
pub(crate) fn places(
    tokens: &[i64],
    offsets: &[usize],
    packed: bool,
) -> Result<Vec<(u32, i64)>, ModelError> {
    let total = offsets[offsets.len() - 1];
    let rows = offsets.len() - 1;
    if !packed && tokens.len() != total || rows == 0 || !tokens.len().is_multiple_of(rows) {
        return Err(ModelError::Input(format!(
            "{} target tokens do not fit {total} positions in {rows} rows",
            tokens.len()
        )));
    }
    let time = tokens.len() / rows;
    let mut places = Vec::new();
    for (row, pair) in offsets.windows(2).enumerate() {
        for step in 0..pair[1] - pair[0] {
            let wanted = tokens[row * time + step];
            if wanted >= 0 {
                places.push(((pair[0] + step) as u32, wanted));
            }
        }
    }
    if places.is_empty() {
        return Err(ModelError::Input("no target is scored".into()));
    }
    Ok(places)
}

/// Rows `ids` of `[rows, dim]`.
pub(crate) fn gather_rows(x: Tensor<2>, ids: Vec<u32>) -> Tensor<2> {
    let (count, dim) = (ids.len(), x.dims()[1]);
    embedding(x, Arc::new(ids), [1, count]).reshape([count, dim])
}

/// The fixed positions of the first Transformer: sine and cosine in turn. Rows are kept once they are made, since sines take
/// longer than a mixer's kernel.
#[derive(Debug)]
pub(crate) struct Sinusoids {
    dim: usize,
    held: Mutex<Vec<f32>>,
}

impl Sinusoids {
    pub(crate) fn new(dim: usize) -> Self {
        Sinusoids {
            dim,
            held: Mutex::new(Vec::new()),
        }
    }

    /// The rows at `positions`, one after the other.
    pub(crate) fn rows(&self, positions: &[usize]) -> Vec<f32> {
        let dim = self.dim;
        let wanted = positions.iter().max().map_or(0, |last| last + 1);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let known = held.len() / dim.max(1);
        if known < wanted {
            // Twice as many, so that going on token by token does not make a row each.
            let frequency = |feature: usize| {
                let pair = (feature / 2 * 2) as f64 / dim as f64;
                (-pair * 10_000f64.ln()).exp()
            };
            let frequencies: Vec<f64> = (0..dim).map(frequency).collect();
            for row in known..wanted.max(2 * known) {
                held.extend(frequencies.iter().enumerate().map(|(feature, frequency)| {
                    let angle = row as f64 * frequency;
                    match feature % 2 {
                        0 => angle.sin() as f32,
                        _ => angle.cos() as f32,
                    }
                }));
            }
        }
        let mut rows = Vec::with_capacity(positions.len() * dim);
        for position in positions {
            rows.extend_from_slice(&held[position * dim..][..dim]);
        }
        rows
    }
}

/// One row per sequence of hidden vectors.
pub(crate) fn pooled(x: Tensor<3>, offsets: &[usize], pool: Pool) -> Tensor<2> {
    let [batch, time, dim] = x.dims();
    let total = batch * time;
    let rows = offsets.len() - 1;
    let flat = x.reshape([total, dim]);
    let pick = |index: &dyn Fn(&[usize]) -> usize, flat: Tensor<2>| {
        let ids: Vec<u32> = offsets.windows(2).map(|pair| index(pair) as u32).collect();
        gather_rows(flat, ids)
    };
    match pool {
        Pool::First | Pool::Cls => pick(&|pair| pair[0], flat),
        Pool::Max => {
            let of = |pair: &[usize]| match pair[1] - pair[0] {
                0 => flat.clone().slice([0..1]).zeros_like(),
                _ => flat.clone().slice([pair[0]..pair[1]]).max_dim(0),
            };
            Tensor::cat(offsets.windows(2).map(of).collect(), 0)
        }
        Pool::Last => pick(&|pair| pair[1].max(1) - 1, flat),
        Pool::Mean
            if total.is_multiple_of(rows)
                && offsets[1] * rows == total
                && offsets
                    .windows(2)
                    .all(|pair| pair[1] - pair[0] == offsets[1]) =>
        {
            flat.reshape([rows, total / rows, dim])
                .mean_dim(1)
                .reshape([rows, dim])
        }
        Pool::Mean => {
            let mean = |pair: &[usize]| match pair[1] - pair[0] {
                0 => flat.clone().slice([0..1]).zeros_like(),
                _ => flat.clone().slice([pair[0]..pair[1]]).mean_dim(0),
            };
            Tensor::cat(offsets.windows(2).map(mean).collect(), 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinusoids_are_the_same_however_they_were_asked_for() {
        let (whole, grown) = (Sinusoids::new(4), Sinusoids::new(4));
        let all = whole.rows(&(0..9).collect::<Vec<_>>());
        for position in [3, 0, 8, 5] {
            assert_eq!(grown.rows(&[position]), all[4 * position..][..4]);
        }
        let want = [3f64.sin(), 3f64.cos(), 0.03f64.sin(), 0.03f64.cos()];
        for (got, want) in all[12..16].iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-7);
        }
    }
}
