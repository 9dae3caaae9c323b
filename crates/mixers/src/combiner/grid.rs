//! The patterns over a padded grid, which look back only: logsparse and mixture.

use anyformer_ops::activation::softmax;
use anyformer_ops::{Device, Tensor};

use super::FORBIDDEN;
use crate::parts::indices;

/// A mask of shape `[1, a, b, c]`, zero where `sees` holds.
fn mask(
    [a, b, c]: [usize; 3],
    device: &Device,
    sees: impl Fn(usize, usize, usize) -> bool,
) -> Tensor<4> {
    let free = |at: usize| sees(at / (b * c), at / c % b, at % c);
    let values: Vec<f32> = (0..a * b * c)
        .map(|at| if free(at) { 0.0 } else { FORBIDDEN })
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape([1, a, b, c])
}

fn dots(q: Tensor<4>, k: Tensor<4>) -> Tensor<4> {
    q.matmul(k.swap_dims(2, 3))
}

/// The maximum over the second-last dimension, which is kept.
fn top(x: Tensor<4>) -> Tensor<4> {
    x.max_dim(2)
}

/// The running maximum over the second-last dimension of what came strictly before; zeros where nothing did.
fn running(x: Tensor<4>) -> Tensor<4> {
    let [_, _, count, _] = x.dims();
    let mut all = vec![x.clone().narrow(2, 0, 1).zeros_like()];
    let mut held: Option<Tensor<4>> = None;
    for at in 0..count - 1 {
        let next = x.clone().narrow(2, at, 1);
        let most = match held {
            None => next,
            Some(held) => held.max_pair(next),
        };
        all.push(most.clone());
        held = Some(most);
    }
    Tensor::cat(all, 2)
}

/// Rows by columns of one head each, `[heads of the batch, rows, columns, head_dim]`.
pub(super) struct Grid {
    pub(super) q: Tensor<4>,
    pub(super) k: Tensor<4>,
    pub(super) v: Tensor<4>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Grid {
    fn mask(&self, shape: [usize; 3], sees: impl Fn(usize, usize, usize) -> bool) -> Tensor<4> {
        mask(shape, &self.q.device(), sees)
    }

    /// `[heads, rows, columns, ..]` with rows and columns changed over.
    fn turned(x: &Tensor<4>) -> Tensor<4> {
        x.clone().swap_dims(1, 2)
    }

    pub(super) fn mixture(&self) -> Tensor<4> {
        let (n, s) = (self.rows, self.columns);
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Self::turned);
        // Columns above: [heads, columns, rows, ..] summed up to each row, seen from each row as [heads, rows, columns, ..].
        let above = self.mask([1, n, n], |_, row, other| other < row);
        let inner = softmax(dots(running(q.clone()), k.clone()) + above.clone());
        let columns = Self::turned(&inner.matmul(v.clone()));
        let column_keys = Self::turned(&running(k.clone()));
        let others =
            dots(self.q.clone(), column_keys) + self.mask([n, s, s], |row, i, j| row > 0 && i != j);
        // Earlier rows, to the left and to the right of the own column.
        let side = |backwards: bool| {
            let flip = |x: &Tensor<4>| match backwards {
                true => x.clone().flip([2]),
                false => x.clone(),
            };
            let [q, k, v] = [&self.q, &self.k, &self.v].map(flip);
            let before = self.mask([1, s, s], |_, i, j| j < i);
            let values = softmax(dots(running(q), k.clone()) + before).matmul(v);
            [flip(&running(k)), flip(&values)].map(|x| Self::turned(&x))
        };
        let sides = [side(false), side(true)];
        let last = [0, s - 1];
        let far = [0, 1].map(|at| {
            let seen = self.mask([s, n, n], |column, row, other| {
                other < row && column != last[at]
            });
            Self::turned(&(dots(q.clone(), sides[at][0].clone()) + seen))
        });
        let own = dots(self.q.clone(), self.k.clone()) + self.mask([1, s, s], |_, i, j| j <= i);
        let up = Self::turned(&(dots(q, k) + above));
        let [left, right] = far;
        let weights = softmax(Tensor::cat(vec![own, up, others, left, right], 3));
        let part = |start: usize, length: usize| weights.clone().narrow(3, start, length);
        let across = |start: usize, values: Tensor<4>| {
            Self::turned(&Self::turned(&part(start, n)).matmul(values))
        };
        let [[_, left], [_, right]] = sides;
        part(0, s).matmul(self.v.clone())
            + across(s, v)
            + part(s + n, s).matmul(columns)
            + across(2 * s + n, left)
            + across(2 * s + 2 * n, right)
    }
}

/// Levels of a sequence: blocks of 1, 2, 4 … tokens that end before its last token.
pub(super) fn levels(time: usize) -> usize {
    (time - 1).checked_ilog2().map_or(0, |log| log as usize + 1)
}

/// The past as blocks of powers of two; all `[heads, time, head_dim]`.
pub(super) fn logsparse(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> Tensor<3> {
    let [heads, time, width] = q.dims();
    let device = q.device();
    let product = |a: Tensor<3>, b: Tensor<3>| (a * b).sum_dim(2);
    let mut logits = vec![product(q.clone(), k.clone())];
    let mut values = vec![v.clone()];
    for level in 0..levels(time) {
        let size = 1 << level;
        let count = time / size;
        let blocks = |x: &Tensor<3>| {
            let whole = x.clone().narrow(1, 0, count * size);
            whole.reshape([heads, count, size, width])
        };
        let (keys, sums) = match level {
            0 => (k.clone(), v.clone()),
            _ => {
                let inner = softmax(dots(top(blocks(&q)), blocks(&k)));
                let flat = |x: Tensor<4>| x.reshape([heads, count, width]);
                (flat(top(blocks(&k))), flat(inner.matmul(blocks(&v))))
            }
        };
        let set = |token: usize| token >> level & 1 == 1;
        let places = (0..time).map(|token| if set(token) { token / size - 1 } else { 0 });
        let places = indices(places, &device);
        let absent: Vec<f32> = (0..time)
            .map(|token| if set(token) { 0.0 } else { FORBIDDEN })
            .collect();
        let absent = Tensor::<1>::from_data(absent.as_slice(), &device).reshape([1, time, 1]);
        logits.push(product(q.clone(), keys.select(1, places.clone())) + absent);
        values.push(sums.select(1, places));
    }
    let weights = softmax(Tensor::cat(logits, 2));
    let none = v.zeros_like();
    values
        .into_iter()
        .enumerate()
        .fold(none, |sum, (at, value)| {
            sum + weights.clone().narrow(2, at, 1) * value
        })
}
