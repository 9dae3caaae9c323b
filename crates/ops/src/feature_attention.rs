//! Linear attention over the whole sequence as an op; see [`anyformer_kernels::feature_attention`] for the equation.

use std::sync::Arc;

use anyformer_kernels::feature_attention as kernel;
use anyformer_kernels::feature_attention::{FeatureAttention, Map};
use burn::tensor::Tensor;

use crate::activation::{only, relu, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, filled, on_cpu, sequences};
use crate::meter;
use crate::recurrence::guard_divisor;

/// What makes features of queries and keys; equations at [`Map`].
#[derive(Clone, Debug)]
pub enum FeatureMap {
    /// `x`.
    Identity,
    /// `elu(x) + 1`.
    Elu,
    /// `max(x, 0) + add`.
    Relu {
        /// Added to each feature.
        add: f32,
    },
    /// `[max(x, 0) sin a, max(x, 0) cos a]` with an angle for each of the `batch * time` tokens.
    Turned {
        /// `sin a`.
        sin: Arc<Vec<f32>>,
        /// `cos a`.
        cos: Arc<Vec<f32>>,
    },
    /// `max(W x, 0) + add`.
    RandomRelu {
        /// W, `[features, dim]`; it gets no gradient.
        rows: Tensor<2>,
        /// Added to each feature.
        add: f32,
    },
    /// `features^(-1/2) (exp(W x' - |x'|^2 / 2 - c) + eps)`, `x' = dim^(-1/4) x`.
    RandomExp {
        /// W, `[features, dim]`; it gets no gradient.
        rows: Tensor<2>,
        /// Added to each exponential.
        eps: f32,
    },
}

/// Whose features, which decides about the stabiliser c of [`FeatureMap::RandomExp`].
#[derive(Clone, Copy, Debug)]
pub enum Side<'a> {
    /// The largest exponent of each query.
    Query,
    /// The largest of all keys of a sequence (cumulative lengths of packed ones) and head.
    Key(Option<&'a [usize]>),
    /// Zero: a maximum over positions would look ahead.
    CausalKey,
}

impl FeatureMap {
    /// Features that come of `dim`.
    pub fn features(&self, dim: usize) -> usize {
        match self {
            FeatureMap::Identity | FeatureMap::Elu | FeatureMap::Relu { .. } => dim,
            FeatureMap::Turned { .. } => 2 * dim,
            FeatureMap::RandomRelu { rows, .. } | FeatureMap::RandomExp { rows, .. } => {
                rows.dims()[0]
            }
        }
    }

    /// Operations of the map over `rows` queries or keys of `dim`.
    fn flops(&self, rows: usize, dim: usize) -> u64 {
        match self.matrix() {
            Some(matrix) => 2 * (rows * dim * matrix.dims()[0]) as u64,
            None => 0,
        }
    }

    fn matrix(&self) -> Option<&Tensor<2>> {
        match self {
            FeatureMap::RandomRelu { rows, .. } | FeatureMap::RandomExp { rows, .. } => Some(rows),
            _ => None,
        }
    }

    /// Features `[batch, time, heads, features]` of queries or keys `[batch, time, heads, dim]`, out of tensor operations:
    /// what a causal recurrence takes.
    pub fn apply(&self, x: Tensor<4>, side: Side) -> Tensor<4> {
        let [batch, time, heads, dim] = x.dims();
        let rows = batch * time * heads;
        meter::add(self.flops(rows, dim));
        let project = |x: Tensor<4>, matrix: &Tensor<2>| {
            x.reshape([rows, dim])
                .matmul(matrix.clone().transpose())
                .reshape([batch, time, heads, matrix.dims()[0]])
        };
        match self {
            FeatureMap::Identity => x,
            // elu(x) + 1 = max(x, 0) + exp(min(x, 0)).
            FeatureMap::Elu => relu(x.clone()) + x.clamp_max(0.0).exp(),
            FeatureMap::Relu { add } => relu(x).add_scalar(*add),
            FeatureMap::Turned { sin, cos } => {
                let x = relu(x);
                let by = |values: &[f32]| {
                    let values = Tensor::<1>::from_data(values, &x.device());
                    x.clone() * values.reshape([batch, time, 1, 1])
                };
                Tensor::cat(vec![by(sin), by(cos)], 3)
            }
            FeatureMap::RandomRelu { rows, add } => relu(project(x, rows)).add_scalar(*add),
            FeatureMap::RandomExp { rows, eps } => {
                let x = x.mul_scalar((dim as f32).powf(-0.25));
                let projected = project(x.clone(), rows);
                let half = x.powi_scalar(2).sum_dim(3).mul_scalar(0.5);
                let most = match side {
                    Side::Query => Some(projected.clone().detach().max_dim(3)),
                    Side::Key(offsets) => Some(over_sequence(
                        projected.clone().detach().max_dim(3),
                        offsets,
                    )),
                    Side::CausalKey => None,
                };
                let exponent = projected - half;
                let exponent = match most {
                    Some(most) => exponent - most,
                    None => exponent,
                };
                let factor = (self.features(dim) as f32).powf(-0.5);
                exponent.exp().add_scalar(*eps).mul_scalar(factor)
            }
        }
    }
}

/// The largest of each sequence and head, repeated over its tokens; `[batch, time, heads, 1]`.
fn over_sequence(most: Tensor<4>, offsets: Option<&[usize]>) -> Tensor<4> {
    let [batch, time, heads, _] = most.dims();
    match offsets {
        None => most.max_dim(1).expand([batch, time, heads, 1]),
        Some(offsets) => {
            let pairs = offsets.windows(2).filter(|pair| pair[1] > pair[0]);
            let rows = pairs.map(|pair| {
                let piece = most.clone().slice([0..1, pair[0]..pair[1]]);
                piece.max_dim(1).expand([1, pair[1] - pair[0], heads, 1])
            });
            Tensor::cat(rows.collect(), 1)
        }
    }
}

/// Operations of [`feature_attention`] over `time` tokens: `features` of each head, its map not counted; `width` counts the
/// normaliser's column.
pub fn feature_attention_flops(time: usize, heads: usize, features: usize, width: usize) -> u64 {
    kernel::flops(time, heads, features, width)
}

/// `phi(q_i) (sum_j phi(k_j)^T v_j)` over all keys of a sequence, divided by `phi(q_i) . sum_j phi(k_j)` where `normalise` is
/// set; q, k `[batch, time, heads, dim]`, v `[batch, time, heads, value_dim]`. `offsets` are the cumulative lengths of packed
/// sequences (the batch is 1 then). A divisor nearer to zero than [`crate::recurrence::SMALLEST_DIVISOR`] is replaced by it
/// and gets no gradient.
pub fn feature_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    map: &FeatureMap,
    normalise: bool,
    offsets: Option<&Arc<Vec<usize>>>,
) -> Tensor<4> {
    let [batch, time, heads, dim] = q.dims();
    let width = v.dims()[3] + usize::from(normalise);
    let rows = batch * time;
    if !on_cpu(&q) {
        meter::add(kernel::flops(rows, heads, map.features(dim), width));
        return composed(
            [q, k, v],
            map,
            normalise,
            offsets.map(|held| held.as_slice()),
        );
    }
    meter::add(
        kernel::flops(rows, heads, map.features(dim), width) + 2 * map.flops(rows * heads, dim),
    );
    let matrix = map.matrix().cloned();
    let kernel = Features {
        map: map.clone(),
        normalise,
        offsets: sequences(offsets, batch, time),
    };
    match matrix {
        Some(matrix) => single(kernel, [erase(q), erase(k), erase(v), erase(matrix)]),
        None => single(kernel, [erase(q), erase(k), erase(v)]),
    }
}

#[derive(Debug)]
struct Features {
    /// Its matrix is an input of the kernel, where it has one.
    map: FeatureMap,
    normalise: bool,
    offsets: Arc<Vec<usize>>,
}

impl Features {
    fn arguments<'a>(&'a self, inputs: &[View<'a>]) -> FeatureAttention<'a> {
        let [q, k, v] = [inputs[0], inputs[1], inputs[2]];
        let matrix = || inputs[3].data;
        FeatureAttention {
            q: q.data,
            k: k.data,
            v: v.data,
            offsets: &self.offsets,
            heads: q.shape[2],
            dim: q.shape[3],
            value_dim: v.shape[3],
            map: match &self.map {
                FeatureMap::Identity => Map::Identity,
                FeatureMap::Elu => Map::Elu,
                FeatureMap::Relu { add } => Map::Relu { add: *add },
                FeatureMap::Turned { sin, cos } => Map::Turned { sin, cos },
                FeatureMap::RandomRelu { add, .. } => Map::RandomRelu {
                    rows: matrix(),
                    add: *add,
                },
                FeatureMap::RandomExp { eps, .. } => Map::RandomExp {
                    rows: matrix(),
                    eps: *eps,
                },
            },
            normalise: self.normalise,
        }
    }
}

#[allow(unsafe_code)]
impl Kernel for Features {
    /// The backward pass makes the features again: four products for two.
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let attention = self.arguments(inputs);
        let (heads, width) = (
            attention.heads,
            attention.value_dim + usize::from(self.normalise),
        );
        let rows = attention.q.len() / attention.dim.max(1);
        let features = attention.map.features(attention.dim);
        let map = 2 * attention.map.flops(rows);
        let once = kernel::flops(rows / heads.max(1), heads, features, width);
        [once + map, 2 * once + 2 * map]
    }

    fn forward(&self, inputs: &[View], save: bool) -> Forward {
        let mut saved = Vec::new();
        let fill = |o: &mut [f32]| saved = kernel::forward(&self.arguments(inputs), o);
        // SAFETY: the kernel writes every output.
        let o = unsafe { filled(inputs[2].data.len(), fill) };
        let count = saved.len();
        Forward {
            outputs: vec![Array::new(inputs[2].shape, o)],
            saved: match save {
                true => vec![Array::new([count], saved)],
                false => vec![],
            },
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (sums, d_o) = (saved[0].data, only(grads).data);
        let [mut dk, mut dv] = [Vec::new(), Vec::new()];
        // SAFETY: the kernel writes every gradient.
        let dq = unsafe {
            filled(inputs[0].data.len(), |dq| {
                dk = filled(inputs[1].data.len(), |dk| {
                    dv = filled(inputs[2].data.len(), |dv| {
                        kernel::backward(&self.arguments(inputs), sums, d_o, [dq, dk, dv]);
                    });
                });
            })
        };
        let mut all = vec![
            Some(Array::new(inputs[0].shape, dq)),
            Some(Array::new(inputs[1].shape, dk)),
            Some(Array::new(inputs[2].shape, dv)),
        ];
        all.resize(inputs.len(), None);
        all
    }
}

/// Features, then products sequence by sequence: the portable form.
fn composed(
    [q, k, v]: [Tensor<4>; 3],
    map: &FeatureMap,
    normalise: bool,
    offsets: Option<&[usize]>,
) -> Tensor<4> {
    let (q, k) = (map.apply(q, Side::Query), map.apply(k, Side::Key(offsets)));
    let one = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| {
        let [batch, _, heads, features] = q.dims();
        let sum = k
            .clone()
            .permute([0, 2, 3, 1])
            .matmul(v.permute([0, 2, 1, 3]));
        let q = q.permute([0, 2, 1, 3]);
        let o = q.clone().matmul(sum);
        let o = match normalise {
            true => {
                let keys = k.sum_dim(1).reshape([batch, heads, features, 1]);
                o / guard_divisor(q.matmul(keys))
            }
            false => o,
        };
        o.permute([0, 2, 1, 3])
    };
    match offsets {
        None => one(q, k, v),
        Some(offsets) => {
            let pairs = offsets.windows(2).filter(|pair| pair[1] > pair[0]);
            let piece = |x: &Tensor<4>, pair: &[usize]| x.clone().slice([0..1, pair[0]..pair[1]]);
            let rows = pairs.map(|pair| one(piece(&q, pair), piece(&k, pair), piece(&v, pair)));
            Tensor::cat(rows.collect(), 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};
    use burn::tensor::Device;

    #[test]
    fn the_kernel_agrees_with_the_composed_form() {
        let (time, heads, dim, value_dim) = (9, 2, 4, 3);
        let matrix = |device: &Device| {
            let rows: Vec<f32> = values(7, 6 * dim).iter().map(|x| 2.0 * x).collect();
            Tensor::<1>::from_data(rows.as_slice(), device).reshape([6, dim])
        };
        let angles = (0..time).map(|at| (0.15 * at as f32).sin_cos());
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.unzip();
        let (sin, cos) = (Arc::new(sin), Arc::new(cos));
        let inputs = [
            values(1, time * heads * dim),
            values(2, time * heads * dim),
            values(3, time * heads * value_dim),
        ];
        let maps: [fn(Tensor<2>) -> FeatureMap; 5] = [
            |_| FeatureMap::Elu,
            |_| FeatureMap::Relu { add: 1e-3 },
            |rows| FeatureMap::RandomRelu { rows, add: 1e-3 },
            |rows| FeatureMap::RandomExp { rows, eps: 1e-2 },
            |_| FeatureMap::Identity,
        ];
        let turned = FeatureMap::Turned { sin, cos };
        for offsets in [None, Some(Arc::new(vec![0, 2, 2, 9]))] {
            for which in 0..=maps.len() {
                let normalise = which != 4;
                agree(&format!("map {which} {offsets:?}"), 1e-4, &inputs, |x| {
                    let map = match maps.get(which) {
                        Some(map) => map(matrix(&x[0].device())),
                        None => turned.clone(),
                    };
                    let shape = [1, time, heads, dim];
                    let o = feature_attention(
                        x[0].clone().reshape(shape),
                        x[1].clone().reshape(shape),
                        x[2].clone().reshape([1, time, heads, value_dim]),
                        &map,
                        normalise,
                        offsets.as_ref(),
                    );
                    o.reshape([time * heads * value_dim])
                });
            }
        }
    }
}
