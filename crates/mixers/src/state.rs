//! What a mixer carries from one call to the next: a value that can be kept, copied, cut into its sequences, joined with
//! others, and put back.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use anyformer_ops::cache::{Cache, Element};
use anyformer_ops::embedding::embedding;
use anyformer_ops::{Device, Tensor};

/// One named tensor of a state, at any rank.
#[derive(Clone, Debug)]
pub struct StateTensor {
    /// Extents; the first holds the sequences one after the other.
    pub shape: Vec<usize>,
    /// Rows of the first extent that each sequence has; `None`: one each.
    pub rows: Option<Vec<usize>>,
    data: Held,
}

/// Where the values are.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
enum Held {
    /// Flat.
    Values(Tensor<1>),
    /// In pages that copies of the state share.
    Pages(Cache),
}

impl Held {
    fn values(&self) -> Tensor<1> {
        match self {
            Held::Values(values) => values.clone(),
            Held::Pages(cache) => cache.values(&Device::flex()),
        }
    }
}

impl StateTensor {
    /// The tensor of these values, as [`StateTensor::values`] gave them.
    pub fn new(shape: Vec<usize>, rows: Option<Vec<usize>>, values: Tensor<1>) -> Self {
        let data = Held::Values(values);
        StateTensor { shape, rows, data }
    }

    /// The values, flat.
    pub fn values(&self) -> Tensor<1> {
        self.data.values()
    }

    /// The rows of each of `count` sequences.
    fn spans(&self, count: usize) -> Vec<Range<usize>> {
        let mut at = 0;
        let span = |index| {
            let start = at;
            at += self
                .rows
                .as_ref()
                .map_or(1, |rows: &Vec<usize>| rows[index]);
            start..at
        };
        (0..count).map(span).collect()
    }

    fn select(&self, count: usize, wanted: &[usize]) -> Self {
        let rows = self.rows.as_ref();
        let rows: Option<Vec<usize>> =
            rows.map(|rows| wanted.iter().map(|index| rows[*index]).collect());
        if let Held::Pages(cache) = &self.data {
            return Self::paged(cache.select(wanted));
        }
        let spans = self.spans(count);
        self.gather(wanted.iter().map(|index| spans[*index].clone()), rows)
    }

    fn paged(cache: Cache) -> Self {
        let [heads, dim] = cache.shape();
        let rows = cache.lengths();
        StateTensor {
            shape: vec![rows.iter().sum(), heads, dim],
            rows: Some(rows),
            data: Held::Pages(cache),
        }
    }

    /// The rows of `ranges`, end to end, in memory of their own: a view would hold on to everything beside them.
    fn gather(&self, ranges: impl Iterator<Item = Range<usize>>, rows: Option<Vec<usize>>) -> Self {
        let ids: Vec<u32> = ranges.flatten().map(|row| row as u32).collect();
        let mut shape = self.shape.clone();
        let width = shape[1..].iter().product();
        let table = self.values().reshape([shape[0], width]);
        let count = ids.len();
        shape[0] = count;
        let data = embedding(table, Arc::new(ids), [1, count]).reshape([count * width]);
        Self::new(shape, rows, data)
    }
}

/// What a mixer carries from one call to the next.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Tokens consumed so far, per sequence.
    pub times: Vec<usize>,
    tensors: Vec<(Cow<'static, str>, StateTensor)>,
}

impl State {
    /// An empty state of sequences that have consumed `times` tokens.
    pub fn new(times: Vec<usize>) -> Self {
        State {
            times,
            tensors: Vec::new(),
        }
    }

    /// Adds a named tensor with one row per sequence; one without values (the past of a convolution of one token, a memory
    /// that nothing has reached yet) is left out.
    pub fn with<const D: usize>(
        self,
        name: impl Into<Cow<'static, str>>,
        tensor: Tensor<D>,
    ) -> Self {
        self.push(name.into(), tensor, None)
    }

    /// As [`State::with`], of a tensor whose first extent holds `rows` rows of each sequence, end to end.
    pub fn with_rows<const D: usize>(
        self,
        name: impl Into<Cow<'static, str>>,
        tensor: Tensor<D>,
        rows: Vec<usize>,
    ) -> Self {
        self.push(name.into(), tensor, Some(rows))
    }

    fn push<const D: usize>(
        mut self,
        name: Cow<'static, str>,
        tensor: Tensor<D>,
        rows: Option<Vec<usize>>,
    ) -> Self {
        let shape = tensor.dims().to_vec();
        let count = shape.iter().product::<usize>();
        if count == 0 {
            return self;
        }
        let tensor = StateTensor::new(shape, rows, tensor.reshape([count]));
        self.tensors.push((name, tensor));
        self
    }

    /// Adds a tensor `[tokens, heads, dim]` that is kept in pages; one without values is left out.
    pub fn with_cache(mut self, name: impl Into<Cow<'static, str>>, cache: Cache) -> Self {
        if cache.lengths().iter().any(|length| *length > 0) {
            let tensor = StateTensor::paged(cache);
            self.tensors.push((name.into(), tensor));
        }
        self
    }

    /// The tensor `[tokens, heads, dim]` of that name in pages, which it may be already; `None` where it has no value.
    pub fn cache(&self, name: &str, element: Element) -> Option<Cache> {
        let (_, tensor) = self.tensors.iter().find(|(held, _)| *held == name)?;
        match (&tensor.data, &tensor.shape[..], &tensor.rows) {
            (Held::Pages(cache), ..) => Some(cache.clone()),
            (Held::Values(values), [_, heads, dim], Some(rows)) => {
                let values = values.clone();
                Some(Cache::of(element, values, [*heads, *dim], rows))
            }
            _ => None,
        }
    }

    /// Adds a tensor as [`State::tensors`] gave it: how a stored state is put together again.
    pub fn with_stored(mut self, name: String, tensor: StateTensor) -> Self {
        self.tensors.push((Cow::Owned(name), tensor));
        self
    }

    /// The tensor of that name, if it holds any value.
    pub fn find<const D: usize>(&self, name: &str) -> Option<Tensor<D>> {
        let held = self.tensors.iter().any(|(held, _)| *held == name);
        held.then(|| self.get(name))
    }

    /// The tensor of that name; panics when there is none of rank `D`, which is a mistake of the mixer.
    pub fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        let found = self.tensors.iter().find(|(held, _)| *held == name);
        let Some((_, tensor)) = found else {
            panic!("the state has no tensor {name}")
        };
        let Ok(shape) = <[usize; D]>::try_from(tensor.shape.clone()) else {
            panic!("state {name} has shape {:?}, not rank {D}", tensor.shape)
        };
        tensor.values().reshape(shape)
    }

    /// Names and tensors, in the order in which the mixer added them.
    pub fn tensors(&self) -> &[(Cow<'static, str>, StateTensor)] {
        &self.tensors
    }

    /// The same state cut off from the graph that made it (truncated back-propagation, generation).
    pub fn detach(self) -> Self {
        let detach = |(name, tensor): (Cow<'static, str>, StateTensor)| {
            let data = match tensor.data {
                Held::Values(values) => Held::Values(values.detach()),
                pages => pages,
            };
            (name, StateTensor { data, ..tensor })
        };
        State {
            times: self.times,
            tensors: self.tensors.into_iter().map(detach).collect(),
        }
    }

    /// The sequences `wanted`, in that order; each index is below the number of sequences, and there is at least one.
    pub fn select(&self, wanted: &[usize]) -> Self {
        let count = self.times.len();
        let select = |(name, tensor): &(Cow<'static, str>, StateTensor)| {
            let rows = tensor.rows.as_ref();
            // As when it was pushed: without values it is left out.
            let any = rows.is_none_or(|rows| wanted.iter().any(|index| rows[*index] > 0));
            any.then(|| (name.clone(), tensor.select(count, wanted)))
        };
        State {
            times: wanted.iter().map(|index| self.times[*index]).collect(),
            tensors: self.tensors.iter().filter_map(select).collect(),
        }
    }

    /// The sequences of several states of one mixer, one after the other.
    pub fn join(states: &[&State]) -> Self {
        let mut names: Vec<&Cow<'static, str>> = Vec::new();
        for (name, _) in states.iter().flat_map(|state| &state.tensors) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let join = |name: &Cow<'static, str>| {
            if let Some(cache) = Self::join_pages(name, states) {
                return (name.clone(), StateTensor::paged(cache));
            }
            let find = |state: &&State| {
                let found = state.tensors.iter().find(|(held, _)| held == name);
                found.map(|(_, tensor)| tensor.clone())
            };
            let parts: Vec<Option<StateTensor>> = states.iter().map(find).collect();
            let held = || parts.iter().flatten();
            let mut shape = held()
                .next()
                .map_or_else(Vec::new, |part| part.shape.clone());
            shape[0] = held().map(|part| part.shape[0]).sum();
            // A state that left the tensor out has no row of it.
            let rows = held().any(|part| part.rows.is_some()).then(|| {
                let rows = parts.iter().zip(states).flat_map(|(part, state)| {
                    let rows = part.as_ref().and_then(|part| part.rows.clone());
                    rows.unwrap_or_else(|| vec![0; state.times.len()])
                });
                rows.collect()
            });
            let data = Tensor::cat(held().map(StateTensor::values).collect(), 0);
            (name.clone(), StateTensor::new(shape, rows, data))
        };
        State {
            times: states
                .iter()
                .flat_map(|state| state.times.iter().copied())
                .collect(),
            tensors: names.into_iter().map(join).collect(),
        }
    }

    /// The tensor of that name of all the states in pages, where one of them has it so.
    fn join_pages(name: &str, states: &[&State]) -> Option<Cache> {
        let held = |state: &&State| {
            let found = state.tensors.iter().find(|(held, _)| held == name);
            found.and_then(|(_, tensor)| match &tensor.data {
                Held::Pages(cache) => Some(cache.clone()),
                Held::Values(_) => None,
            })
        };
        let like = states.iter().find_map(held)?;
        let [heads, dim] = like.shape();
        let parts = states.iter().map(|state| {
            let held = state.cache(name, like.element());
            held.unwrap_or_else(|| Cache::new(like.element(), state.times.len(), heads, dim))
        });
        Some(Cache::join(&parts.collect::<Vec<_>>()))
    }

    /// The state after the first `time` tokens, where it can be had without the model: every tensor has one row per
    /// token of its one sequence (the full cache of attention).
    pub fn rolled_back(&self, time: usize) -> Option<Self> {
        let [now] = self.times[..] else { return None };
        if time == 0 || time > now {
            return None;
        }
        let cut = |(name, tensor): &(Cow<'static, str>, StateTensor)| {
            let rows = tensor.rows.as_ref()?;
            if *rows != [now] {
                return None;
            }
            let cut = match &tensor.data {
                Held::Pages(cache) => StateTensor::paged(cache.truncated(time)),
                Held::Values(_) => tensor.gather(std::iter::once(0..time), Some(vec![time])),
            };
            Some((name.clone(), cut))
        };
        let tensors = self.tensors.iter().map(cut).collect::<Option<Vec<_>>>()?;
        Some(State {
            times: vec![time],
            tensors,
        })
    }

    /// Size in bytes, all sequences together.
    pub fn bytes(&self) -> u64 {
        let bytes = |tensor: &StateTensor| match &tensor.data {
            Held::Values(_) => 4 * tensor.shape.iter().product::<usize>() as u64,
            Held::Pages(cache) => cache.bytes(),
        };
        self.tensors.iter().map(|(_, tensor)| bytes(tensor)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyformer_ops::tensor_values;

    fn state(times: &[usize], first: f32) -> State {
        let device = Device::flex();
        let tensor = |count: usize| {
            let values: Vec<f32> = (0..count).map(|i| first + i as f32).collect();
            Tensor::<1>::from_data(values.as_slice(), &device)
        };
        let total = times.iter().sum::<usize>();
        State::new(times.to_vec())
            .with("s", tensor(2 * times.len()).reshape([times.len(), 2]))
            .with_rows("k", tensor(total).reshape([total, 1]), times.to_vec())
    }

    fn values(state: &State) -> Vec<Vec<f32>> {
        let tensors = state.tensors().iter();
        tensors
            .map(|(_, tensor)| tensor_values(tensor.values()))
            .collect()
    }

    #[test]
    fn sequences_come_out_and_go_together() {
        let (a, b) = (state(&[3, 1], 0.0), state(&[2], 10.0));
        let all = State::join(&[&a, &b]);
        assert_eq!(all.times, [3, 1, 2]);
        assert_eq!(all.tensors()[1].1.rows, Some(vec![3, 1, 2]));
        let some = all.select(&[2, 0]);
        assert_eq!(some.times, [2, 3]);
        assert_eq!(
            values(&some),
            [vec![10.0, 11.0, 0.0, 1.0], vec![10.0, 11.0, 0.0, 1.0, 2.0]]
        );
        assert_eq!(some.get::<2>("k").dims(), [5, 1]);
        assert_eq!(values(&all.select(&[0, 1])), values(&a));
    }

    #[test]
    fn a_tensor_that_some_sequences_lack_has_no_rows_of_theirs() {
        let device = Device::flex();
        let slots = |count: usize| Tensor::<2>::ones([count, 2], &device);
        let (with, without) = (
            State::new(vec![5]).with_rows("slots", slots(2), vec![2]),
            State::new(vec![1]),
        );
        for (states, rows) in [([&without, &with], [0, 2]), ([&with, &without], [2, 0])] {
            let all = State::join(&states);
            assert_eq!(all.tensors()[0].1.rows, Some(rows.to_vec()));
            let empty = rows.iter().position(|rows| *rows == 0).into_iter();
            assert!(all.select(&empty.collect::<Vec<_>>()).tensors().is_empty());
        }
    }

    #[test]
    fn only_a_row_per_token_can_be_rolled_back() {
        let device = Device::flex();
        let cache = State::new(vec![3]).with_rows("k", Tensor::<2>::ones([3, 2], &device), vec![3]);
        assert_eq!(cache.rolled_back(2).map(|state| state.bytes()), Some(16));
        assert!(cache.rolled_back(4).is_none() && cache.rolled_back(0).is_none());
        let window =
            State::new(vec![5]).with_rows("k", Tensor::<2>::ones([3, 2], &device), vec![3]);
        assert!(window.rolled_back(4).is_none());
        assert!(state(&[3], 0.0).rolled_back(2).is_none());
    }
}
