//! Disentangled attention, He et al., DeBERTa (2021), arXiv 2006.03654, section 3.1, with the logarithmic buckets and the shared
//! projections of its second version (DeBERTaV3, 2023, arXiv 2111.09543).
//!
//! Every bucket of distances has a vector, in one table for all layers. With p(d) that of the bucket of `d = i - j`,
//!
//! ```text
//! score(i, j) = q_i . k_j + q_i . K p(i - j) + k_j . Q p(i - j)
//! ```
//!
//! over `sqrt(head_dim (1 + number of terms of positions))`; K and Q are the layer's own projections of keys and queries or, not
//! shared, two more. Distances of up to half of the buckets on each side have one each, the others grow like their logarithm up to
//! `position_distance`, beyond which there is one.

use anyformer_ops::norm::layer_norm;
use anyformer_ops::{Builder, Device, Init, Int, Linear, Param, Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::parts::linear_cost;

/// Which terms of positions are added to the scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Terms {
    /// Both.
    #[default]
    Both,
    /// The query's content with the key's place (`c2p`).
    ToPlace,
    /// The key's content with the query's place (`p2c`).
    FromPlace,
}

impl Terms {
    fn has_keys_place(self) -> bool {
        self != Terms::FromPlace
    }

    fn has_queries_place(self) -> bool {
        self != Terms::ToPlace
    }

    fn count(self) -> usize {
        usize::from(self.has_keys_place()) + usize::from(self.has_queries_place())
    }
}

/// The knobs of this scheme.
pub(crate) struct Knobs {
    pub(crate) terms: Terms,
    pub(crate) shared: bool,
    pub(crate) norm: bool,
    pub(crate) eps: f32,
    /// 0: a vector for every distance.
    pub(crate) buckets: usize,
    pub(crate) distance: usize,
}

/// The scheme, built.
pub(crate) struct Disentangled {
    /// `[2 span, dim]`, one for all layers.
    table: Param,
    norm: Option<[Param; 2]>,
    /// Whether the table is counted as this layer's.
    own: bool,
    /// Projections of places as keys and as queries, where the layer's own are not taken.
    keys: Option<Linear>,
    queries: Option<Linear>,
    knobs: Knobs,
    heads: usize,
}

/// The projected vectors of a run of buckets, `[heads, width, buckets]` each, the first being that of row `first`.
pub(crate) struct Places {
    keys: Option<Tensor<3>>,
    queries: Option<Tensor<3>>,
    first: usize,
}

impl Disentangled {
    pub(crate) fn new(
        knobs: Knobs,
        [dim, heads, width]: [usize; 3],
        bias: bool,
        builder: &Builder,
    ) -> Result<Self, String> {
        let span = match knobs.buckets {
            0 => knobs.distance,
            buckets => buckets,
        };
        if span >= 1 << 31 || knobs.distance >= 1 << 31 {
            return Err(format!(
                "position_buckets {} or position_distance {} is too large",
                knobs.buckets, knobs.distance
            ));
        }
        if knobs.buckets > 0
            && (span < 4 || !span.is_multiple_of(2) || knobs.distance <= span / 2 + 1)
            || span == 0
        {
            return Err(format!(
                "position_buckets {} must be 0 or even and at least 4, and position_distance {} above half of them and one",
                knobs.buckets, knobs.distance
            ));
        }
        let (table, own) = builder.shared("places.weight", &[2 * span, dim], Init::Normal(0.02))?;
        let norm = match knobs.norm {
            false => None,
            true => Some([
                builder.shared("places_norm.weight", &[dim], Init::Ones)?.0,
                builder.shared("places_norm.bias", &[dim], Init::Zeros)?.0,
            ]),
        };
        let inner = heads * width;
        let more = |name: &str, bias: bool| Linear::new(builder, name, dim, inner, bias);
        Ok(Disentangled {
            table,
            norm,
            own,
            keys: (!knobs.shared && knobs.terms.has_keys_place())
                .then(|| more("place_k_proj", bias)),
            queries: (!knobs.shared && knobs.terms.has_queries_place())
                .then(|| more("place_q_proj", bias)),
            knobs,
            heads,
        })
    }

    /// Trainable numbers, those of the table with the layer that made it.
    pub(crate) fn count(&self) -> usize {
        let layers: Vec<&Linear> = self.keys.iter().chain(&self.queries).collect();
        let layers = linear_cost(&layers, 0).params as usize;
        let norm = self.norm.iter().flatten().map(Param::count).sum::<usize>();
        let table = if self.own {
            self.table.count() + norm
        } else {
            0
        };
        layers + table
    }

    /// What scores are multiplied by, with heads of `width` features.
    pub(crate) fn scale(&self, width: usize) -> f32 {
        ((width * (1 + self.knobs.terms.count())) as f32).powf(-0.5)
    }

    /// The row of the table for a distance `i - j`.
    fn row(&self, distance: i64) -> usize {
        let span = self.table.shape()[0] as i64 / 2;
        let place = match self.knobs.buckets {
            0 => distance,
            buckets => bucket(distance, buckets, self.knobs.distance),
        };
        (place + span).clamp(0, 2 * span - 1) as usize
    }

    /// The rows that `queries` at the end of `keys` places ask for, the first and the one after the last.
    fn rows(&self, queries: usize, keys: usize) -> [usize; 2] {
        let (least, most) = (1 - queries as i64, keys as i64 - 1);
        [self.row(least), self.row(most) + 1]
    }

    /// Projects the rows that any of these pairs of lengths (queries, keys) asks for; `projections` are the layer's own of
    /// queries and keys.
    pub(crate) fn places(
        &self,
        pairs: impl Iterator<Item = (usize, usize)>,
        projections: [&Linear; 2],
    ) -> Places {
        let rows = pairs.map(|(queries, keys)| self.rows(queries, keys));
        let [first, end] = rows
            .reduce(|a, b| [a[0].min(b[0]), a[1].max(b[1])])
            .unwrap_or([0, 1]);
        let mut table = self.table.tensor::<2>().narrow(0, first, end - first);
        if let Some([weight, bias]) = &self.norm {
            table = layer_norm(table, weight.tensor(), Some(bias.tensor()), self.knobs.eps);
        }
        let project = |layer: &Linear| {
            let y = layer.forward(table.clone());
            let [count, inner] = y.dims();
            y.reshape([count, self.heads, inner / self.heads])
                .permute([1, 2, 0])
        };
        let [q_proj, k_proj] = projections;
        let terms = self.knobs.terms;
        Places {
            keys: (terms.has_keys_place()).then(|| project(self.keys.as_ref().unwrap_or(k_proj))),
            queries: (terms.has_queries_place())
                .then(|| project(self.queries.as_ref().unwrap_or(q_proj))),
            first,
        }
    }

    /// The terms of positions for queries q `[heads, queries, width]` at the end of the places of k `[heads, keys, width]`:
    /// `[heads, queries, keys]`, without the scale.
    pub(crate) fn terms(&self, places: &Places, q: &Tensor<3>, k: &Tensor<3>) -> Tensor<3> {
        let [heads, queries, width] = q.dims();
        let keys = k.dims()[1];
        let [first, end] = self.rows(queries, keys);
        let (from, count) = (first - places.first, end - first);
        meter::add(self.pair_flops(queries, keys, width));
        let device = q.device();
        let at = |query: usize, key: usize| {
            let distance = (keys - queries + query) as i64 - key as i64;
            (self.row(distance) - first) as i64
        };
        let by_key = places.keys.as_ref().map(|table| {
            let products = q.clone().matmul(table.clone().narrow(2, from, count));
            let pairs = (0..queries * keys).map(|pair| at(pair / keys, pair % keys));
            pick(products, pairs, [heads, queries, keys], &device)
        });
        let by_query = places.queries.as_ref().map(|table| {
            let products = k.clone().matmul(table.clone().narrow(2, from, count));
            let pairs = (0..keys * queries).map(|pair| at(pair % queries, pair / queries));
            pick(products, pairs, [heads, keys, queries], &device).swap_dims(1, 2)
        });
        match (by_key, by_query) {
            (Some(a), Some(b)) => a + b,
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => Tensor::zeros([heads, queries, keys], &device),
        }
    }

    fn pair_flops(&self, queries: usize, keys: usize, width: usize) -> u64 {
        let [first, end] = self.rows(queries, keys);
        let rows = match self.knobs.terms {
            Terms::Both => queries + keys,
            Terms::ToPlace => queries,
            Terms::FromPlace => keys,
        };
        2 * (rows * (end - first) * self.heads * width) as u64
    }

    /// Operations beside those of attention without positions, for a sequence of `time` tokens.
    pub(crate) fn flops(&self, time: usize, width: usize) -> u64 {
        let [first, end] = self.rows(time, time);
        let dim = self.table.shape()[1];
        let projected = 2 * ((end - first) * dim * self.heads * width) as u64;
        self.knobs.terms.count() as u64 * projected + self.pair_flops(time, time, width)
    }
}

/// The values of each row of `products` `[heads, rows, buckets]` at `pairs`, to `shape` `[heads, rows, columns]`.
fn pick(
    products: Tensor<3>,
    pairs: impl Iterator<Item = i64>,
    shape: [usize; 3],
    device: &Device,
) -> Tensor<3> {
    let [_, rows, columns] = shape;
    let pairs: Vec<i64> = pairs.collect();
    let pairs = Tensor::<1, Int>::from_data(pairs.as_slice(), device);
    let pairs = pairs.reshape([1, rows, columns]).expand(shape);
    products.gather(2, pairs)
}

/// The signed bucket of a distance `i - j`, in single precision as the published models were trained with.
fn bucket(distance: i64, buckets: usize, longest: usize) -> i64 {
    let middle = (buckets / 2) as i64;
    let far = distance.abs();
    if far <= middle {
        return distance;
    }
    let half = middle as f32;
    let part = (far as f32 / half).ln() / ((longest as f32 - 1.0) / half).ln();
    let step = (part * (half - 1.0)).ceil() as i64 + middle;
    step * distance.signum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `make_log_bucket_position` of the paper's own repository, as transformers 5.23.0 has it.
    #[test]
    fn buckets_are_those_of_the_reference() {
        let distances = [0, 1, -3, 4, 5, 6, 7, 9, -9, 15, 31, 100];
        let got = distances.map(|distance| bucket(distance, 8, 32));
        assert_eq!(got, [0, 1, -3, 4, 5, 5, 5, 6, -6, 6, 7, 9]);
    }
}
