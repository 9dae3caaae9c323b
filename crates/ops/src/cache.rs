//! Keys or values of several sequences, kept in pages that copies share: what attention carries while a text grows.

use std::sync::Arc;

use anyformer_kernels::attention::cache::Table;
pub use anyformer_kernels::attention::cache::{Element, PAGE};
use burn::tensor::{Device, Tensor, TensorData};

use crate::adapter::{erase, with_values};
use crate::lengths::cumulative;

/// Rows `[heads, dim]` of every token of some sequences. A value: what is added gives another cache, and both hold what
/// they have in common once. Of the CPU, and without gradients.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) tables: Arc<Vec<Table>>,
}

impl Cache {
    /// Caches of `sequences` sequences without a token.
    pub fn new(element: Element, sequences: usize, heads: usize, dim: usize) -> Self {
        let table = Table::new(element, heads, dim);
        Cache {
            tables: Arc::new(vec![table; sequences]),
        }
    }

    /// Tokens of each sequence.
    pub fn lengths(&self) -> Vec<usize> {
        self.tables.iter().map(Table::live).collect()
    }

    /// Tokens on the pages of each sequence: before those that count, some may stand that no longer do.
    pub(crate) fn held(&self) -> Vec<usize> {
        self.tables.iter().map(Table::len).collect()
    }

    /// The last tokens of each sequence, so many of it; pages before them are let go.
    pub fn last(&self, counts: &[usize]) -> Self {
        let tables = self.tables.iter().zip(counts);
        let tables = tables.map(|(table, count)| table.last(*count));
        Cache {
            tables: Arc::new(tables.collect()),
        }
    }

    /// `[heads, dim]` of a token; of no sequence at all, zeros.
    pub fn shape(&self) -> [usize; 2] {
        self.tables.first().map_or([0, 0], Table::shape)
    }

    /// How the values are held; f32 where there is no sequence.
    pub fn element(&self) -> Element {
        self.tables.first().map_or(Element::F32, Table::element)
    }

    /// Bytes of the tokens.
    pub fn bytes(&self) -> u64 {
        let [heads, dim] = self.shape();
        let tokens: usize = self.tables.iter().map(Table::live).sum();
        (tokens * heads * dim * self.element().bytes()) as u64
    }

    /// With the tokens of `x`, `[1, total, heads, dim]`, after those that are there; `offsets` are the cumulative numbers of
    /// new tokens of each sequence.
    pub fn with_rows(&self, x: Tensor<4>, offsets: &[usize]) -> Self {
        let [_, _, heads, dim] = x.dims();
        assert_eq!(offsets.len(), self.tables.len() + 1, "cached sequences");
        assert_eq!([heads, dim], self.shape(), "cached rows");
        let width = heads * dim;
        with_values(erase(x), |values| {
            let grown = self.tables.iter().zip(offsets.windows(2));
            let grown = grown
                .map(|(table, ends)| table.with_rows(&values[ends[0] * width..ends[1] * width]));
            Cache {
                tables: Arc::new(grown.collect()),
            }
        })
    }

    /// A cache of the rows `x`, `[total, heads, dim]` flat, of sequences of these lengths.
    pub fn of(element: Element, x: Tensor<1>, [heads, dim]: [usize; 2], lengths: &[usize]) -> Self {
        let offsets = cumulative(lengths.iter().copied());
        let total = offsets[lengths.len()];
        Cache::new(element, lengths.len(), heads, dim)
            .with_rows(x.reshape([1, total, heads, dim]), &offsets)
    }

    /// All rows, `[total, heads, dim]` flat, sequences end to end.
    pub fn values(&self, device: &Device) -> Tensor<1> {
        let [heads, dim] = self.shape();
        let total: usize = self.tables.iter().map(Table::live).sum();
        let mut values = vec![0.0; total * heads * dim];
        let mut rest = &mut values[..];
        for table in self.tables.iter() {
            let (now, later) = rest.split_at_mut(table.live() * heads * dim);
            table.read(now);
            rest = later;
        }
        let count = values.len();
        Tensor::from_data(TensorData::new(values, [count]), device)
    }

    /// The sequences `wanted`, in that order.
    pub fn select(&self, wanted: &[usize]) -> Self {
        let tables = wanted.iter().map(|index| self.tables[*index].clone());
        Cache {
            tables: Arc::new(tables.collect()),
        }
    }

    /// The sequences of several caches, one after the other.
    pub fn join<'a>(caches: impl IntoIterator<Item = &'a Cache>) -> Self {
        let tables = caches.into_iter().flat_map(|cache| cache.tables.iter());
        Cache {
            tables: Arc::new(tables.cloned().collect()),
        }
    }

    /// The first `time` tokens of each sequence.
    pub fn truncated(&self, time: usize) -> Self {
        let tables = self.tables.iter().map(|table| table.truncated(time));
        Cache {
            tables: Arc::new(tables.collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{AttentionOptions, cached_attention, flash_attention};
    use crate::check::values;
    use crate::tensor_values;

    #[test]
    fn a_cache_is_its_rows_and_attention_over_it_is_attention_over_them() {
        let device = Device::flex();
        let tensor = |seed, shape: [usize; 4]| {
            let count = shape.iter().product();
            Tensor::<1>::from_data(values(seed, count).as_slice(), &device).reshape(shape)
        };
        let lengths = [70, 3];
        let (k, v) = (tensor(1, [1, 73, 2, 8]), tensor(2, [1, 73, 2, 8]));
        let cache = |x: &Tensor<4>| {
            let flat = x.clone().reshape([73 * 16]);
            Cache::of(Element::F32, flat, [2, 8], &lengths)
        };
        let (keys, held) = (cache(&k), cache(&v));
        assert_eq!(
            tensor_values(keys.values(&device)),
            tensor_values(k.clone())
        );
        assert_eq!((keys.lengths(), keys.bytes()), (vec![70, 3], 73 * 64));
        let q = tensor(3, [1, 3, 4, 8]);
        let options = AttentionOptions {
            causal: true,
            q_offsets: Some(Arc::new(vec![0, 1, 3])),
            k_offsets: Some(Arc::new(vec![0, 70, 73])),
            ..AttentionOptions::default()
        };
        let want = tensor_values(flash_attention(q.clone(), k, v, &options));
        let got = cached_attention(q, &keys, &held, &options);
        assert_eq!(tensor_values(got), want);
        let swapped = keys.select(&[1, 0]);
        assert_eq!(swapped.lengths(), [3, 70]);
        let both = Cache::join([&swapped, &keys.truncated(2)]);
        assert_eq!(both.lengths(), [3, 70, 2, 2]);
        // The last of them, with what stands before on their pages hidden by a window.
        let (few, of_few) = (keys.last(&[5, 2]), held.last(&[5, 2]));
        assert_eq!((few.lengths(), few.bytes()), (vec![5, 2], 7 * 64));
        let windowed = AttentionOptions {
            window: Some(5),
            ..options.clone()
        };
        let q = tensor(3, [1, 3, 4, 8]);
        let [k, v] = [&keys, &held].map(|cache| cache.values(&device).reshape([1, 73, 2, 8]));
        let want = tensor_values(flash_attention(q.clone(), k, v, &windowed));
        let windowed = AttentionOptions {
            q_offsets: Some(Arc::new(vec![0, 1, 1])),
            window: Some(5),
            k_offsets: None,
            ..options
        };
        let got = cached_attention(q.narrow(1, 0, 1), &few, &of_few, &windowed);
        assert_eq!(tensor_values(got), want[..32]);
    }
}
