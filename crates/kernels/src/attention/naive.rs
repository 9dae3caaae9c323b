//! The equation as loops, in f64; the whole row of probabilities at once.

use super::Mask;

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
    /// Which keys count.
    pub mask: Mask,
    /// In place of the mask: whether a head's query reads a key, both counted within their sequence.
    pub reads: Option<fn(usize, usize, usize) -> bool>,
    /// Slopes of linear biases.
    pub alibi: Option<Vec<f64>>,
    /// Factor of the dot products.
    pub scale: f64,
}

impl Naive {
    /// Calls `row(query row, [(key row, score)])` for every query row of `[total_q, heads]`.
    fn rows(&self, mut row: impl FnMut(usize, &[(usize, f64)])) {
        let (dim, fold) = (self.head_dim, self.heads / self.kv_heads);
        for (qs, ks) in self.q_offsets.windows(2).zip(self.k_offsets.windows(2)) {
            for i in qs[0]..qs[1] {
                let position = i as i64 - qs[1] as i64 + (ks[1] - ks[0]) as i64;
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
                        if late || self.mask.window.is_some_and(|w| distance.abs() >= w as i64) {
                            continue;
                        }
                        let at = j * self.kv_heads + h / fold;
                        let k = &self.k[at * dim..][..dim];
                        let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        let slope = self.alibi.as_ref().map_or(0.0, |slopes| slopes[h]);
                        scores.push((at, self.scale * dot - slope * distance.abs() as f64));
                    }
                    row(i * self.heads + h, &scores);
                }
            }
        }
    }

    /// Gives `(o, lse)`.
    pub fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let (rows, dim) = (self.q.len() / self.head_dim, self.value_dim);
        let (mut o, mut lse) = (vec![0.0; rows * dim], vec![f64::NEG_INFINITY; rows]);
        self.rows(|row, scores| {
            lse[row] = log_sum_exp(scores);
            for (at, score) in scores {
                let p = (score - lse[row]).exp();
                for c in 0..dim {
                    o[row * dim + c] += p * self.v[at * dim + c];
                }
            }
        });
        (o, lse)
    }

    /// Gives `[dq, dk, dv]` from the gradients of o and lse.
    pub fn backward(&self, d_o: &[f64], dlse: &[f64]) -> [Vec<f64>; 3] {
        let (dim, value_dim) = (self.head_dim, self.value_dim);
        let mut dq = vec![0.0; self.q.len()];
        let mut dk = vec![0.0; self.k.len()];
        let mut dv = vec![0.0; self.v.len()];
        self.rows(|row, scores| {
            let lse = log_sum_exp(scores);
            let g = &d_o[row * value_dim..][..value_dim];
            let dp = |at: usize| -> f64 {
                (0..value_dim)
                    .map(|c| g[c] * self.v[at * value_dim + c])
                    .sum()
            };
            let p = |score: f64| (score - lse).exp();
            let delta: f64 = scores.iter().map(|(at, score)| p(*score) * dp(*at)).sum();
            for (at, score) in scores {
                let ds = p(*score) * (dp(*at) - delta + dlse[row]) * self.scale;
                for c in 0..value_dim {
                    dv[at * value_dim + c] += p(*score) * g[c];
                }
                for c in 0..dim {
                    dq[row * dim + c] += ds * self.k[at * dim + c];
                    dk[at * dim + c] += ds * self.q[row * dim + c];
                }
            }
        });
        [dq, dk, dv]
    }
}

fn log_sum_exp(scores: &[(usize, f64)]) -> f64 {
    let largest = scores
        .iter()
        .map(|(_, s)| *s)
        .fold(f64::NEG_INFINITY, f64::max);
    if scores.is_empty() {
        return largest;
    }
    largest
        + scores
            .iter()
            .map(|(_, s)| (s - largest).exp())
            .sum::<f64>()
            .ln()
}
