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
}
