//! Dropout of the weights of attention: which pairs count, made again where they are needed.
//!
//! As in [`crate::dropout`], by Philox: the counter of a pair is made of its row (the query, times the query heads of a key head,
//! plus the head among them), of the quarter of its key, of the sequence, and of the place in the model with the key head; the
//! key's remainder by four picks the word. So a pair is dropped or not however blocks and tiles are cut.

use std::ops::Range;

use super::{Attention, Group, KEYS, LANES, ROWS, Tile};
use crate::dropout::{Dropout, philox, words};
use crate::simd::dispatched;

/// Keys that share a draw.
const WORDS: usize = 4;
/// Places in the model are below this; key heads stand above.
const PLACES: u32 = 1 << 20;

/// A [`Dropout`] for one key head of one sequence.
struct Drawn {
    key: [u32; 2],
    place: [u32; 2],
    limit: u32,
    scale: f32,
}

impl Drawn {
    fn new(dropout: &Dropout, sequence: usize, kv_head: usize) -> Self {
        assert!(
            dropout.site < PLACES && kv_head < (u32::MAX / PLACES) as usize,
            "attention dropout: place {} of key head {kv_head}",
            dropout.site
        );
        let (limit, scale) = dropout.limits();
        Drawn {
            key: dropout.key.words(),
            place: [sequence as u32, dropout.site + kv_head as u32 * PLACES],
            limit,
            scale,
        }
    }

    fn factor(&self, row: usize, key: usize) -> f32 {
        let [sequence, place] = self.place;
        let counter = [row as u32, (key / WORDS) as u32, sequence, place];
        let word = philox(self.key, counter)[key % WORDS];
        if word < self.limit { 0.0 } else { self.scale }
    }
}

/// What the weight of a pair is multiplied with: 0, or `1 / (1 - chance)`. `row` counts query heads of a key head within queries.
pub(super) fn factor(
    dropout: &Dropout,
    sequence: usize,
    kv_head: usize,
    row: usize,
    key: usize,
) -> f32 {
    Drawn::new(dropout, sequence, kv_head).factor(row, key)
}

/// The factors of all pairs of a sequence, `[heads, queries, keys]`.
pub fn factors(
    dropout: &Dropout,
    sequence: usize,
    [heads, kv_heads]: [usize; 2],
    [queries, keys]: [usize; 2],
) -> Vec<f32> {
    let fold = heads / kv_heads;
    let mut all = Vec::with_capacity(heads * queries * keys);
    for head in 0..heads {
        let drawn = Drawn::new(dropout, sequence, head / fold);
        for query in 0..queries {
            let row = query * fold + head % fold;
            all.extend((0..keys).map(|key| drawn.factor(row, key)));
        }
    }
    all
}

/// The factors of a tile.
pub(super) struct Kept {
    /// `[KEYS, ROWS]`.
    factors: Vec<f32>,
}

impl Kept {
    /// A buffer for the tiles of one thread; none where nothing is dropped.
    pub(super) fn of(attention: &Attention) -> Option<Self> {
        attention.dropout.map(|_| Kept {
            factors: vec![0.0; KEYS * ROWS],
        })
    }

    /// Makes the factors of the rows of a block from `first` on and of a tile's keys.
    pub(super) fn draw(&mut self, attention: &Attention, group: &Group, first: usize, tile: Tile) {
        let Some(dropout) = &attention.dropout else {
            return;
        };
        let drawn = Drawn::new(dropout, group.sequence, group.kv_head);
        let whole = [tile.from..tile.from + tile.keys];
        let keys = match attention.pieces(group, tile) {
            [] => &whole[..],
            pieces => pieces,
        };
        let out = &mut self.factors[..tile.keys * ROWS];
        draw(&drawn, first as u32, keys, out);
    }

    /// Weights, or gradients of weights, `[keys, ROWS]` times their factors.
    pub(super) fn apply(&self, values: &mut [f32]) {
        times(&self.factors[..values.len()], values);
    }
}

dispatched! {
    fn draw<'a>(drawn: &'a Drawn, first: u32, keys: &'a [Range<usize>], out: &'a mut [f32]) {
        let mut quarter = None;
        let mut held = [[[0; LANES]; WORDS]; ROWS / LANES];
        let keys = keys.iter().cloned().flatten();
        for (key, out) in keys.zip(out.chunks_exact_mut(ROWS)) {
            if quarter != Some(key / WORDS) {
                quarter = Some(key / WORDS);
                let place = [(key / WORDS) as u32, drawn.place[0], drawn.place[1]];
                for (part, held) in held.iter_mut().enumerate() {
                    let first = first.wrapping_add((part * LANES) as u32);
                    *held = words(drawn.key, first, place);
                }
            }
            for (held, out) in held.iter().zip(out.chunks_exact_mut(LANES)) {
                for (out, word) in out.iter_mut().zip(&held[key % WORDS]) {
                    *out = if *word < drawn.limit { 0.0 } else { drawn.scale };
                }
            }
        }
    }
}

dispatched! {
    fn times<'a>(factors: &'a [f32], values: &'a mut [f32]) {
        for (value, factor) in values.iter_mut().zip(factors) {
            *value = if *factor == 0.0 { 0.0 } else { *value * factor };
        }
    }
}
