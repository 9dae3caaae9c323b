//! Exact softmax attention as an op; see [`anyformer_kernels::attention`] for the algorithm and its papers.

use std::sync::Arc;

use anyformer_kernels::attention as kernel;
pub use anyformer_kernels::attention::Plan;
use anyformer_kernels::attention::{Attention, Mask, Output, Rows};
use burn::tensor::{Bool, Tensor, TensorData};

use crate::activation::{single, softmax};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu, sequences};
use crate::cache::Cache;
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
    kernel::flops(q_offsets, k_offsets, heads, head_dim, head_dim, mask)
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
    let [batch, time, heads, head_dim] = q.dims();
    let [_, time_k, kv_heads, _] = k.dims();
    let k_offsets = sequences(options.k_offsets.as_ref(), batch, time_k);
    let flash = Flash::new(options, [batch, time, heads, head_dim], k_offsets, kv_heads);
    meter::add(flash.work(head_dim, v.dims()[3]));
    match on_cpu(&q) {
        true => single(flash, [erase(q), erase(k), erase(v)]),
        false => flash.composed(q, k, v),
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
    let [batch, time, heads, head_dim] = q.dims();
    let k_offsets = Arc::new(cumulative(k.lengths()));
    let flash = Flash::new(
        options,
        [batch, time, heads, head_dim],
        k_offsets,
        k.shape()[0],
    );
    meter::add(flash.work(head_dim, v.shape()[1]));
    let (k, v) = (k.clone(), v.clone());
    single(Cached { k, v, flash }, [erase(q)])
}

/// [`Flash`] whose keys and values are not tensors.
#[derive(Debug)]
struct Cached {
    k: Cache,
    v: Cache,
    flash: Flash,
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
            ..self.flash.arguments([inputs[0]; 3])
        };
        let Output { o, .. } = kernel::forward(&attention);
        Forward {
            outputs: vec![Array::new([batch, time, heads, value_dim], o)],
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
    alibi: Option<Arc<Vec<f32>>>,
    scale: f32,
    heads: usize,
    kv_heads: usize,
}

impl Flash {
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
            alibi: options.alibi.clone(),
            scale: options.scale.unwrap_or((head_dim as f32).powf(-0.5)),
            heads,
            kv_heads,
        }
    }

    /// Operations of a forward pass.
    fn work(&self, head_dim: usize, value_dim: usize) -> u64 {
        if let Some(plans) = &self.plans {
            let once = |plan: &Arc<Plan>| plan.flops(self.heads, head_dim, value_dim);
            return plans.iter().map(once).sum();
        }
        let (q, k) = (&self.q_offsets, &self.k_offsets);
        kernel::flops(q, k, self.heads, head_dim, value_dim, self.mask)
    }

    fn arguments<'a>(&'a self, inputs: [View<'a>; 3]) -> Attention<'a> {
        Attention {
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
            alibi: self.alibi.as_ref().map(|slopes| slopes.as_slice()),
            scale: self.scale,
        }
    }

    /// The whole matrix of scores, sequence by sequence: the portable form.
    fn composed(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        let [batch, time, heads, _] = q.dims();
        let value_dim = v.dims()[3];
        let rows = |x: Tensor<4>| {
            let [batch, time, heads, width] = x.dims();
            x.reshape([batch * time, heads, width])
        };
        let (q, k, v) = (rows(q), rows(k), rows(v));
        let pairs = self.q_offsets.windows(2).zip(self.k_offsets.windows(2));
        let mut outputs = Vec::new();
        for (row, (queries, keys)) in pairs.enumerate() {
            let (count, held) = (queries[1] - queries[0], keys[1] - keys[0]);
            if count == 0 {
                continue;
            }
            if held == 0 {
                outputs.push(Tensor::zeros([count, heads, value_dim], &v.device()));
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
                Some(plans) => listed(&plans[row], heads),
                None => self.geometry(count, held),
            };
            // One for all heads, or one for each.
            let masks = seen.len() / count;
            let device = scores.device();
            if let Some(slopes) = &self.alibi {
                let distance = Tensor::<1>::from_data(distance.as_slice(), &device);
                let slopes = Tensor::<1>::from_data(slopes.as_slice(), &device);
                let bias = slopes.reshape([heads, 1, 1]) * distance.reshape([1, count, held]);
                scores = scores - bias;
            }
            let forbidden = TensorData::new(forbidden, [masks, count, held]);
            let forbidden = Tensor::<3, Bool>::from_data(forbidden, &device);
            let scores = scores.mask_fill(forbidden.expand([heads, count, held]), -1e30);
            let seen = Tensor::<1>::from_data(seen.as_slice(), &device);
            let seen = seen.reshape([masks, count, 1]);
            outputs.push((softmax(scores).matmul(spread(&v)) * seen).swap_dims(0, 1));
        }
        match outputs.is_empty() {
            true => Tensor::zeros([batch, time, heads, value_dim], &v.device()),
            false => Tensor::cat(outputs, 0).reshape([batch, time, heads, value_dim]),
        }
    }

    /// Distances, forbidden pairs, and per query one, or zero where it may see nothing.
    fn geometry(&self, queries: usize, keys: usize) -> (Vec<f32>, Vec<bool>, Vec<f32>) {
        let (mut distances, mut forbidden) = (Vec::new(), Vec::new());
        let mut seen = vec![0.0; queries];
        for query in 0..queries {
            let at = (keys + query) as isize - queries as isize;
            for key in 0..keys {
                let distance = at - key as isize;
                distances.push(distance.unsigned_abs() as f32);
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
fn listed(plan: &Plan, heads: usize) -> (Vec<f32>, Vec<bool>, Vec<f32>) {
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
        let attention = self.arguments([inputs[0], inputs[1], inputs[2]]);
        let Output { o, lse } = kernel::forward(&attention);
        let shape = [
            inputs[0].shape[0],
            inputs[0].shape[1],
            self.heads,
            attention.value_dim,
        ];
        let count = lse.len();
        Forward {
            saved: match save {
                true => vec![Array::new([count], lse)],
                false => vec![],
            },
            outputs: vec![Array::new(shape, o)],
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (o, lse) = (saved[0].data, saved[1].data);
        let d_o = crate::activation::only(grads).data;
        let arguments = self.arguments([inputs[0], inputs[1], inputs[2]]);
        let got = kernel::backward(&arguments, o, lse, d_o, None);
        vec![
            Some(Array::new(inputs[0].shape, got.q)),
            Some(Array::new(inputs[1].shape, got.k)),
            Some(Array::new(inputs[2].shape, got.v)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn kernel_equals_the_matrix_form() {
        let (heads, kv_heads, head_dim) = (4, 2, 6);
        let (q_offsets, k_offsets) = (vec![0, 3, 3, 12], vec![0, 7, 7, 16]);
        let (queries, keys) = (12, 16);
        let inputs = [
            values(1, queries * heads * head_dim),
            values(2, keys * kv_heads * head_dim),
            values(3, keys * kv_heads * head_dim),
        ];
        for causal in [true, false] {
            for window in [None, Some(3)] {
                for alibi in [None, Some(Arc::new(vec![0.5, 0.25, 0.125, 0.1]))] {
                    let options = AttentionOptions {
                        causal,
                        window,
                        alibi: alibi.clone(),
                        plans: None,
                        scale: None,
                        q_offsets: Some(Arc::new(q_offsets.clone())),
                        k_offsets: Some(Arc::new(k_offsets.clone())),
                    };
                    let name = format!("causal {causal} window {window:?} alibi {alibi:?}");
                    agree(&name, 1e-4, &inputs, |x| {
                        let keys = [1, keys, kv_heads, head_dim];
                        let o = flash_attention(
                            x[0].clone().reshape([1, queries, heads, head_dim]),
                            x[1].clone().reshape(keys),
                            x[2].clone().reshape(keys),
                            &options,
                        );
                        o.reshape([queries * heads * head_dim])
                    });
                }
            }
        }
    }

    #[test]
    fn listed_keys_equal_the_matrix_form() {
        let (time, heads, head_dim) = (20, 2, 4);
        let offsets = Arc::new(vec![0, 0, 3, 20]);
        let inputs = [1, 2, 3].map(|seed| values(seed, time * heads * head_dim));
        // Every other key for one head, a window for the other; the first query sees nothing.
        let sees = |head: usize, query: usize, key: usize| {
            query > 0
                && match head {
                    0 => key.is_multiple_of(2),
                    _ => query.abs_diff(key) <= 2,
                }
        };
        let plan = |ends: &[usize]| {
            let time = ends[1] - ends[0];
            Arc::new(Plan::new(time, heads, 8, |_, _| vec![0..time], sees))
        };
        let options = AttentionOptions {
            plans: Some(Arc::new(offsets.windows(2).map(plan).collect())),
            q_offsets: Some(offsets.clone()),
            k_offsets: Some(offsets.clone()),
            ..AttentionOptions::default()
        };
        agree("listed", 1e-4, &inputs, |x| {
            let shape = [1, time, heads, head_dim];
            let [q, k, v] = [0, 1, 2].map(|at: usize| x[at].clone().reshape(shape));
            flash_attention(q, k, v, &options).reshape([time * heads * head_dim])
        });
    }
}
