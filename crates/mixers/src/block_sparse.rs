//! Softmax attention in which each block of queries looks at a list of key blocks: the engine of Longformer, BigBird and
//! the Sparse Transformer.
//!
//! A [`Plan`] holds the lists, one per head and query block. Query blocks with lists of one length are gathered together
//! and computed as one batch of small dense attentions; pairs that the pattern forbids inside a listed block are masked.
//! Time and memory follow the sum of the lists, not the square of the length.

use std::collections::BTreeMap;

use anyformer_ops::activation::softmax;
use anyformer_ops::{Device, Tensor, meter};

use crate::parts::indices;

/// Added to the logit of a forbidden pair.
const FORBIDDEN: f32 = -1e30;

/// Which key blocks every block of queries looks at.
pub(crate) struct Plan {
    block: usize,
    heads: usize,
    time: usize,
    /// `[head][query block]`, flat.
    lists: Vec<Vec<usize>>,
}

impl Plan {
    /// A plan over `time` tokens in blocks of `block`; `list` gives the key blocks of a head and query block out of the
    /// number of blocks, and must hold the query block itself.
    pub(crate) fn new(
        block: usize,
        heads: usize,
        time: usize,
        list: impl Fn(usize, usize, usize) -> Vec<usize>,
    ) -> Self {
        let blocks = time.div_ceil(block);
        let items = (0..heads).flat_map(|head| (0..blocks).map(move |query| (head, query)));
        Plan {
            block,
            heads,
            time,
            lists: items
                .map(|(head, query)| list(head, query, blocks))
                .collect(),
        }
    }

    /// Operations of one attention, whole blocks counted.
    pub(crate) fn flops(&self, head_dim: usize) -> u64 {
        let listed: usize = self.lists.iter().map(Vec::len).sum();
        4 * (listed * self.block * self.block * head_dim) as u64
    }

    /// `softmax(q kᵀ / sqrt(head_dim)) v` over the pairs in listed blocks for which `sees(query, key)` holds; all tensors
    /// `[batch, time, heads, head_dim]`. Every query must see a key.
    pub(crate) fn attend(
        &self,
        [q, k, v]: [Tensor<4>; 3],
        sees: impl Fn(usize, usize) -> bool,
    ) -> Tensor<4> {
        let [batch, time, heads, head_dim] = q.dims();
        let device = q.device();
        let (block, blocks) = (self.block, time.div_ceil(self.block));
        meter::add(self.flops(head_dim) * batch as u64);
        let scale = (head_dim as f32).powf(-0.5);
        // [batch, heads * blocks, block, head_dim]
        let cut = |x: Tensor<4>| {
            let mut x = x.swap_dims(1, 2);
            let missing = blocks * block - time;
            if missing > 0 {
                let rest = Tensor::zeros([batch, heads, missing, head_dim], &device);
                x = Tensor::cat(vec![x, rest], 2);
            }
            x.reshape([batch, heads * blocks, block, head_dim])
        };
        let (q, k, v) = (cut(q.mul_scalar(scale)), cut(k), cut(v));
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (item, list) in self.lists.iter().enumerate() {
            groups.entry(list.len()).or_default().push(item);
        }
        let mut outputs = Vec::new();
        let mut order = Vec::new();
        for (length, items) in groups {
            let count = items.len();
            let listed = items.iter().flat_map(|item| {
                let head = item / blocks;
                self.lists[*item].iter().map(move |key| head * blocks + key)
            });
            let listed = indices(listed, &device);
            let gather = |x: &Tensor<4>| {
                let x = x.clone().select(1, listed.clone());
                x.reshape([batch, count, length * block, head_dim])
            };
            let queries = q.clone().select(1, indices(items.iter().copied(), &device));
            let mask = self.mask(&items, length, &sees, &device);
            let scores = queries.matmul(gather(&k).swap_dims(2, 3)) + mask;
            outputs.push(softmax(scores).matmul(gather(&v)));
            order.extend(items);
        }
        let mut places = vec![0; order.len()];
        for (place, item) in order.iter().enumerate() {
            places[*item] = place;
        }
        let o = Tensor::cat(outputs, 1).select(1, indices(places.into_iter(), &device));
        o.reshape([batch, heads, blocks * block, head_dim])
            .narrow(2, 0, time)
            .swap_dims(1, 2)
    }

    /// What is added to the logits of `items`, `[1, items, block, length * block]`. Rows past the end see everything.
    fn mask(
        &self,
        items: &[usize],
        length: usize,
        sees: &impl Fn(usize, usize) -> bool,
        device: &Device,
    ) -> Tensor<4> {
        let block = self.block;
        let blocks = self.lists.len() / self.heads;
        let mut values = Vec::with_capacity(items.len() * block * length * block);
        for item in items {
            for query in (item % blocks) * block..(item % blocks + 1) * block {
                for key_block in &self.lists[*item] {
                    let keys = key_block * block..(key_block + 1) * block;
                    values.extend(keys.map(|key| {
                        let free = query >= self.time || (key < self.time && sees(query, key));
                        if free { 0.0 } else { FORBIDDEN }
                    }));
                }
            }
        }
        let shape = [1, items.len(), block, length * block];
        Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyformer_ops::attention::{AttentionOptions, flash_attention};
    use anyformer_ops::tensor_values;

    fn waves(factor: f32, shape: [usize; 4], device: &Device) -> Tensor<4> {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|at| (at as f32 * factor).sin()).collect();
        Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
    }

    /// Lists of different lengths and a last block that is not full: the same as causal attention.
    #[test]
    fn all_earlier_blocks_are_causal_attention() {
        let device = Device::flex();
        let [q, k, v] = [0.7, 1.3, 2.1].map(|factor| waves(factor, [2, 11, 3, 4], &device));
        let plan = Plan::new(4, 3, 11, |_, query, _| (0..=query).collect());
        let got = plan.attend([q.clone(), k.clone(), v.clone()], |i, j| j <= i);
        let options = AttentionOptions {
            causal: true,
            ..AttentionOptions::default()
        };
        let want = tensor_values(flash_attention(q, k, v, &options));
        for (got, want) in tensor_values(got).iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }
}
