//! Embedding: rows of a table by number, and the gradient of the table.

use crate::simd::{block_rows, each};

/// `out[i] = weight[ids[i]]`, with weight `[vocabulary, dim]` and out `[ids, dim]`.
///
/// Panics when an id is out of range.
pub fn gather(dim: usize, weight: &[f32], ids: &[u32], out: &mut [f32]) {
    let vocabulary = check(dim, weight.len(), ids, out.len());
    let rows = block_rows(dim);
    let blocks = ids.chunks(rows).zip(out.chunks_mut(rows * dim));
    debug_assert!(ids.iter().all(|id| (*id as usize) < vocabulary));
    each(blocks, out_len(ids, dim), |(ids, out)| {
        // Rows of a head are short: a call for each copy would take longer than the copy.
        match dim {
            8 => gather_rows::<8>(weight, ids, out),
            16 => gather_rows::<16>(weight, ids, out),
            32 => gather_rows::<32>(weight, ids, out),
            64 => gather_rows::<64>(weight, ids, out),
            _ => {
                for (id, row) in ids.iter().zip(out.chunks_exact_mut(dim)) {
                    row.copy_from_slice(&weight[*id as usize * dim..][..dim]);
                }
            }
        }
    });
}

fn gather_rows<const DIM: usize>(weight: &[f32], ids: &[u32], out: &mut [f32]) {
    let ((table, _), (rows, _)) = (weight.as_chunks::<DIM>(), out.as_chunks_mut::<DIM>());
    for (id, row) in ids.iter().zip(rows) {
        *row = table[*id as usize];
    }
}

/// `dweight[v] = sum of dout[i] where ids[i] = v`, in the order of `i` whatever the number of threads. Overwrites
/// `dweight`.
pub fn scatter_add(dim: usize, dout: &[f32], ids: &[u32], dweight: &mut [f32]) {
    let vocabulary = check(dim, dweight.len(), ids, dout.len());
    // Positions sorted by id, stably: those of id v are order[starts[v]..starts[v + 1]].
    let mut starts = vec![0u32; vocabulary + 1];
    for id in ids {
        starts[*id as usize + 1] += 1;
    }
    for v in 0..vocabulary {
        starts[v + 1] += starts[v];
    }
    let mut next = starts.clone();
    let mut order = vec![0u32; ids.len()];
    for (position, id) in ids.iter().enumerate() {
        let slot = &mut next[*id as usize];
        order[*slot as usize] = position as u32;
        *slot += 1;
    }
    let sorted = Sorted {
        starts: &starts,
        order: &order,
    };
    // Small blocks, since frequent ids may be neighbours.
    let rows = block_rows(dim).div_ceil(8);
    let values = dweight.len().max(dout.len());
    each(
        dweight.chunks_mut(rows * dim).enumerate(),
        values,
        |(block, dweight)| {
            let first = block * rows;
            match dim {
                8 => sorted.sum_rows::<8>(first, dout, dweight),
                16 => sorted.sum_rows::<16>(first, dout, dweight),
                32 => sorted.sum_rows::<32>(first, dout, dweight),
                64 => sorted.sum_rows::<64>(first, dout, dweight),
                _ => {
                    for (row, total) in dweight.chunks_exact_mut(dim).enumerate() {
                        total.fill(0.0);
                        for position in sorted.positions(first + row) {
                            let row = &dout[*position as usize * dim..][..dim];
                            for (total, value) in total.iter_mut().zip(row) {
                                *total += value;
                            }
                        }
                    }
                }
            }
        },
    );
}

/// Positions by their ids.
#[derive(Clone, Copy)]
struct Sorted<'a> {
    starts: &'a [u32],
    order: &'a [u32],
}

impl<'a> Sorted<'a> {
    fn positions(self, id: usize) -> &'a [u32] {
        &self.order[self.starts[id] as usize..self.starts[id + 1] as usize]
    }

    /// The sums of the rows of the ids from `first` on.
    fn sum_rows<const DIM: usize>(self, first: usize, dout: &[f32], dweight: &mut [f32]) {
        let ((rows, _), (totals, _)) = (dout.as_chunks::<DIM>(), dweight.as_chunks_mut::<DIM>());
        for (row, total) in totals.iter_mut().enumerate() {
            let mut sum = [0.0; DIM];
            for position in self.positions(first + row) {
                let row = &rows[*position as usize];
                for c in 0..DIM {
                    sum[c] += row[c];
                }
            }
            *total = sum;
        }
    }
}

fn out_len(ids: &[u32], dim: usize) -> usize {
    ids.len() * dim
}

/// Returns the vocabulary.
fn check(dim: usize, weight: usize, ids: &[u32], out: usize) -> usize {
    assert!(dim > 0, "embedding: dim is zero");
    assert_eq!(
        weight % dim,
        0,
        "embedding: {weight} values in rows of {dim}"
    );
    assert_eq!(out, out_len(ids, dim), "embedding: ids and rows");
    let vocabulary = weight / dim;
    for id in ids {
        assert!(
            (*id as usize) < vocabulary,
            "embedding: id {id} of {vocabulary}"
        );
    }
    vocabulary
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, rand_vec};

    fn ids(seed: u64, n: usize, vocabulary: usize) -> Vec<u32> {
        let values = rand_vec(seed, n);
        values
            .iter()
            .map(|v| ((v + 1.0) / 2.0 * vocabulary as f32) as u32)
            .collect()
    }

    #[test]
    fn gather_and_its_adjoint() {
        for (vocabulary, dim, n) in [
            (1, 1, 1),
            (5, 3, 17),
            (300, 65, 700),
            (4, 7, 0),
            (40, 8, 90),
            (700, 16, 900),
            (9, 32, 5),
            (70, 64, 300),
        ] {
            let weight = rand_vec(1, vocabulary * dim);
            let ids = ids(2, n, vocabulary);
            let mut out = vec![0.0; n * dim];
            gather(dim, &weight, &ids, &mut out);
            let dout = rand_vec(3, n * dim);
            let mut want = vec![0.0f64; weight.len()];
            for i in 0..n {
                for d in 0..dim {
                    let at = ids[i] as usize * dim + d;
                    assert_eq!(out[i * dim + d], weight[at]);
                    want[at] += dout[i * dim + d] as f64;
                }
            }
            let mut dweight = vec![9.0; weight.len()];
            scatter_add(dim, &dout, &ids, &mut dweight);
            let want: Vec<f32> = want.iter().map(|v| *v as f32).collect();
            assert_close("dweight", &dweight, &want, 1e-6);
        }
    }

    #[test]
    #[should_panic(expected = "id 5 of 5")]
    fn id_out_of_range() {
        gather(2, &[0.0; 10], &[5], &mut [0.0; 2]);
    }
}
