//! Exact softmax attention as an op; see [`anyformer_kernels::attention`] for the algorithm and its papers.

use std::sync::Arc;

use anyformer_kernels::attention as kernel;
pub use anyformer_kernels::attention::Plan;
use anyformer_kernels::attention::{Attention, Bias, Mask, OWN, Output, Rows};
use anyformer_kernels::matmul::Precision;
use burn::tensor::{Bool, Int, Tensor, TensorData};

use crate::activation::{both, single, softmax};
use crate::adapter::{Array, Forward, Kernel, View, apply, erase, on_cpu, or_zeros, sequences};
use crate::cache::Cache;
use crate::dropout::Placed;
use crate::lengths::cumulative;
use crate::meter;

/// Arguments that are not tensors.
#[derive(Clone, Debug, Default)]
pub struct AttentionOptions {
    /// Look at keys at or before the query only.
    pub causal: bool,
    /// Look at keys nearer than this only, the token itself counted.
    pub window: Option<usize>,
    /// Slopes of linear biases, one per query head.
    pub alibi: Option<Arc<Vec<f32>>>,
    /// Factor of the dot products; `1/sqrt(head_dim)` when absent.
    pub scale: Option<f32>,
    /// One for each sequence, in place of the mask: lists of the keys that each block of queries looks at. As many queries as
    /// keys, a key head for each query head, no biases.
    pub plans: Option<Arc<Vec<Arc<Plan>>>>,
    /// Cumulative query counts of packed sequences; the batch is 1 then.
    pub q_offsets: Option<Arc<Vec<usize>>>,
    /// Cumulative key counts of packed sequences; the batch is 1 then.
    pub k_offsets: Option<Arc<Vec<usize>>>,
    /// Where the first query of each sequence stands among its keys; absent, the last query stands at the last key.
    pub starts: Option<Arc<Vec<usize>>>,
    /// Numbers of the queries and of the keys, all sequences together: a pair of equal numbers has a score so low that the
    /// query reads that key only where it has no other.
    pub ids: Option<[Arc<Vec<u32>>; 2]>,
    /// Weights dropped, the others scaled up; sums of exponentials stay those of all. See [`crate::dropout::Dropout::at`].
    pub dropout: Option<Placed>,
    /// What the kernel rounds the operands of its products to, where there are more than a few queries.
    pub precision: Precision,
}

/// Operations of one attention, two per multiply-add of the pairs that the mask allows.
pub fn attention_flops(
    q_offsets: &[usize],
    k_offsets: &[usize],
    heads: usize,
    head_dim: usize,
    causal: bool,
    window: Option<usize>,
) -> u64 {
    let mask = Mask { causal, window };
    let dims = [head_dim, head_dim];
    kernel::flops(q_offsets, k_offsets, None, heads, dims, mask)
}

/// `softmax(scale q kᵀ + bias) v` per head, for q `[batch, time, heads, head_dim]` and k, v
/// `[batch, time_k, kv_heads, head_dim]`; query head `h` reads key head `h / (heads / kv_heads)`. The last query of a
/// sequence stands at its last key. A query that may see no key gives zero.
pub fn flash_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let flash = Flash::of(&q, &k, &v, options);
    match on_cpu(&q) {
        true => single(flash, [erase(q), erase(k), erase(v)]),
        false => flash.composed(q, k, v, None).0,
    }
}

/// [`flash_attention`] and the natural logarithm of the sum of exponentials of each query's scores,
/// `[batch, time, heads]`: minus infinity for a query that may see no key. With it results over different keys are joined.
pub fn attention_with_sums(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> (Tensor<4>, Tensor<3>) {
    let mut flash = Flash::of(&q, &k, &v, options);
    flash.gives_sums = true;
    if !on_cpu(&q) {
        let (o, sums) = flash.composed(q, k, v, None);
        return match sums {
            Some(sums) => (o, sums),
            None => unreachable!("sums were asked for"),
        };
    }
    both(apply(flash, [erase(q), erase(k), erase(v)]))
}

/// Joins results over different keys of the same queries: outputs `[.., features]` with their [`attention_with_sums`]
/// `[..]`, as one attention over all the keys. Each query has a key in one of them.
pub fn joined<const D: usize, const S: usize>(parts: Vec<(Tensor<D>, Tensor<S>)>) -> Tensor<D> {
    let largest = parts.iter().map(|(_, lse)| lse.clone().detach());
    let Some(largest) = largest.reduce(|a, b| a.max_pair(b)) else {
        panic!("results to join")
    };
    let weighted = parts.into_iter().map(|(o, lse)| {
        let mut shape = o.dims();
        shape[D - 1] = 1;
        let weight = (lse - largest.clone()).exp().reshape(shape);
        (o * weight.clone(), weight)
    });
    let sums = weighted.reduce(|(o, weight), (next, more)| (o + next, weight + more));
    match sums {
        Some((o, weight)) => o / weight,
        None => unreachable!("a part at least"),
    }
}

/// [`flash_attention`] whose scores have `table` (`[heads, distances]`) added: a query `d` places after a key reads place
/// `zero + d`, or the nearest that there is.
pub fn biased_attention(
    [q, k, v]: [Tensor<4>; 3],
    table: Tensor<2>,
    zero: usize,
    options: &AttentionOptions,
) -> Tensor<4> {
    let mut flash = Flash::of(&q, &k, &v, options);
    flash.zero = zero;
    match on_cpu(&q) {
        true => single(flash, [erase(q), erase(k), erase(v), erase(table)]),
        false => flash.composed(q, k, v, Some(table)).0,
    }
}

/// [`flash_attention`] of q `[1, total_q, heads, head_dim]` over kept keys and values, one sequence of them for each of
/// `q_offsets`; without gradients, on the CPU.
pub fn cached_attention(
    q: Tensor<4>,
    k: &Cache,
    v: &Cache,
    options: &AttentionOptions,
) -> Tensor<4> {
    single(Cached::new(&q, k, v, options), [erase(q)])
}

/// [`attention_with_sums`] over kept keys and values, as [`cached_attention`].
pub fn cached_attention_with_sums(
    q: Tensor<4>,
    k: &Cache,
    v: &Cache,
    options: &AttentionOptions,
) -> (Tensor<4>, Tensor<3>) {
    let mut cached = Cached::new(&q, k, v, options);
    cached.flash.gives_sums = true;
    both(apply(cached, [erase(q)]))
}

/// [`Flash`] whose keys and values are not tensors.
#[derive(Debug)]
struct Cached {
    k: Cache,
    v: Cache,
    flash: Flash,
}

impl Cached {
    /// The op for these queries; its operations are counted.
    fn new(q: &Tensor<4>, k: &Cache, v: &Cache, options: &AttentionOptions) -> Self {
        let k_offsets = Arc::new(cumulative(k.held()));
        let flash = Flash::new(options, q.dims(), k_offsets, k.shape()[0]);
        meter::add(flash.work(q.dims()[3], v.shape()[1]));
        let (k, v) = (k.clone(), v.clone());
        Cached { k, v, flash }
    }
}

impl Kernel for Cached {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let [batch, time, heads, _] = *inputs[0].shape else {
            panic!("attention: q of rank 4")
        };
        let value_dim = self.v.shape()[1];
        let attention = Attention {
            k: Rows::Paged(&self.k.tables),
            v: Rows::Paged(&self.v.tables),
            value_dim,
            ..self.flash.arguments(&[inputs[0]; 3])
        };
        let Output { o, lse } = kernel::forward(&attention);
        let sums = self.flash.gives_sums;
        let sums = sums.then(|| Array::new([batch, time, heads], lse));
        let o = Array::new([batch, time, heads, value_dim], o);
        Forward {
            outputs: std::iter::once(o).chain(sums).collect(),
            saved: Vec::new(),
        }
    }

    fn backward(
        &self,
        _inputs: &[View],
        _saved: &[View],
        _grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        panic!("attention over a cache has no gradient")
    }

    fn flops(&self, _inputs: &[View]) -> [u64; 2] {
        [self.flash.work(self.k.shape()[1], self.v.shape()[1]), 0]
    }

    fn own_bytes(&self) -> u64 {
        self.k.bytes() + self.v.bytes()
    }
}

#[derive(Debug)]
struct Flash {
    q_offsets: Arc<Vec<usize>>,
    k_offsets: Arc<Vec<usize>>,
    mask: Mask,
    plans: Option<Arc<Vec<Arc<Plan>>>>,
    starts: Option<Arc<Vec<usize>>>,
    alibi: Option<Arc<Vec<f32>>>,
    ids: Option<[Arc<Vec<u32>>; 2]>,
    dropout: Option<Placed>,
    scale: f32,
    precision: Precision,
    heads: usize,
    kv_heads: usize,
    /// Where the distance 0 stands in the biases, which are the fourth input where there are any.
    zero: usize,
    /// Whether lse is an output.
    gives_sums: bool,
}

impl Flash {
    /// The op for these tensors; its operations are counted.
    fn of(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, options: &AttentionOptions) -> Self {
        let [batch, time_k, kv_heads, _] = k.dims();
        let k_offsets = sequences(options.k_offsets.as_ref(), batch, time_k);
        let flash = Flash::new(options, q.dims(), k_offsets, kv_heads);
        meter::add(flash.work(q.dims()[3], v.dims()[3]));
        flash
    }

    fn new(
        options: &AttentionOptions,
        [batch, time, heads, head_dim]: [usize; 4],
        k_offsets: Arc<Vec<usize>>,
        kv_heads: usize,
    ) -> Self {
        Flash {
            q_offsets: sequences(options.q_offsets.as_ref(), batch, time),
            k_offsets,
            mask: Mask {
                causal: options.causal,
                window: options.window,
            },
            plans: options.plans.clone(),
            starts: options.starts.clone(),
            ids: options.ids.clone(),
            dropout: options.dropout,
            zero: 0,
            gives_sums: false,
            alibi: options.alibi.clone(),
            scale: options.scale.unwrap_or((head_dim as f32).powf(-0.5)),
            precision: options.precision,
            heads,
            kv_heads,
        }
    }

    /// Operations of a forward pass.
    fn work(&self, head_dim: usize, value_dim: usize) -> u64 {
        if let Some(plans) = &self.plans {
            return kernel::listed_flops(plans, self.heads, [head_dim, value_dim]);
        }
        let (q, k) = (&self.q_offsets, &self.k_offsets);
        let starts = self.starts.as_ref().map(|starts| &starts[..]);
        kernel::flops(q, k, starts, self.heads, [head_dim, value_dim], self.mask)
    }

    fn arguments<'a>(&'a self, inputs: &[View<'a>]) -> Attention<'a> {
        Attention {
            bias: inputs.get(3).map(|table| Bias {
                table: table.data,
                zero: self.zero,
            }),
            ids: self.ids.as_ref().map(|[q, k]| [&q[..], &k[..]]),
            dropout: self.dropout,
            q: inputs[0].data,
            k: Rows::Flat(inputs[1].data),
            v: Rows::Flat(inputs[2].data),
            q_offsets: &self.q_offsets,
            k_offsets: &self.k_offsets,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: inputs[0].shape[3],
            value_dim: inputs[2].shape[3],
            mask: self.mask,
            plans: self.plans.as_ref().map(|plans| plans.as_slice()),
            starts: self.starts.as_ref().map(|starts| &starts[..]),
            alibi: self.alibi.as_ref().map(|slopes| slopes.as_slice()),
            scale: self.scale,
            precision: self.precision,
        }
    }

    /// The whole matrix of scores, sequence by sequence: the portable form. Sums where they are asked for.
    fn composed(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        table: Option<Tensor<2>>,
    ) -> (Tensor<4>, Option<Tensor<3>>) {
        let [batch, time, heads, _] = q.dims();
        let value_dim = v.dims()[3];
        let rows = |x: Tensor<4>| match x.dims() {
            // A reshape takes an extent of 0 for something else.
            [_, 0, heads, width] => Tensor::empty([0, heads, width], &x.device()),
            [batch, time, heads, width] => x.reshape([batch * time, heads, width]),
        };
        let (q, k, v) = (rows(q), rows(k), rows(v));
        let pairs = self.q_offsets.windows(2).zip(self.k_offsets.windows(2));
        let (mut outputs, mut sums) = (Vec::new(), Vec::new());
        for (sequence, (queries, keys)) in pairs.enumerate() {
            let (count, held) = (queries[1] - queries[0], keys[1] - keys[0]);
            if count == 0 {
                continue;
            }
            if held == 0 {
                outputs.push(Tensor::zeros([count, heads, value_dim], &v.device()));
                if self.gives_sums {
                    sums.push(Tensor::full([count, heads], f32::NEG_INFINITY, &v.device()));
                }
                continue;
            }
            let spread = |x: &Tensor<3>| {
                let [_, kv_heads, width] = x.dims();
                x.clone()
                    .slice([keys[0]..keys[1]])
                    .reshape([held, kv_heads, 1, width])
                    .repeat_dim(2, heads / kv_heads)
                    .reshape([held, heads, width])
                    .swap_dims(0, 1)
            };
            let q = q.clone().slice([queries[0]..queries[1]]).swap_dims(0, 1);
            let mut scores = q.matmul(spread(&k).swap_dims(1, 2)).mul_scalar(self.scale);
            let (distance, forbidden, seen) = match &self.plans {
                Some(plans) => listed(&plans[sequence], heads),
                None => self.geometry(sequence, count, held),
            };
            let device = scores.device();
            if let Some(table) = &table {
                let last = table.dims()[1] as isize - 1;
                let place = |at: &isize| (self.zero as isize + at).clamp(0, last) as i64;
                let places: Vec<i64> = distance.iter().map(place).collect();
                let places = Tensor::<1, Int>::from_data(places.as_slice(), &device);
                let bias = table.clone().select(1, places);
                scores = scores + bias.reshape([heads, count, held]);
            }
            if let Some(slopes) = &self.alibi {
                let distance: Vec<f32> =
                    distance.iter().map(|at| at.unsigned_abs() as f32).collect();
                let distance = Tensor::<1>::from_data(distance.as_slice(), &device);
                let slopes = Tensor::<1>::from_data(slopes.as_slice(), &device);
                let bias = slopes.reshape([heads, 1, 1]) * distance.reshape([1, count, held]);
                scores = scores - bias;
            }
            let fill = |scores: Tensor<3>, places: Vec<bool>, value: f32| {
                // One for all heads, or one for each.
                let masks = places.len() / (count * held);
                let places = TensorData::new(places, [masks, count, held]);
                let places = Tensor::<3, Bool>::from_data(places, &device);
                scores.mask_fill(places.expand([heads, count, held]), value)
            };
            if let Some([q_ids, k_ids]) = &self.ids {
                let own = q_ids[queries[0]..queries[1]]
                    .iter()
                    .flat_map(|q| k_ids[keys[0]..keys[1]].iter().map(move |k| q == k));
                scores = fill(scores, own.collect(), OWN);
            }
            let scores = fill(scores, forbidden, -1e30);
            let masks = seen.len() / count;
            let seen = Tensor::<1>::from_data(seen.as_slice(), &device);
            let seen = seen.reshape([masks, count, 1]);
            if self.gives_sums {
                let largest = scores.clone().detach().max_dim(2);
                let sum = (scores.clone() - largest.clone()).exp().sum_dim(2);
                // The logarithm of what a query without a key sees: minus infinity.
                let lse = sum.log() + largest + seen.clone().log();
                sums.push(lse.reshape([heads, count]).swap_dims(0, 1));
            }
            let mut weights = softmax(scores);
            if let Some(dropout) = &self.dropout {
                let shape = [[heads, self.kv_heads], [count, held]];
                let factors = kernel::factors(dropout, sequence, shape[0], shape[1]);
                let factors = TensorData::new(factors, [heads, count, held]);
                weights = weights * Tensor::from_data(factors, &device);
            }
            outputs.push((weights.matmul(spread(&v)) * seen).swap_dims(0, 1));
        }
        let shape = [batch, time, heads];
        let device = v.device();
        match outputs.is_empty() {
            true => (
                Tensor::zeros([batch, time, heads, value_dim], &device),
                self.gives_sums
                    .then(|| Tensor::full(shape, f32::NEG_INFINITY, &device)),
            ),
            false => (
                Tensor::cat(outputs, 0).reshape([batch, time, heads, value_dim]),
                self.gives_sums.then(|| Tensor::cat(sums, 0).reshape(shape)),
            ),
        }
    }

    /// Distances, forbidden pairs, and per query one, or zero where it may see nothing.
    fn geometry(
        &self,
        sequence: usize,
        queries: usize,
        keys: usize,
    ) -> (Vec<isize>, Vec<bool>, Vec<f32>) {
        let (mut distances, mut forbidden) = (Vec::new(), Vec::new());
        let mut seen = vec![0.0; queries];
        for query in 0..queries {
            let at = match &self.starts {
                Some(starts) => (starts[sequence] + query) as isize,
                None => (keys + query) as isize - queries as isize,
            };
            for key in 0..keys {
                let distance = at - key as isize;
                distances.push(distance);
                let late = self.mask.causal && distance < 0;
                let far = self
                    .mask
                    .window
                    .is_some_and(|window| distance.unsigned_abs() >= window);
                forbidden.push(late || far);
                if !late && !far {
                    seen[query] = 1.0;
                }
            }
        }
        (distances, forbidden, seen)
    }
}

/// What [`Flash::geometry`] gives, of a plan: without distances, for every head.
fn listed(plan: &Plan, heads: usize) -> (Vec<isize>, Vec<bool>, Vec<f32>) {
    let time = plan.time();
    let mut forbidden = vec![true; heads * time * time];
    let mut seen = vec![0.0; heads * time];
    for head in 0..heads {
        plan.pairs(head, |query, key| {
            forbidden[(head * time + query) * time + key] = false;
            seen[head * time + query] = 1.0;
        });
    }
    (Vec::new(), forbidden, seen)
}

impl Kernel for Flash {
    fn keeps_output(&self) -> bool {
        true
    }

    /// The backward pass computes the scores again: five products for two.
    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let once = self.work(inputs[0].shape[3], inputs[2].shape[3]);
        [once, once * 5 / 2]
    }

    fn forward(&self, inputs: &[View], save: bool) -> Forward {
        let attention = self.arguments(inputs);
        let Output { o, lse } = kernel::forward(&attention);
        let shape = [
            inputs[0].shape[0],
            inputs[0].shape[1],
            self.heads,
            attention.value_dim,
        ];
        let sums = self
            .gives_sums
            .then(|| Array::new(&shape[..3], lse.clone()));
        let count = lse.len();
        Forward {
            saved: match save {
                true => vec![Array::new([count], lse)],
                false => vec![],
            },
            outputs: std::iter::once(Array::new(shape, o)).chain(sums).collect(),
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (o, lse) = (saved[0].data, saved[1].data);
        let d_o = or_zeros(grads[0], o.len());
        let dlse = grads.get(1).copied().flatten().map(|grad| grad.data);
        let arguments = self.arguments(inputs);
        let got = kernel::backward(&arguments, o, lse, &d_o, dlse);
        let all = [got.q, got.k, got.v, got.bias];
        let shapes = inputs.iter().map(|input| input.shape);
        let all = shapes
            .zip(all)
            .map(|(shape, values)| Some(Array::new(shape, values)));
        all.collect()
    }
}

#[cfg(test)]
mod tests;
