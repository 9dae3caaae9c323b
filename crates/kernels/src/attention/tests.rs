mod pages;
mod rounded;

use super::naive::Naive;
use super::*;
use crate::matmul::Precision;
use crate::testing::{Close, assert_close, assert_near, rand_vec};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| *x as f64).collect()
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

/// Rounding is relative to the summands, also where they cancel (a query with one key has no gradient).
fn gradient_close(name: &str, got: &[f32], want: &[f32]) {
    assert_near(name, got, want, 5e-6);
}

#[derive(Clone)]
struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q_offsets: Vec<usize>,
    k_offsets: Vec<usize>,
    /// Query heads, key heads, head_dim, value_dim.
    dims: [usize; 4],
    mask: Mask,
    alibi: Option<Vec<f32>>,
    plans: Option<Vec<Arc<Plan>>>,
    reads: Option<fn(usize, usize, usize) -> bool>,
    bias: Option<(Vec<f32>, usize)>,
    ids: Option<[Vec<u32>; 2]>,
    starts: Option<Vec<usize>>,
    dropout: Option<Dropout>,
    precision: Precision,
}

const SCALE: f32 = 0.7;

impl Case {
    fn new(
        q_offsets: &[usize],
        k_offsets: &[usize],
        dims: [usize; 4],
        mask: Mask,
        alibi: bool,
    ) -> Self {
        let (queries, keys) = (
            q_offsets[q_offsets.len() - 1],
            k_offsets[k_offsets.len() - 1],
        );
        let [heads, kv_heads, head_dim, value_dim] = dims;
        Case {
            q: rand_vec(1, queries * heads * head_dim),
            k: rand_vec(2, keys * kv_heads * head_dim),
            v: rand_vec(3, keys * kv_heads * value_dim),
            q_offsets: q_offsets.to_vec(),
            k_offsets: k_offsets.to_vec(),
            dims,
            mask,
            alibi: alibi.then(|| (0..heads).map(|h| 0.5 / (h + 1) as f32).collect()),
            plans: None,
            reads: None,
            bias: None,
            ids: None,
            starts: None,
            dropout: None,
            precision: Precision::F32,
        }
    }

    /// With operands rounded to bf16.
    fn brief(mut self) -> Self {
        self.precision = Precision::Bf16;
        self
    }

    /// With weights dropped.
    fn with_dropout(mut self, chance: f32) -> Self {
        let key = crate::dropout::Key::new(3, 4);
        self.dropout = Some(Dropout {
            key,
            site: 7,
            chance,
        });
        self
    }

    /// With the first queries standing where these say.
    fn with_starts(mut self, starts: &[usize]) -> Self {
        self.starts = Some(starts.to_vec());
        self
    }

    /// With biases of `distances` distances, 0 at place `zero`.
    fn with_bias(mut self, distances: usize, zero: usize) -> Self {
        self.bias = Some((rand_vec(6, self.dims[0] * distances), zero));
        self
    }

    /// With numbers below `count`.
    fn with_ids(mut self, count: u32) -> Self {
        let last = |offsets: &[usize]| offsets[offsets.len() - 1] as u32;
        let numbers = |total: u32, step: u32| (0..total).map(|at| at * step % count).collect();
        let (queries, keys) = (last(&self.q_offsets), last(&self.k_offsets));
        self.ids = Some([numbers(queries, 3), numbers(keys, 1)]);
        self
    }

    fn fast(&self) -> Attention<'_> {
        let [heads, kv_heads, head_dim, value_dim] = self.dims;
        Attention {
            q: &self.q,
            k: Rows::Flat(&self.k),
            v: Rows::Flat(&self.v),
            q_offsets: &self.q_offsets,
            k_offsets: &self.k_offsets,
            heads,
            kv_heads,
            head_dim,
            value_dim,
            mask: self.mask,
            plans: self.plans.as_deref(),
            starts: self.starts.as_deref(),
            alibi: self.alibi.as_deref(),
            bias: self
                .bias
                .as_ref()
                .map(|(table, zero)| Bias { table, zero: *zero }),
            ids: self.ids.as_ref().map(|[q, k]| [&q[..], &k[..]]),
            dropout: self.dropout,
            scale: SCALE,
            precision: self.precision,
        }
    }

    fn naive(&self) -> Naive {
        let [heads, kv_heads, head_dim, value_dim] = self.dims;
        Naive {
            q: wide(&self.q),
            k: wide(&self.k),
            v: wide(&self.v),
            q_offsets: self.q_offsets.clone(),
            k_offsets: self.k_offsets.clone(),
            heads,
            kv_heads,
            head_dim,
            value_dim,
            mask: self.mask,
            reads: self.reads,
            starts: self.starts.clone(),
            alibi: self.alibi.as_deref().map(wide),
            bias: self.bias.as_ref().map(|(table, zero)| (wide(table), *zero)),
            ids: self.ids.clone(),
            dropout: self.dropout,
            scale: SCALE as f64,
        }
    }

    fn check(&self) {
        self.check_by(assert_close);
    }

    fn check_by(&self, close: Close) {
        let output = forward(&self.fast());
        let (o, lse) = self.naive().forward();
        close("o", &output.o, &narrow(&o), 3e-6);
        for (got, want) in output.lse.iter().zip(narrow(&lse)) {
            assert!(
                *got == want || (got - want).abs() < 3e-6 * (1.0 + want.abs()),
                "{got} {want}"
            );
        }
        let (d_o, dlse) = (rand_vec(4, o.len()), rand_vec(5, lse.len()));
        for used in [false, true] {
            let grads = backward(
                &self.fast(),
                &output.o,
                &output.lse,
                &d_o,
                used.then_some(&dlse[..]),
            );
            let dlse = if used {
                wide(&dlse)
            } else {
                vec![0.0; lse.len()]
            };
            let [dq, dk, dv, dbias] = self.naive().backward(&wide(&d_o), &dlse);
            gradient_close("dq", &grads.q, &narrow(&dq));
            gradient_close("dk", &grads.k, &narrow(&dk));
            gradient_close("dv", &grads.v, &narrow(&dv));
            gradient_close("dbias", &grads.bias, &narrow(&dbias));
        }
    }
}

const MASKS: [(bool, Option<usize>); 8] = [
    (false, None),
    (true, None),
    (true, Some(1)),
    (true, Some(5)),
    (true, Some(70)),
    (false, Some(5)),
    (false, Some(70)),
    (true, Some(0)),
];

fn mask(causal: bool, window: Option<usize>) -> Mask {
    Mask { causal, window }
}

fn masks() -> impl Iterator<Item = Mask> {
    MASKS
        .into_iter()
        .map(|(causal, window)| mask(causal, window))
}

/// The formulas of the backward pass against differences, in f64.
#[test]
fn naive_gradients_are_differences_of_the_equation() {
    for mask in masks() {
        let case = Case::new(&[0, 3, 3, 5], &[0, 3, 4, 9], [4, 2, 3, 2], mask, true);
        let case = case.with_bias(4, 1).with_ids(4).with_dropout(0.4);
        let mut naive = case.naive();
        let (d_o, dlse) = (wide(&rand_vec(4, 5 * 8)), wide(&rand_vec(5, 5 * 4)));
        let grads = naive.backward(&d_o, &dlse);
        let loss = |naive: &Naive| {
            let (o, lse) = naive.forward();
            let lse = lse.iter().zip(&dlse).filter(|(lse, _)| **lse > -1e4);
            o.iter()
                .zip(&d_o)
                .chain(lse)
                .map(|(a, b)| a * b)
                .sum::<f64>()
        };
        for (which, grad) in grads.iter().enumerate() {
            for index in 0..grad.len() {
                let mut side = |step: f64| {
                    let bias = &mut naive.bias.as_mut().expect("biases").0;
                    let values = [&mut naive.q, &mut naive.k, &mut naive.v, bias];
                    values.into_iter().nth(which).expect("four")[index] += step;
                    loss(&naive)
                };
                let (up, down) = (side(1e-5), side(-2e-5));
                side(1e-5);
                assert!(((up - down) / 2e-5 - grad[index]).abs() < 1e-8);
            }
        }
    }
}

#[test]
fn outputs_and_gradients_equal_the_equation_at_every_length() {
    for length in [1, 2, 15, 63, 64, 65, 130] {
        for (index, mask) in masks().enumerate() {
            let alibi = index % 2 == 1;
            Case::new(&[0, length], &[0, length], [2, 1, 5, 5], mask, alibi).check();
        }
    }
}

/// A window, a first key for all, every seventh key, and for the second head a far block too.
fn scattered(head: usize, query: usize, key: usize) -> bool {
    let far = head == 1 && key / 16 == (query / 16 + 3) % 5;
    query.abs_diff(key) <= 4 || key == 0 || key.is_multiple_of(7) || far
}

/// Nothing at all for some queries.
fn mostly_nothing(_head: usize, query: usize, key: usize) -> bool {
    query.is_multiple_of(3) && key + 40 < query
}

#[test]
fn listed_keys_equal_the_equation() {
    let lengths = [0, 1, 1, 64, 150];
    for (reads, heads) in [
        (scattered as fn(usize, usize, usize) -> bool, 2),
        (mostly_nothing, 1),
    ] {
        for block in [16, 64, 100] {
            let mut case = Case::new(&lengths, &lengths, [2, 2, 8, 3], Mask::default(), false);
            let plan = |time: usize| {
                let list = |head: usize, queries: std::ops::Range<usize>| {
                    let read = |key: usize| queries.clone().any(|query| reads(head, query, key));
                    let keys = (0..time).filter(|key| read(*key));
                    keys.map(|key| key..key + 1).collect()
                };
                Arc::new(Plan::new(time, heads, block, list, reads))
            };
            case.plans = Some(
                lengths
                    .windows(2)
                    .map(|ends| plan(ends[1] - ends[0]))
                    .collect(),
            );
            case.reads = Some(reads);
            case.check();
            case.clone().with_dropout(0.3).check();
            let pairs = |time: usize| {
                let all =
                    (0..2 * time * time).map(|at| (at / time / time, at / time % time, at % time));
                all.filter(|(head, query, key)| reads(*head, *query, *key))
                    .count() as u64
            };
            let total: u64 = lengths
                .windows(2)
                .map(|ends| pairs(ends[1] - ends[0]))
                .sum();
            assert_eq!(case.fast().flops(), 2 * total * 11);
        }
    }
}

#[test]
fn packs_with_empty_sequences_caches_and_groups() {
    for mask in masks() {
        for alibi in [false, true] {
            // One query after a cache; none; as many as keys; fewer; no keys at all.
            let (q, k) = ([0, 1, 1, 71, 80, 82], [0, 66, 70, 140, 240, 240]);
            Case::new(&q, &k, [6, 2, 8, 3], mask, alibi).check();
            Case::new(
                &[0, 1, 2, 3],
                &[0, 200, 201, 264],
                [4, 4, 16, 16],
                mask,
                alibi,
            )
            .check();
        }
    }
    // Long caches are read in pieces.
    for (window, alibi) in [(None, true), (Some(1500), false)] {
        let mask = mask(true, window);
        Case::new(&[0, 2, 3], &[0, 2100, 3125], [4, 2, 17, 18], mask, alibi).check();
    }
    // More queries than keys: the first ones stand before every key.
    Case::new(&[0, 100], &[0, 30], [2, 2, 4, 4], mask(true, None), false).check();
}

#[test]
fn biases_by_distance_and_numbers_of_pairs() {
    for mask in masks() {
        let (q, k) = ([0, 1, 1, 71, 80, 82], [0, 66, 70, 140, 240, 240]);
        let case = Case::new(&q, &k, [6, 2, 8, 3], mask, true);
        for (distances, zero) in [(1, 0), (50, 0), (300, 120)] {
            case.clone().with_bias(distances, zero).check();
        }
        // The first queries have no key but their own. Where several are all that there is, f32 holds their sum to three digits.
        for count in [2, 3, 40] {
            case.clone().with_ids(count).check();
        }
        let starts = [3, 0, 5, 0, 9];
        case.clone().with_starts(&starts).check();
        case.with_bias(9, 4)
            .with_ids(5)
            .with_starts(&starts)
            .check();
    }
}

#[test]
fn dropped_weights_equal_the_equation() {
    for mask in masks() {
        // One query after a cache too: a few rows take the way of many.
        let (q, k) = ([0, 1, 1, 71, 80, 82], [0, 66, 70, 140, 240, 240]);
        let case = Case::new(&q, &k, [6, 2, 8, 3], mask, true);
        case.clone().with_dropout(0.3).check();
        case.clone().with_bias(50, 9).with_dropout(0.9).check();
        let whole = forward(&case.fast());
        let none = forward(&case.with_dropout(0.0).fast());
        assert_close("o", &none.o, &whole.o, 1e-6);
    }
}

/// Half of the weights go, in every row and column of the matrix; another head, sequence, place or pass drops others.
#[test]
fn what_is_dropped_is_independent() {
    let at = |key: crate::dropout::Key, site: u32, sequence: usize| {
        let chance = 0.5;
        let dropout = Dropout { key, site, chance };
        factors(&dropout, sequence, [4, 2], [96, 100])
    };
    let key = crate::dropout::Key::new(1, 2);
    let base = at(key, 3, 0);
    let pass = at(crate::dropout::Key::new(1, 3), 3, 0);
    let heads: Vec<&[f32]> = base.chunks(9600).collect();
    let (place, sequence) = (at(key, 4, 0), at(key, 3, 1));
    let others = [&place[..9600], &sequence[..9600], &pass[..9600]];
    // Deviations of 9,600 coins from the half: 49; from a row's and a column's half: 5.
    for (index, a) in heads.iter().enumerate() {
        let kept = |values: &[f32]| values.iter().filter(|value| **value == 2.0).count() as f32;
        assert!((kept(a) - 4800.0).abs() < 250.0);
        for row in a.chunks(100) {
            assert!((kept(row) - 50.0).abs() < 28.0, "{}", kept(row));
        }
        for column in 0..100 {
            let column: Vec<f32> = a.iter().skip(column).step_by(100).copied().collect();
            assert!((kept(&column) - 48.0).abs() < 28.0, "{}", kept(&column));
        }
        for b in heads[..index].iter().chain(&others) {
            let same = a.iter().zip(*b).filter(|(a, b)| a == b).count() as f32;
            assert!((same - 4800.0).abs() < 250.0, "{same}");
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut case = Case::new(&[0, 100], &[0, 100], [1, 1, 4, 4], mask(true, None), false);
    case.q.iter_mut().for_each(|q| *q *= 300.0);
    let output = forward(&case.fast());
    assert!(output.o.iter().chain(&output.lse).all(|x| x.is_finite()));
    let (o, _) = case.naive().forward();
    assert_close("o", &output.o, &narrow(&o), 1e-4);
}

#[test]
fn results_over_parts_of_the_keys_merge_in_any_order() {
    let case = Case::new(&[0, 70], &[0, 150], [1, 1, 8, 8], Mask::default(), false);
    let whole = forward(&case.fast());
    let parts: Vec<Output> = [(0, 10), (10, 10), (10, 90), (90, 150)]
        .into_iter()
        .map(|(from, to)| {
            let mut part = case.clone();
            part.k = case.k[from * 8..to * 8].to_vec();
            part.v = case.v[from * 8..to * 8].to_vec();
            part.k_offsets = vec![0, to - from];
            forward(&part.fast())
        })
        .collect();
    for order in [[0, 1, 2, 3], [3, 1, 0, 2]] {
        let mut sum = parts[order[0]].clone();
        for &next in &order[1..] {
            merge(
                (&mut sum.o, &mut sum.lse),
                (&parts[next].o, &parts[next].lse),
            );
        }
        assert_close("o", &sum.o, &whole.o, 1e-6);
        assert_close("lse", &sum.lse, &whole.lse, 1e-6);
    }
}

#[test]
fn operations_count_the_allowed_pairs() {
    let causal = mask(true, None);
    assert_eq!(
        flops(&[0, 4], &[0, 4], None, 2, [8, 8], causal),
        2 * 10 * 2 * 16
    );
    let window = mask(false, Some(2));
    assert_eq!(
        flops(&[0, 4], &[0, 4], None, 1, [8, 8], window),
        2 * 10 * 16
    );
    let starts = Some(&[0][..]);
    assert_eq!(
        flops(&[0, 4], &[0, 2], starts, 1, [8, 8], causal),
        2 * 7 * 16
    );
    assert_eq!(
        flops(&[0, 1, 2], &[0, 9, 19], None, 1, [1, 1], causal),
        2 * 19 * 2
    );
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        outputs_and_gradients_equal_the_equation_at_every_length,
        packs_with_empty_sequences_caches_and_groups,
        large_scores_do_not_overflow,
        results_over_parts_of_the_keys_merge_in_any_order,
        pages::pages_give_the_bits_of_flat_rows,
        dropped_weights_equal_the_equation,
    ]);
}

/// A problem from bytes, against the equation.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let kv_heads = bytes.number(1, 2);
    let heads = kv_heads * bytes.number(1, 3);
    let dims = [heads, kv_heads, bytes.number(1, 70), bytes.number(1, 70)];
    let q = bytes.offsets(70);
    let mut k = vec![0];
    for pair in q.windows(2) {
        let own = match bytes.flag() {
            true => pair[1] - pair[0],
            false => bytes.length(140),
        };
        k.push(k[k.len() - 1] + own);
    }
    let mask = Mask {
        causal: bytes.flag(),
        window: bytes.one_of(&[None, Some(0), Some(1), Some(5), Some(64), Some(usize::MAX)]),
    };
    let mut case = Case::new(&q, &k, dims, mask, bytes.flag());
    if bytes.flag() {
        case = case.with_dropout(0.5);
    }
    if bytes.flag() {
        // Scores in which single keys weigh everything.
        let queries = case.q.len();
        let larger = bytes.values(queries, 30.0);
        case.q = larger;
        let output = forward(&case.fast());
        let (o, _) = case.naive().forward();
        assert_near("o", &output.o, &narrow(&o), 1e-3);
        return;
    }
    if bytes.flag() {
        rounded::check(&case.brief());
        return;
    }
    case.check_by(assert_near);
}
