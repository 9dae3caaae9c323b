//! The equation as loops, in f64; the whole row of probabilities at once.

use super::{Mask, OWN, dropped};
use crate::dropout::Dropout;

/// The arguments, as in [`super::Attention`].
#[derive(Clone, Debug)]
pub struct Naive {
    /// `[total_q, heads, head_dim]`.
    pub q: Vec<f64>,
    /// `[total_k, kv_heads, head_dim]`.
    pub k: Vec<f64>,
    /// `[total_k, kv_heads, value_dim]`.
    pub v: Vec<f64>,
    /// Cumulative query counts.
    pub q_offsets: Vec<usize>,
    /// Cumulative key counts.
    pub k_offsets: Vec<usize>,
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Features of queries and keys.
    pub head_dim: usize,
    /// Features of values.
    pub value_dim: usize,
    /// Where the first query of each sequence stands.
    pub starts: Option<Vec<usize>>,
    /// Which keys count.
    pub mask: Mask,
    /// In place of the mask: whether a head's query reads a key, both counted within their sequence.
    pub reads: Option<fn(usize, usize, usize) -> bool>,
    /// Slopes of linear biases.
    pub alibi: Option<Vec<f64>>,
    /// Biases by distance `[heads, distances]`, and where the distance 0 stands.
    pub bias: Option<(Vec<f64>, usize)>,
    /// Numbers of queries and keys.
    pub ids: Option<[Vec<u32>; 2]>,
    /// Which weights are dropped.
    pub dropout: Option<Dropout>,
    /// Factor of the dot products.
    pub scale: f64,
}

impl Naive {
    /// Calls `row(query row, pairs)` for every query row of `[total_q, heads]`.
    fn rows(&self, mut row: impl FnMut(usize, &[Pair])) {
        let (dim, fold) = (self.head_dim, self.heads / self.kv_heads);
        let ends = self.q_offsets.windows(2).zip(self.k_offsets.windows(2));
        for (sequence, (qs, ks)) in ends.enumerate() {
            for i in qs[0]..qs[1] {
                let position = match &self.starts {
                    Some(starts) => (starts[sequence] + i - qs[0]) as i64,
                    None => i as i64 - qs[1] as i64 + (ks[1] - ks[0]) as i64,
                };
                for h in 0..self.heads {
                    let q = &self.q[(i * self.heads + h) * dim..][..dim];
                    let mut scores = Vec::new();
                    for j in ks[0]..ks[1] {
                        let distance = position - (j - ks[0]) as i64;
                        let late = self.mask.causal && distance < 0;
                        let unread = |reads: fn(usize, usize, usize) -> bool| {
                            !reads(h, i - qs[0], j - ks[0])
                        };
                        if self.reads.is_some_and(unread) {
                            continue;
                        }
                        if late
                            || self.mask.window.is_some_and(|w| {
                                distance.abs() >= i64::try_from(w).unwrap_or(i64::MAX)
                            })
                        {
                            continue;
                        }
                        let at = j * self.kv_heads + h / fold;
                        let k = &self.k[at * dim..][..dim];
                        let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        let slope = self.alibi.as_ref().map_or(0.0, |slopes| slopes[h]);
                        let mut score = self.scale * dot - slope * distance.abs() as f64;
                        let place = self.place(h, distance);
                        if let Some((table, _)) = &self.bias {
                            score += table[place];
                        }
                        let ids = self.ids.as_ref();
                        let own = ids.is_some_and(|[queries, keys]| queries[i] == keys[j]);
                        let row = (i - qs[0]) * fold + h % fold;
                        let keep = self.dropout.as_ref().map_or(1.0, |dropout| {
                            dropped::factor(dropout, sequence, h / fold, row, j - ks[0])
                        });
                        scores.push(Pair {
                            keep: f64::from(keep),
                            at,
                            score: if own { f64::from(OWN) } else { score },
                            place,
                            own,
                        });
                    }
                    row(i * self.heads + h, &scores);
                }
            }
        }
    }

    /// The place of a head and distance in the table of biases.
    fn place(&self, head: usize, distance: i64) -> usize {
        let (distances, zero) = match &self.bias {
            Some((table, zero)) => (table.len() / self.heads, *zero),
            None => (1, 0),
        };
        let place = (distance + zero as i64).clamp(0, distances as i64 - 1);
        head * distances + place as usize
    }

    /// Gives `(o, lse)`.
    pub fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let (rows, dim) = (self.q.len() / self.head_dim, self.value_dim);
        let (mut o, mut lse) = (vec![0.0; rows * dim], vec![f64::NEG_INFINITY; rows]);
        self.rows(|row, scores| {
            lse[row] = log_sum_exp(scores);
            for Pair {
                at, score, keep, ..
            } in scores
            {
                let p = keep * (score - lse[row]).exp();
                for c in 0..dim {
                    o[row * dim + c] += p * self.v[at * dim + c];
                }
            }
        });
        (o, lse)
    }

    /// Gives the gradients of q, k, v and the biases from those of o and lse.
    pub fn backward(&self, d_o: &[f64], dlse: &[f64]) -> [Vec<f64>; 4] {
        let (dim, value_dim) = (self.head_dim, self.value_dim);
        let mut dq = vec![0.0; self.q.len()];
        let mut dk = vec![0.0; self.k.len()];
        let mut dv = vec![0.0; self.v.len()];
        let mut dbias = vec![0.0; self.bias.as_ref().map_or(0, |(table, _)| table.len())];
        self.rows(|row, scores| {
            let lse = log_sum_exp(scores);
            let g = &d_o[row * value_dim..][..value_dim];
            let dp = |at: usize| -> f64 {
                (0..value_dim)
                    .map(|c| g[c] * self.v[at * value_dim + c])
                    .sum()
            };
            let p = |score: f64| (score - lse).exp();
            let dp = |pair: &Pair| pair.keep * dp(pair.at);
            let delta: f64 = scores.iter().map(|pair| p(pair.score) * dp(pair)).sum();
            for pair in scores {
                let Pair { at, score, .. } = pair;
                let through = if pair.own { 0.0 } else { 1.0 };
                let ds = p(*score) * (dp(pair) - delta + dlse[row]) * through;
                if !dbias.is_empty() {
                    dbias[pair.place] += ds;
                }
                let ds = ds * self.scale;
                for c in 0..value_dim {
                    dv[at * value_dim + c] += pair.keep * p(*score) * g[c];
                }
                for c in 0..dim {
                    dq[row * dim + c] += ds * self.k[at * dim + c];
                    dk[at * dim + c] += ds * self.q[row * dim + c];
                }
            }
        });
        [dq, dk, dv, dbias]
    }
}

/// A query and a key that it may read.
struct Pair {
    /// The row of the key.
    at: usize,
    score: f64,
    /// The factor of its weight.
    keep: f64,
    /// The place of its bias.
    place: usize,
    /// Whether both have one number.
    own: bool,
}

fn log_sum_exp(scores: &[Pair]) -> f64 {
    let scores = scores.iter().map(|pair| pair.score);
    let largest = scores.clone().fold(f64::NEG_INFINITY, f64::max);
    match largest == f64::NEG_INFINITY {
        true => largest,
        false => largest + scores.map(|s| (s - largest).exp()).sum::<f64>().ln(),
    }
}
