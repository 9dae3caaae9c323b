//! Dropout (Srivastava et al., 2014): values are zeroed with a chance, the others are scaled up so that means stay.
//!
//! The random numbers come from a generator without a state, Philox 4x32 of 10 rounds (Salmon et al., "Parallel random
//! numbers: as easy as 1, 2, 3", 2011): four words from a counter of four words and a key of two. The counter of a value is
//! made of its feature, its position in its sequence, the number of the sequence and the place in the model. So no mask is
//! kept: the backward pass makes it again. It depends neither on threads nor on how sequences are laid out: rows of a batch
//! drop the same whether they are padded or packed.

use crate::simd::{block_rows, dispatched, each};

/// Counters that are worked on at once; word `w` of counter `g LANES + l` belongs to feature `(4 g + w) LANES + l`.
const LANES: usize = 16;

/// A key, from the seed of a run and the number of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key([u32; 2]);

impl Key {
    /// Another for each pass of each seed: a draw from the generator whose key is the seed.
    pub fn new(seed: u64, pass: u64) -> Self {
        let low = |value: u64| value as u32;
        let counter = [low(pass), low(pass >> 32), 0, 0];
        let [a, b, _, _] = philox([low(seed), low(seed >> 32)], counter);
        Key([a, b])
    }

    pub(crate) fn words(self) -> [u32; 2] {
        self.0
    }
}

/// Which values are dropped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Of the pass.
    pub key: Key,
    /// The place in the model; places of one pass drop independently of each other.
    pub site: u32,
    /// The chance with which a value is zeroed, at least 0 and below 1.
    pub chance: f32,
}

impl Dropout {
    /// A value goes where its word is below the first, 2^32 chances, and is multiplied with the second elsewhere.
    pub(crate) fn limits(&self) -> (u32, f32) {
        let chance = self.chance;
        assert!(
            (0.0..1.0).contains(&chance),
            "dropout: a chance of {chance}"
        );
        let limit = (f64::from(chance) * 4_294_967_296.0).round() as u32;
        (limit, 1.0 / (1.0 - chance))
    }

    /// `y = x keep / (1 - chance)` for `x [time, dim]`, the sequences of cumulative lengths `offsets` one after the other.
    /// Linear, and its own adjoint: the gradient of `x` is the same function of the gradient of `y`.
    ///
    /// Panics when lengths do not fit or the chance is not at least 0 and below 1.
    pub fn apply(&self, offsets: &[usize], dim: usize, x: &[f32], y: &mut [f32]) {
        let (limit, scale) = self.limits();
        assert!(dim > 0, "dropout: dim is zero");
        assert_eq!(x.len(), y.len(), "dropout: lengths differ");
        assert_eq!(
            offsets.last().map_or(0, |rows| rows * dim),
            x.len(),
            "dropout: sequences and rows of {dim} values"
        );
        let rows = block_rows(dim);
        let blocks = x.chunks(rows * dim).zip(y.chunks_mut(rows * dim));
        each(blocks.enumerate(), x.len(), |(block, (x, y))| {
            let first = block * rows;
            let mut sequence = offsets.partition_point(|offset| *offset <= first) - 1;
            for (row, (x, y)) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)).enumerate() {
                let row = first + row;
                while offsets[sequence + 1] <= row {
                    sequence += 1;
                }
                let place = [(row - offsets[sequence]) as u32, sequence as u32, self.site];
                drop_row(self.key.0, place, limit, scale, x, y);
            }
        });
    }
}

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// The upper and the lower half of a product.
#[inline(always)]
fn halves(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

/// One round, in place: the first and third word are multiplied, and the halves change places.
#[inline(always)]
fn round(key: [u32; 2], [a, b, c, d]: &mut [u32; 4]) {
    let (high, low) = halves(MULTIPLIERS[0], *a);
    let (other_high, other_low) = halves(MULTIPLIERS[1], *c);
    (*a, *b, *c, *d) = (other_high ^ *b ^ key[0], other_low, high ^ *d ^ key[1], low);
}

#[inline(always)]
pub(crate) fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for step in 0..10 {
        if step > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        round(key, &mut counter);
    }
    counter
}

/// [`philox`] of [`LANES`] counters that differ in their first word: `first + lane`.
#[inline(always)]
pub(crate) fn words(mut key: [u32; 2], first: u32, place: [u32; 3]) -> [[u32; LANES]; 4] {
    let mut a: [u32; LANES] = std::array::from_fn(|lane| first.wrapping_add(lane as u32));
    let mut b = [place[0]; LANES];
    let mut c = [place[1]; LANES];
    let mut d = [place[2]; LANES];
    for step in 0..10 {
        if step > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        for lane in 0..LANES {
            let mut one = [a[lane], b[lane], c[lane], d[lane]];
            round(key, &mut one);
            [a[lane], b[lane], c[lane], d[lane]] = one;
        }
    }
    [a, b, c, d]
}

dispatched! {
    fn drop_row<'a>(
        key: [u32; 2],
        place: [u32; 3],
        limit: u32,
        scale: f32,
        x: &'a [f32],
        y: &'a mut [f32],
    ) {
        let groups = x.chunks(4 * LANES).zip(y.chunks_mut(4 * LANES)).enumerate();
        for (group, (x, y)) in groups {
            let drawn = words(key, (group * LANES) as u32, place);
            for (drawn, (x, y)) in drawn.iter().zip(x.chunks(LANES).zip(y.chunks_mut(LANES))) {
                for (y, (x, word)) in y.iter_mut().zip(x.iter().zip(drawn)) {
                    // What is dropped is zero, also where it was not finite.
                    *y = if *word < limit { 0.0 } else { *x * scale };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instructions::Instructions;

    fn mask(dropout: &Dropout, offsets: &[usize], dim: usize) -> Vec<f32> {
        let ones = vec![1.0; offsets[offsets.len() - 1] * dim];
        let mut y = vec![f32::NAN; ones.len()];
        dropout.apply(offsets, dim, &ones, &mut y);
        y
    }

    fn at(seed: u64, pass: u64, site: u32, chance: f32) -> Dropout {
        Dropout {
            key: Key::new(seed, pass),
            site,
            chance,
        }
    }

    /// The known answers of the authors' Random123 library.
    #[test]
    fn the_published_words_come_out() {
        let all = u32::MAX;
        for (counter, key, want) in [
            (
                [0; 4],
                [0; 2],
                [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
            ),
            (
                [all; 4],
                [all; 2],
                [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
            ),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ] {
            assert_eq!(philox(key, counter), want);
            let [first, place @ ..] = counter;
            let many = words(key, first, place);
            assert_eq!(many.map(|words| words[0]), want);
            let last = philox(key, [first.wrapping_add(15), place[0], place[1], place[2]]);
            assert_eq!(many.map(|words| words[15]), last);
        }
    }

    #[test]
    fn the_words_of_a_value_are_those_of_its_counter() {
        let (dropout, dim) = (at(5, 9, 3, 0.4), 150);
        let offsets = [0, 2, 2, 5];
        let got = mask(&dropout, &offsets, dim);
        for (sequence, pair) in offsets.windows(2).enumerate() {
            for row in pair[0]..pair[1] {
                for feature in 0..dim {
                    let (group, within) = (feature / 64, feature % 64);
                    let counter = [
                        (group * 16 + within % 16) as u32,
                        (row - pair[0]) as u32,
                        sequence as u32,
                        3,
                    ];
                    let word = philox(dropout.key.0, counter)[within / 16];
                    let want = match (f64::from(word) / 4_294_967_296.0) < f64::from(0.4f32) {
                        true => 0.0,
                        false => 1.0 / (1.0 - 0.4f32),
                    };
                    assert_eq!(
                        got[row * dim + feature],
                        want,
                        "row {row} feature {feature}"
                    );
                }
            }
        }
    }

    #[test]
    fn means_variances_and_correlations_are_those_of_independent_draws() {
        let (rows, dim) = (512, 512);
        let n = (rows * dim) as f64;
        for chance in [0.1f32, 0.5, 0.9] {
            let kept = |dropout: &Dropout| -> Vec<f64> {
                let scaled = mask(dropout, &[0, rows], dim);
                scaled
                    .iter()
                    .map(|y| f64::from(u8::from(*y > 0.0)))
                    .collect()
            };
            let base = kept(&at(1, 1, 1, chance));
            let (keep, variance) = (
                f64::from(1.0 - chance),
                f64::from(chance) * f64::from(1.0 - chance),
            );
            // Five deviations of the mean of n draws.
            let tolerance = 5.0 * (variance / n).sqrt();
            let mean = base.iter().sum::<f64>() / n;
            assert!((mean - keep).abs() < tolerance, "{chance}: mean {mean}");
            let total: f64 = mask(&at(1, 1, 1, chance), &[0, rows], dim)
                .iter()
                .map(|y| f64::from(*y))
                .sum();
            assert!(
                (total / n - 1.0).abs() < tolerance / keep,
                "{chance}: scale"
            );
            // Rows and columns alone must not stand out either.
            for row in base.chunks(dim) {
                let mean = row.iter().sum::<f64>() / dim as f64;
                assert!((mean - keep).abs() < 6.0 * (variance / dim as f64).sqrt());
            }
            for column in 0..dim {
                let mean = (0..rows).map(|row| base[row * dim + column]).sum::<f64>() / rows as f64;
                assert!((mean - keep).abs() < 6.0 * (variance / rows as f64).sqrt());
            }
            // Neighbours in features, rows, sites, passes and seeds are not correlated.
            let shifted = |by: usize| {
                let mut moved = base.clone();
                moved.rotate_left(by);
                moved
            };
            for (name, other) in [
                ("feature", shifted(1)),
                ("word", shifted(LANES)),
                ("row", shifted(dim)),
                ("site", kept(&at(1, 1, 2, chance))),
                ("pass", kept(&at(1, 2, 1, chance))),
                ("seed", kept(&at(2, 1, 1, chance))),
            ] {
                let together: f64 = base
                    .iter()
                    .zip(&other)
                    .map(|(a, b)| (a - keep) * (b - keep))
                    .sum();
                let correlation = together / n / variance;
                assert!(
                    correlation.abs() < 5.0 / n.sqrt(),
                    "{chance} {name}: {correlation}"
                );
            }
        }
    }

    #[test]
    fn a_sequence_drops_the_same_wherever_its_rows_lie() {
        let (dropout, dim) = (at(3, 7, 0, 0.3), 40);
        let padded = mask(&dropout, &[0, 6, 12, 18], dim);
        let packed = mask(&dropout, &[0, 2, 2, 8], dim);
        assert_eq!(packed[..2 * dim], padded[..2 * dim]);
        assert_eq!(packed[2 * dim..], padded[12 * dim..]);
    }

    #[test]
    fn threads_and_blocks_do_not_show() {
        let (dropout, dim) = (at(3, 7, 0, 0.3), 96);
        let offsets: Vec<usize> = vec![0, 700, 700, 1000];
        let run = |threads| Instructions::best().run(threads, || mask(&dropout, &offsets, dim));
        let got = run(1);
        assert_eq!(got, run(3));
        // One row at a time.
        for row in [0, 170, 171, 699, 700, 999] {
            let start = if row < 700 { 0 } else { 700 };
            let sequence = if row < 700 { 0 } else { 2 };
            let mut own = vec![0; sequence + 2];
            own[sequence + 1] = row - start + 1;
            let alone = mask(&dropout, &own, dim);
            assert_eq!(got[row * dim..][..dim], alone[(row - start) * dim..]);
        }
    }

    #[test]
    fn no_chance_is_exact_and_what_is_dropped_is_zero() {
        let x = [1.5, f32::MIN_POSITIVE / 4.0, -3.0, f32::MAX];
        let mut y = [0.0; 4];
        at(1, 1, 1, 0.0).apply(&[0, 1], 4, &x, &mut y);
        assert_eq!(x, y);
        let x = vec![f32::NAN; 1000];
        let mut y = vec![0.0; 1000];
        at(1, 1, 1, 0.999).apply(&[0, 1000], 1, &x, &mut y);
        assert!(y.iter().filter(|y| y.is_nan()).count() < 10);
        assert!(y.iter().all(|y| y.is_nan() || *y == 0.0));
        at(1, 1, 1, 0.5).apply(&[0, 0], 3, &[], &mut []);
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[
            the_words_of_a_value_are_those_of_its_counter,
            no_chance_is_exact_and_what_is_dropped_is_zero,
        ]);
    }
}
