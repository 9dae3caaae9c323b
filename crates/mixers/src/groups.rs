//! Attention within groups of tokens, for mixers that cut or sort their sequences: blocks, buckets, clusters.
//!
//! Each head chooses for itself, so the rows here are heads of tokens: row `token * heads + head` of `[tokens * heads,
//! head_dim]`. A group has queries and keys given by their rows; all groups of all sequences and heads run as the packed
//! sequences of one [`attention_with_sums`] with one head. No row is padding.

use std::sync::Arc;

use anyformer_ops::attention::{AttentionOptions, attention_with_sums, flash_attention};
use anyformer_ops::embedding::{embedding, summed};
use anyformer_ops::{Tensor, meter};

use crate::mixer::{Context, Cost, RunError, State, TokenMixer};

/// `[batch, time, heads, head_dim]` as rows `[batch * time * heads, head_dim]`.
pub fn rows(x: Tensor<4>) -> Tensor<2> {
    let [batch, time, heads, width] = x.dims();
    x.reshape([batch * time * heads, width])
}

/// Rows by number.
pub fn take(x: &Tensor<2>, ids: &Arc<Vec<u32>>) -> Tensor<2> {
    let (count, width) = (ids.len(), x.dims()[1]);
    if count == 0 {
        return Tensor::empty([0, width], &x.device());
    }
    embedding(x.clone(), ids.clone(), [1, count]).reshape([count, width])
}

/// Lists of rows, a group after the other.
#[derive(Clone, Debug)]
pub struct Groups {
    /// The rows.
    pub rows: Vec<u32>,
    offsets: Vec<usize>,
}

impl Default for Groups {
    fn default() -> Self {
        Groups {
            rows: Vec::new(),
            offsets: vec![0],
        }
    }
}

impl Groups {
    /// Adds a group.
    pub fn push(&mut self, rows: impl IntoIterator<Item = usize>) {
        self.rows.extend(rows.into_iter().map(|row| row as u32));
        self.offsets.push(self.rows.len());
    }

    /// Where each row stands, by its number; every one of them stands in one group.
    fn places(&self) -> Arc<Vec<u32>> {
        let mut places = vec![0u32; self.rows.len()];
        for (place, row) in self.rows.iter().enumerate() {
            places[*row as usize] = place as u32;
        }
        Arc::new(places)
    }
}

/// Queries and the keys that they see, group by group.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Rows of the queries.
    pub queries: Groups,
    /// Rows of the keys and values.
    pub keys: Groups,
    /// A row sees itself only where it sees no other.
    pub own_last: bool,
}

impl Seen {
    fn gathered(
        self,
        [q, k, v]: [&Tensor<2>; 3],
        options: AttentionOptions,
    ) -> ([Tensor<4>; 3], AttentionOptions) {
        let four = |x: Tensor<2>| match x.dims() {
            // A reshape takes an extent of 0 for something else.
            [0, width] => Tensor::empty([1, 0, 1, width], &x.device()),
            [count, width] => x.reshape([1, count, 1, width]),
        };
        let (queries, keys) = (Arc::new(self.queries.rows), Arc::new(self.keys.rows));
        let options = AttentionOptions {
            q_offsets: Some(Arc::new(self.queries.offsets)),
            k_offsets: Some(Arc::new(self.keys.offsets)),
            ids: self.own_last.then(|| [queries.clone(), keys.clone()]),
            ..options
        };
        let all = [take(q, &queries), take(k, &keys), take(v, &keys)];
        (all.map(four), options)
    }

    /// Attention within the groups: `[queries, head_dim]`, in the order of the queries.
    pub fn attend(self, qkv: [&Tensor<2>; 3], options: AttentionOptions) -> Tensor<2> {
        let ([q, k, v], options) = self.gathered(qkv, options);
        let o = flash_attention(q, k, v, &options);
        let [_, count, _, width] = o.dims();
        o.reshape([count, width])
    }

    /// The same with the logarithms of the sums of exponentials `[queries]`.
    pub fn attend_with_sums(
        self,
        qkv: [&Tensor<2>; 3],
        options: AttentionOptions,
    ) -> (Tensor<2>, Tensor<1>) {
        let ([q, k, v], options) = self.gathered(qkv, options);
        let (o, sums) = attention_with_sums(q, k, v, &options);
        let [_, count, _, width] = o.dims();
        (o.reshape([count, width]), sums.reshape([count]))
    }

    /// [`Seen::attend`] in the order of the rows, where each is a query once.
    pub fn attend_rows(self, qkv: [&Tensor<2>; 3], options: AttentionOptions) -> Tensor<2> {
        let places = self.queries.places();
        take(&self.attend(qkv, options), &places)
    }

    /// [`Seen::attend_with_sums`] in the order of the rows, where each is a query once.
    pub fn attend_rows_with_sums(
        self,
        qkv: [&Tensor<2>; 3],
        options: AttentionOptions,
    ) -> (Tensor<2>, Tensor<1>) {
        let places = self.queries.places();
        let (o, sums) = self.attend_with_sums(qkv, options);
        let count = places.len();
        let sums = take(&sums.reshape([count, 1]), &places).reshape([count]);
        (take(&o, &places), sums)
    }
}

/// Heads of sequences, a head of a sequence being a line: sequences one after the other, the heads of each together.
#[derive(Clone, Copy, Debug)]
pub struct Lines<'a> {
    /// Cumulative lengths of the sequences.
    pub offsets: &'a [usize],
    /// Heads.
    pub heads: usize,
}

impl Lines<'_> {
    /// Lines in all.
    pub fn count(&self) -> usize {
        (self.offsets.len() - 1) * self.heads
    }

    /// Tokens of a line.
    pub fn time(&self, line: usize) -> usize {
        let sequence = line / self.heads;
        self.offsets[sequence + 1] - self.offsets[sequence]
    }

    /// Tokens of the longest line; 1 at least.
    pub fn longest(&self) -> usize {
        let lengths = self.offsets.windows(2).map(|pair| pair[1] - pair[0]);
        lengths.max().unwrap_or(1).max(1)
    }

    /// The row of a token of a line.
    pub fn row(&self, line: usize, token: usize) -> usize {
        (self.offsets[line / self.heads] + token) * self.heads + line % self.heads
    }

    /// `[lines, length, width]` of rows `[tokens * heads, width]`, `fill` behind the last token.
    pub fn padded(&self, x: &Tensor<2>, length: usize, fill: f32) -> Tensor<3> {
        let [rows, width] = x.dims();
        let even = (0..self.count()).all(|line| self.time(line) == length);
        let table = match even {
            true => x.clone(),
            false => Tensor::cat(
                vec![x.clone(), Tensor::full([1, width], fill, &x.device())],
                0,
            ),
        };
        let ids = (0..self.count()).flat_map(|line| {
            (0..length).map(move |token| match token < self.time(line) {
                true => self.row(line, token) as u32,
                false => rows as u32,
            })
        });
        take(&table, &Arc::new(ids.collect())).reshape([self.count(), length, width])
    }

    /// The reverse of [`Lines::padded`].
    pub fn rows(&self, x: Tensor<3>) -> Tensor<2> {
        let [lines, length, width] = x.dims();
        let mut ids = vec![0u32; self.offsets[self.offsets.len() - 1] * self.heads];
        for line in 0..lines {
            for token in 0..self.time(line) {
                ids[self.row(line, token)] = (line * length + token) as u32;
            }
        }
        take(&x.reshape([lines * length, width]), &Arc::new(ids))
    }
}

/// The mean of the rows that belong to each of `count` rows, by their numbers; zeros where there are none.
pub fn mean_by(x: Tensor<2>, ids: Vec<u32>, count: usize) -> Tensor<2> {
    let mut times = vec![0.0f32; count];
    for id in &ids {
        times[*id as usize] += 1.0;
    }
    let device = x.device();
    let shares: Vec<f32> = times.iter().map(|times| 1.0 / times.max(1.0)).collect();
    let shares = Tensor::<1>::from_data(shares.as_slice(), &device).reshape([count, 1]);
    summed(x, Arc::new(ids), count) * shares
}

/// A mixer that reads whole sequences and carries no state: what it has to say.
pub trait Whole: Send + Sync {
    /// The mixer's name.
    fn name(&self) -> &'static str;

    /// All sequences `[1, tokens, dim]` at once, one for each pair of the cumulative lengths; none is empty.
    fn all(&self, x: Tensor<3>, offsets: &[usize], context: &Context) -> Tensor<3>;

    /// Parameters, and operations of the linear layers over `time` tokens.
    fn layers(&self, time: usize) -> Cost;

    /// Operations of attention over a sequence of `time` tokens, which count themselves.
    fn counted_flops(&self, time: usize) -> u64;

    /// Operations beside these and those of linear layers.
    fn own_flops(&self, _time: usize) -> u64 {
        0
    }
}

/// A [`Whole`] mixer as a token mixer.
pub struct WholeMixer<M>(pub M);

impl<M: Whole> TokenMixer for WholeMixer<M> {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        let mixer = &self.0;
        if state.is_some() {
            return Err(RunError::CannotStream(mixer.name()));
        }
        let [batch, time, dim] = x.dims();
        let mut offsets = context.sequences(batch, time).to_vec();
        offsets.dedup();
        let lengths = offsets.windows(2).map(|pair| pair[1] - pair[0]);
        meter::add(lengths.map(|time| mixer.own_flops(time)).sum());
        let y = mixer.all(x.reshape([1, batch * time, dim]), &offsets, context);
        Ok((y.reshape([batch, time, dim]), None))
    }

    fn cost(&self, time: usize) -> Cost {
        let mut cost = self.0.layers(time);
        cost.flops += self.0.own_flops(time) + self.0.counted_flops(time);
        cost
    }
}
