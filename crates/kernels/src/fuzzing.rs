//! Random problems made from bytes, each held against its naive twin: what the targets under `fuzz/` run, and the tests too, with
//! bytes of their own. Compiled for those two only.
//!
//! Lengths gather around those where loops change (0, 1, a chunk less, more and exactly), sequences may be empty, and values
//! may be extreme where the kernel says what it does with them.

mod plain;

/// Reads choices off bytes; behind their end every choice is the first.
pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    /// From the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Bytes(bytes)
    }

    fn next(&mut self) -> usize {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                usize::from(*first)
            }
            None => 0,
        }
    }

    /// A number from `low` to `high`, at most 65,535 apart.
    pub(crate) fn number(&mut self, low: usize, high: usize) -> usize {
        let drawn = self.next() << 8 | self.next();
        low + drawn % (high - low + 1)
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.next() & 1 == 1
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.next() % all.len()]
    }

    /// A length near to a place where loops change, at most `most`.
    pub(crate) fn length(&mut self, most: usize) -> usize {
        let near = self.one_of(&[0usize, 1, 2, 4, 8, 16, 32, 64, 128]);
        let length = match self.next() % 4 {
            0 => near,
            1 => near + 1,
            2 => near.saturating_sub(1),
            _ => self.number(0, most),
        };
        length.min(most)
    }

    /// Cumulative lengths of up to four sequences of at most `most` tokens.
    pub(crate) fn offsets(&mut self, most: usize) -> Vec<usize> {
        let count = self.number(1, 4);
        let mut offsets = vec![0];
        for _ in 0..count {
            offsets.push(offsets[offsets.len() - 1] + self.length(most));
        }
        offsets
    }

    /// Values of sizes from denormal to `largest`, of either sign, and zeros.
    pub(crate) fn values(&mut self, count: usize, largest: f32) -> Vec<f32> {
        let sizes = [1.0, 1.0, 0.0, largest, 1e-3, 1e-20, 1e-40, -0.0];
        let mut sizes = [(); 4].map(|()| self.one_of(&sizes));
        if self.flag() {
            sizes = [1.0; 4];
        }
        let seed = self.number(0, 65_535) as u64;
        let values = crate::testing::rand_vec(seed, count);
        let pick = |(at, value): (usize, f32)| value * sizes[(at * 7 + at / 5) % 4];
        values.into_iter().enumerate().map(pick).collect()
    }
}

/// One family of kernels: its name, and what holds one problem against the twin (and panics where they differ).
pub type Family = (&'static str, fn(&mut Bytes));

/// Every family.
pub const FAMILIES: [Family; 14] = [
    ("recurrence", crate::recurrence::fuzz),
    ("scan", crate::scan::fuzz),
    ("attention", crate::attention::fuzz),
    ("matmul", crate::matmul::fuzz),
    ("norm", crate::norm::fuzz),
    ("conv", crate::conv::fuzz),
    ("long_conv", crate::long_conv::fuzz),
    ("quant", crate::quant::fuzz),
    ("feature_attention", crate::feature_attention::fuzz),
    ("diagonal", crate::diagonal::fuzz),
    ("sinkhorn", crate::sinkhorn::fuzz),
    ("fourier", crate::fourier::fuzz),
    ("pool", crate::pool::fuzz),
    ("plain", plain::fuzz),
];

/// The family of that name; panics where there is none.
pub fn family(name: &str) -> fn(&mut Bytes) {
    match FAMILIES.into_iter().find(|(known, _)| *known == name) {
        Some((_, family)) => family,
        None => panic!("no family of kernels is called {name:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a fuzzer would, for a short time.
    #[test]
    fn random_problems_match_their_twins() {
        for (name, family) in FAMILIES {
            let mut state = 0x5bd1_e995_u64;
            for round in 0..120 {
                let bytes: Vec<u8> = (0..40)
                    .map(|_| {
                        state = state
                            .wrapping_mul(0x5851_f42d_4c95_7f2d)
                            .wrapping_add(round);
                        (state >> 33) as u8
                    })
                    .collect();
                let run = || family(&mut Bytes::new(&bytes));
                let done = std::panic::catch_unwind(run);
                assert!(done.is_ok(), "{name} differs from its twin on {bytes:?}");
            }
        }
    }

    #[test]
    fn choices_are_within_their_bounds_and_end_with_the_bytes() {
        let mut bytes = Bytes::new(&[255; 9]);
        assert!((3..=7).contains(&bytes.number(3, 7)));
        assert!(bytes.length(50) <= 50);
        let offsets = bytes.offsets(10);
        assert!(offsets.is_sorted() && offsets[0] == 0);
        let mut none = Bytes::new(&[]);
        assert_eq!(
            (none.number(2, 9), none.flag(), none.length(5)),
            (2, false, 0)
        );
    }
}
