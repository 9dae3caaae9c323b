//! Rows of hidden vectors: which are scored, how they are picked, and fixed positions.

use std::sync::Arc;

use anyformer_ops::embedding::embedding;
use anyformer_ops::{Device, Tensor};

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

/// The fixed positions of the first Transformer: sine and cosine in turn, `[rows, dim]`.
pub(crate) fn sinusoids(rows: usize, dim: usize, device: &Device) -> Tensor<2> {
    let value = |row: usize, feature: usize| {
        let pair = (feature / 2 * 2) as f64 / dim as f64;
        let angle = row as f64 * (-pair * 10_000f64.ln()).exp();
        match feature % 2 {
            0 => angle.sin() as f32,
            _ => angle.cos() as f32,
        }
    };
    let values: Vec<f32> = (0..rows * dim)
        .map(|index| value(index / dim, index % dim))
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape([rows, dim])
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
