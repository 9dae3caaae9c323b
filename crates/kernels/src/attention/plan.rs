//! Lists of keys instead of a [`super::Mask`]: each block of queries reads tiles of keys that are gathered from anywhere, with
//! pairs inside a tile that the pattern forbids left out.
//!
//! A plan is made once for a length and holds no scores: a tile is a few ranges of keys and, where pairs are missing, the
//! number of a mask of one word for each key. Equal masks are held once, so that a pattern which repeats costs little.

use std::collections::HashMap;
use std::ops::Range;

use super::{KEYS, ROWS};

/// A word for each key of a tile: bit `r` says that row `r` reads it.
type Mask = [u64; KEYS];

/// Which keys the queries of one sequence read, head by head.
#[derive(Clone, Debug)]
pub struct Plan {
    time: usize,
    /// One where all heads read the same.
    heads: usize,
    /// Of all heads, one head after the other.
    blocks: Vec<Queries>,
    /// The blocks of each head, `[heads + 1]`.
    starts: Vec<usize>,
    tiles: Vec<Tile>,
    pieces: Vec<Range<usize>>,
    masks: Vec<Mask>,
    pairs: u64,
}

/// A block of at most [`ROWS`] queries.
#[derive(Clone, Debug)]
pub(super) struct Queries {
    pub(super) first: usize,
    pub(super) rows: usize,
    tiles: Range<usize>,
}

/// At most [`KEYS`] keys.
#[derive(Clone, Debug)]
struct Tile {
    keys: usize,
    pieces: Range<usize>,
    mask: Option<usize>,
}

impl Plan {
    /// A plan over `time` tokens. Queries go in blocks of `block`; `list` gives the keys of a head and a block of queries as
    /// ranges in order, apart from each other; of these a query reads those for which `sees(head, query, key)` holds. With one head
    /// the plan serves any number of them.
    ///
    /// Panics when `block` is zero or a range ends behind `time`.
    pub fn new(
        time: usize,
        heads: usize,
        block: usize,
        list: impl Fn(usize, Range<usize>) -> Vec<Range<usize>>,
        sees: impl Fn(usize, usize, usize) -> bool,
    ) -> Self {
        let mut plan = Plan {
            time,
            heads,
            blocks: Vec::new(),
            starts: vec![0],
            tiles: Vec::new(),
            pieces: Vec::new(),
            masks: Vec::new(),
            pairs: 0,
        };
        let mut known = HashMap::new();
        for head in 0..heads {
            for from in (0..time).step_by(block) {
                let to = time.min(from + block);
                let keys = list(head, from..to);
                assert!(
                    keys.iter().all(|keys| keys.end <= time),
                    "attention plan: keys of {from}..{to} end behind {time}"
                );
                for first in (from..to).step_by(ROWS) {
                    let rows = ROWS.min(to - first);
                    let start = plan.tiles.len();
                    plan.cut(&keys, (head, first..first + rows), &sees, &mut known);
                    plan.blocks.push(Queries {
                        first,
                        rows,
                        tiles: start..plan.tiles.len(),
                    });
                }
            }
            plan.starts.push(plan.blocks.len());
        }
        plan
    }

    /// Tiles of a block of queries.
    fn cut(
        &mut self,
        keys: &[Range<usize>],
        queries: (usize, Range<usize>),
        sees: &impl Fn(usize, usize, usize) -> bool,
        known: &mut HashMap<Mask, usize>,
    ) {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for keys in keys.iter().filter(|keys| !keys.is_empty()) {
            match ranges.last_mut() {
                Some(last) if last.end == keys.start => last.end = keys.end,
                _ => ranges.push(keys.clone()),
            }
        }
        let (mut start, mut count) = (self.pieces.len(), 0);
        for mut keys in ranges {
            while !keys.is_empty() {
                let taken = keys.len().min(KEYS - count);
                self.pieces.push(keys.start..keys.start + taken);
                (keys.start, count) = (keys.start + taken, count + taken);
                if count == KEYS {
                    self.close(start, count, queries.clone(), sees, known);
                    (start, count) = (self.pieces.len(), 0);
                }
            }
        }
        if count > 0 {
            self.close(start, count, queries, sees, known);
        }
    }

    /// Makes the pieces from `start` on a tile, or drops them where no query reads a key of them.
    fn close(
        &mut self,
        start: usize,
        keys: usize,
        (head, queries): (usize, Range<usize>),
        sees: &impl Fn(usize, usize, usize) -> bool,
        known: &mut HashMap<Mask, usize>,
    ) {
        let mut mask = [0; KEYS];
        let rows = queries.len();
        let listed = self.pieces[start..].iter().cloned().flatten();
        for (word, key) in mask.iter_mut().zip(listed) {
            for (row, query) in queries.clone().enumerate() {
                *word |= u64::from(sees(head, query, key)) << row;
            }
        }
        let pairs: u64 = mask.iter().map(|word| u64::from(word.count_ones())).sum();
        if pairs == 0 {
            self.pieces.truncate(start);
            return;
        }
        self.pairs += pairs;
        let mask = (pairs < (rows * keys) as u64).then(|| {
            *known.entry(mask).or_insert_with(|| {
                self.masks.push(mask);
                self.masks.len() - 1
            })
        });
        self.tiles.push(Tile {
            keys,
            pieces: start..self.pieces.len(),
            mask,
        });
    }

    /// Tokens of the sequence.
    pub fn time(&self) -> usize {
        self.time
    }

    /// Operations of a forward pass of `heads` heads, two for each multiply-add of the pairs that are read.
    pub fn flops(&self, heads: usize, head_dim: usize, value_dim: usize) -> u64 {
        let same = (heads / self.heads.max(1)) as u64;
        2 * self.pairs * same * (head_dim + value_dim) as u64
    }

    /// Calls `pair(query, key)` for every pair of a head that is read.
    pub fn pairs(&self, head: usize, mut pair: impl FnMut(usize, usize)) {
        for block in self.blocks(head) {
            for tile in block.tiles.clone() {
                for (at, key) in self.pieces(tile).iter().cloned().flatten().enumerate() {
                    let word = self.mask(tile).map_or(u64::MAX, |mask| mask[at]);
                    let rows = (0..block.rows).filter(|row| word >> row & 1 == 1);
                    rows.for_each(|row| pair(block.first + row, key));
                }
            }
        }
    }

    pub(super) fn heads(&self) -> usize {
        self.heads
    }

    /// Blocks of queries of a head.
    pub(super) fn blocks(&self, head: usize) -> &[Queries] {
        let head = if self.heads == 1 { 0 } else { head };
        &self.blocks[self.starts[head]..self.starts[head + 1]]
    }

    /// Numbers of the tiles of the block of queries that begins with `first`.
    pub(super) fn tiles(&self, head: usize, first: usize) -> Range<usize> {
        let blocks = self.blocks(head);
        match blocks.binary_search_by_key(&first, |block| block.first) {
            Ok(at) => blocks[at].tiles.clone(),
            Err(_) => panic!("attention plan: no block begins with query {first}"),
        }
    }

    /// The ranges of keys of a tile.
    pub(super) fn pieces(&self, tile: usize) -> &[Range<usize>] {
        &self.pieces[self.tiles[tile].pieces.clone()]
    }

    /// Keys of a tile.
    pub(super) fn keys(&self, tile: usize) -> usize {
        self.tiles[tile].keys
    }

    /// The words of a tile's keys, where it has pairs that are not read.
    #[inline(always)]
    pub(super) fn mask(&self, tile: usize) -> Option<&[u64]> {
        let Tile { keys, mask, .. } = &self.tiles[tile];
        mask.map(|mask| &self.masks[mask][..*keys])
    }
}
