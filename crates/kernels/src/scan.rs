//! Selective scan: the diagonal recurrence of Mamba whose step size, input map and output map depend on the token.
//!
//! With `Delta = softplus(delta + delta_bias)`:
//! `h[t] = exp(Delta[t] a) h[t-1] + Delta[t] b[t] u[t]`, `y[t] = sum_n c[t, n] h[t, :, n] + d u[t]`
//! (Gu and Dao, arXiv 2312.00752, with the input map `Delta b` of the published code, not the zero-order hold of the
//! paper's equation 4).
//!
//! Shapes: u, delta, y `[total, channels]`, a `[channels, state]` (negative), b, c `[total, state]`, d, delta_bias
//! `[channels]`, initial and final states `[sequences, channels, state]`. Time is walked in order, channels fill the
//! lanes; the forward pass saves the state every [`CHUNK`] steps and the backward pass recomputes in between. A few tokens
//! that nobody asks gradients of go on from the states as they lie.

mod backward;
mod forward;
pub mod naive;
mod step;
#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

use crate::transpose::transpose;
use std::ops::Range;

pub use backward::{Grads, backward};
pub use forward::{Output, forward};

/// Steps between saved states.
pub const CHUNK: usize = 64;
/// Channels handled at once.
const LANES: usize = 16;
/// Blocks of [`LANES`] channels per task; a fixed number, so that sums over channels do not depend on the threads.
const GROUP: usize = 4;

/// One value for each channel of a block.
type Lanes = [f32; LANES];

/// The arguments.
#[derive(Clone, Copy, Debug)]
pub struct Scan<'a> {
    /// `[total, channels]`.
    pub u: &'a [f32],
    /// `[total, channels]`, before bias and softplus.
    pub delta: &'a [f32],
    /// `[channels]`.
    pub delta_bias: &'a [f32],
    /// `[channels, state]`, negative.
    pub a: &'a [f32],
    /// `[total, state]`.
    pub b: &'a [f32],
    /// `[total, state]`.
    pub c: &'a [f32],
    /// `[channels]`.
    pub d: &'a [f32],
    /// `[sequences, channels, state]`; zeros when absent.
    pub initial: Option<&'a [f32]>,
    /// Cumulative lengths of the packed sequences.
    pub offsets: &'a [usize],
    /// Channels.
    pub channels: usize,
    /// State per channel.
    pub state: usize,
}

/// Operations over `total` tokens: 9 per token, channel and state (discretise 3, update 4, read 2).
pub fn flops(total: usize, channels: usize, state: usize) -> u64 {
    9 * (total * channels * state) as u64
}

impl Scan<'_> {
    fn total(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    fn blocks(&self) -> usize {
        self.channels.div_ceil(LANES)
    }

    /// Saved states before sequence `sequence`.
    fn chunks_before(&self) -> Vec<usize> {
        let mut sum = 0;
        let mut before = vec![0];
        for pair in self.offsets.windows(2) {
            sum += (pair[1] - pair[0]).div_ceil(CHUNK);
            before.push(sum);
        }
        before
    }

    /// The work: each sequence with each group of channel blocks.
    fn tasks(&self) -> Vec<Task> {
        let blocks = self.blocks();
        let mut tasks = Vec::new();
        for sequence in 0..self.sequences() {
            for from in (0..blocks).step_by(GROUP) {
                tasks.push(Task {
                    sequence,
                    rows: self.offsets[sequence]..self.offsets[sequence + 1],
                    blocks: from..blocks.min(from + GROUP),
                });
            }
        }
        tasks
    }

    /// `[channels, state]` to `[blocks, state]` of lanes; channels past the end are zero.
    fn blocked(&self, values: &[f32]) -> Vec<Lanes> {
        let mut blocked = vec![[0.0; LANES]; self.blocks() * self.state];
        self.block_up(values, 0, &mut blocked);
        blocked
    }

    /// As [`Scan::blocked`], blocks from `first` on.
    fn block_up(&self, values: &[f32], first: usize, blocked: &mut [Lanes]) {
        for (index, block) in blocked.chunks_exact_mut(self.state).enumerate() {
            let (from, count) = (
                (first + index) * LANES * self.state,
                self.width(first + index),
            );
            let to = block.as_flattened_mut();
            transpose(
                [count, self.state],
                1.0,
                &values[from..],
                self.state,
                to,
                LANES,
            );
        }
    }

    /// The inverse of [`Scan::block_up`]: `[.., state]` of lanes to the channels' own rows, written to `values` from its
    /// start on.
    fn unblock(&self, blocked: &[Lanes], first: usize, values: &mut [f32]) {
        for (index, block) in blocked.chunks_exact(self.state).enumerate() {
            let count = self.width(first + index);
            let to = &mut values[index * LANES * self.state..];
            transpose(
                [self.state, count],
                1.0,
                block.as_flattened(),
                LANES,
                to,
                self.state,
            );
        }
    }

    /// As [`Scan::unblock`], into all channels and added to what they hold.
    fn add_unblocked(&self, blocked: &[Lanes], first: usize, values: &mut [f32]) {
        let from = first * LANES * self.state;
        let channels = (blocked.len() / self.state * LANES).min(self.channels - first * LANES);
        let mut own = vec![0.0; channels * self.state];
        self.unblock(blocked, first, &mut own);
        for (value, own) in values[from..].iter_mut().zip(own) {
            *value += own;
        }
    }

    /// The channels of a block in a row of `[rows, channels]`.
    #[inline(always)]
    fn lanes(&self, values: &[f32], row: usize, block: usize) -> Lanes {
        let from = block * LANES;
        let row = &values[row * self.channels..][..self.channels];
        match row[from..].first_chunk::<LANES>() {
            Some(lanes) => *lanes,
            None => {
                let mut lanes = [0.0; LANES];
                lanes[..self.channels - from].copy_from_slice(&row[from..]);
                lanes
            }
        }
    }

    /// Channels in a block.
    #[inline(always)]
    fn width(&self, block: usize) -> usize {
        LANES.min(self.channels - block * LANES)
    }

    fn check(&self) {
        let (total, channels, state) = (self.total(), self.channels, self.state);
        assert_eq!(self.u.len(), total * channels, "scan u");
        assert_eq!(self.delta.len(), total * channels, "scan delta");
        assert_eq!(self.delta_bias.len(), channels, "scan delta_bias");
        assert_eq!(self.a.len(), channels * state, "scan a");
        assert_eq!(self.b.len(), total * state, "scan b");
        assert_eq!(self.c.len(), total * state, "scan c");
        assert_eq!(self.d.len(), channels, "scan d");
        let states = self.sequences() * channels * state;
        assert!(
            self.initial.is_none_or(|initial| initial.len() == states),
            "scan initial"
        );
    }
}

/// One sequence and some blocks of channels.
struct Task {
    sequence: usize,
    rows: Range<usize>,
    blocks: Range<usize>,
}

impl Task {
    /// States at the start, `[blocks, state]` of lanes.
    fn initial(&self, scan: &Scan) -> Vec<Lanes> {
        let state = scan.state;
        let mut h = vec![[0.0; LANES]; self.blocks.len() * state];
        let Some(initial) = scan.initial else {
            return h;
        };
        let size = scan.channels * state;
        scan.block_up(
            &initial[self.sequence * size..][..size],
            self.blocks.start,
            &mut h,
        );
        h
    }
}
