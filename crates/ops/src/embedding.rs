//! Rows of a table by number.

use std::sync::Arc;

use anyformer_kernels::embedding as kernel;
use burn::tensor::{Int, Tensor, TensorData};

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu};
use crate::param::Param;

#[derive(Debug)]
struct Embedding {
    ids: Arc<Vec<u32>>,
    extents: [usize; 2],
}

impl Kernel for Embedding {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let weight = inputs[0];
        let dim = weight.shape[1];
        let mut rows = vec![0.0; self.ids.len() * dim];
        kernel::gather(dim, weight.data, &self.ids, &mut rows);
        let [batch, time] = self.extents;
        output(&[batch, time, dim], rows)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let weight = inputs[0];
        let mut dweight = vec![0.0; weight.data.len()];
        kernel::scatter_add(weight.shape[1], only(grads).data, &self.ids, &mut dweight);
        vec![Some(Array::new(weight.shape, dweight))]
    }
}

/// As [`embedding`] of a parameter, of which only those rows are widened where it is packed.
///
/// Panics when an id is not below the vocabulary.
pub fn embedding_of(weight: &Param, ids: Arc<Vec<u32>>, [batch, time]: [usize; 2]) -> Tensor<3> {
    let Some((packed, device)) = weight.packed_on() else {
        return embedding(weight.tensor::<2>(), ids, [batch, time]);
    };
    let rows = packed.widened(ids.iter().map(|id| *id as usize));
    let shape = [batch, time, packed.shape()[1]];
    Tensor::from_data(TensorData::new(rows, shape), &device)
}

/// Rows `ids` (`batch * time` of them) of `weight` (`[vocabulary, dim]`), as `[batch, time, dim]`. The gradient is summed in
/// the order of the ids, whatever the number of threads.
///
/// Panics when an id is not below the vocabulary: tokenizers and data loaders check theirs.
pub fn embedding(weight: Tensor<2>, ids: Arc<Vec<u32>>, [batch, time]: [usize; 2]) -> Tensor<3> {
    assert_eq!(ids.len(), batch * time, "embedding: ids");
    let [vocabulary, dim] = weight.dims();
    if on_cpu(&weight) {
        let extents = [batch, time];
        return single(Embedding { ids, extents }, [erase(weight)]);
    }
    for id in ids.iter() {
        assert!(
            (*id as usize) < vocabulary,
            "embedding: id {id} of {vocabulary}"
        );
    }
    let numbers: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let data = TensorData::new(numbers, [batch * time]);
    let numbers = Tensor::<1, Int>::from_data(data, &weight.device());
    weight.select(0, numbers).reshape([batch, time, dim])
}

#[derive(Debug)]
struct Summed {
    ids: Arc<Vec<u32>>,
    count: usize,
}

impl Kernel for Summed {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let dim = inputs[0].shape[1];
        let mut sums = vec![0.0; self.count * dim];
        kernel::scatter_add(dim, inputs[0].data, &self.ids, &mut sums);
        output(&[self.count, dim], sums)
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let dim = inputs[0].shape[1];
        let mut dx = vec![0.0; inputs[0].data.len()];
        kernel::gather(dim, only(grads).data, &self.ids, &mut dx);
        vec![Some(Array::new(inputs[0].shape, dx))]
    }
}

/// Sums of rows of `x` (`[rows, dim]`) by number, `[count, dim]`: row `i` goes to `ids[i]`, in the order of the rows whatever
/// the number of threads. The reverse of [`embedding`].
///
/// Panics when a number is not below `count`.
pub fn summed(x: Tensor<2>, ids: Arc<Vec<u32>>, count: usize) -> Tensor<2> {
    let [rows, dim] = x.dims();
    assert_eq!(ids.len(), rows, "summed: ids");
    if on_cpu(&x) {
        return single(Summed { ids, count }, [erase(x)]);
    }
    let numbers: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let data = TensorData::new(numbers, [rows]);
    let numbers = Tensor::<1, Int>::from_data(data, &x.device());
    let zeros = Tensor::<2>::zeros([count, dim], &x.device());
    zeros.select_assign(0, numbers, x, burn::tensor::IndexingUpdateOp::Add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn embedding_agrees_with_composed() {
        let ids = Arc::new(vec![3, 0, 3, 6, 1, 3]);
        let weight = values(1, 7 * 5);
        let y = agree("embedding", 1e-6, std::slice::from_ref(&weight), |v| {
            embedding(v[0].clone().reshape([7, 5]), ids.clone(), [2, 3]).reshape([30])
        });
        for (row, id) in y.chunks(5).zip(ids.iter()) {
            assert_eq!(row, &weight[*id as usize * 5..][..5]);
        }
    }

    #[test]
    fn sums_by_number_agree_with_composed() {
        let ids = Arc::new(vec![3, 0, 3, 1]);
        let x = values(1, 4 * 5);
        let y = agree("summed", 1e-6, std::slice::from_ref(&x), |v| {
            summed(v[0].clone().reshape([4, 5]), ids.clone(), 6).reshape([30])
        });
        assert_eq!(y[15], x[0] + x[10]);
        assert_eq!(y[20..], [0.0; 10]);
    }
}
