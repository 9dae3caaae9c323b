//! Causal depthwise convolution over time with streaming state.
//!
//! `y[t, c] = act(bias[c] + sum_j weight[c, j] x[t - width + 1 + j, c])`: the last tap multiplies the current token, and
//! nothing crosses a sequence boundary (the short convolution of Mamba, arXiv 2312.00752, and of the delta-rule mixers).
//!
//! Shapes: x and y `[total, channels]`, weight `[channels, width]`, bias `[channels]`, and the inputs before (initial)
//! and at the end (final) of each sequence `[sequences, channels, width - 1]`, oldest first. `width` is 1 to 8.

mod around;
mod backward;
mod forward;
pub mod naive;
#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

pub use around::Around;
pub use backward::{Grads, backward};
pub use forward::forward;

/// Widest convolution.
pub const MAX_WIDTH: usize = 8;

/// Rows of one unit of work.
const ROWS: usize = 64;

/// The arguments.
#[derive(Clone, Copy, Debug)]
pub struct Conv<'a> {
    /// `[total, channels]`.
    pub x: &'a [f32],
    /// `[channels, width]`.
    pub weight: &'a [f32],
    /// `[channels]`.
    pub bias: Option<&'a [f32]>,
    /// Inputs before each sequence, `[sequences, channels, width - 1]`; zeros when absent.
    pub initial: Option<&'a [f32]>,
    /// Cumulative lengths of the packed sequences.
    pub offsets: &'a [usize],
    /// Channels.
    pub channels: usize,
    /// Taps.
    pub width: usize,
    /// SiLU on the result.
    pub silu: bool,
}

impl Conv<'_> {
    fn total(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    fn check(&self) {
        let (channels, held) = (self.channels, self.width - 1);
        assert!(
            (1..=MAX_WIDTH).contains(&self.width),
            "conv width {}",
            self.width
        );
        assert_eq!(self.x.len(), self.total() * channels, "conv x");
        assert_eq!(self.weight.len(), channels * self.width, "conv weight");
        assert!(
            self.bias.is_none_or(|bias| bias.len() == channels),
            "conv bias"
        );
        let state = self.sequences() * channels * held;
        assert!(
            self.initial.is_none_or(|initial| initial.len() == state),
            "conv initial"
        );
    }
}

/// Multiply-adds counted as two operations.
pub fn flops(total: usize, channels: usize, width: usize) -> u64 {
    2 * (total * channels * width) as u64
}

/// `[rows, cols]` to `[cols, rows]`.
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for row in 0..rows {
        for col in 0..cols {
            y[col * rows + row] = x[row * cols + col];
        }
    }
    y
}

/// Consecutive rows of one sequence.
#[derive(Clone, Copy, Debug)]
struct Segment {
    sequence: usize,
    from: usize,
    to: usize,
}

/// All rows, in order, in pieces of at most [`ROWS`] that stay within a sequence.
fn segments(offsets: &[usize]) -> Vec<Segment> {
    let mut segments = Vec::new();
    for (sequence, pair) in offsets.windows(2).enumerate() {
        for from in (pair[0]..pair[1]).step_by(ROWS) {
            segments.push(Segment {
                sequence,
                from,
                to: pair[1].min(from + ROWS),
            });
        }
    }
    segments
}

/// `values`, `[rows, channels]`, cut as the segments are.
fn cut<'v>(
    segments: &[Segment],
    channels: usize,
    values: &'v mut [f32],
) -> Vec<(Segment, &'v mut [f32])> {
    let (mut rest, mut parts) = (values, Vec::new());
    for segment in segments {
        let (own, after) = rest.split_at_mut((segment.to - segment.from) * channels);
        parts.push((*segment, own));
        rest = after;
    }
    parts
}

/// Rows of the input as the taps see them: those before a sequence come from its initial state, or are zero.
struct Rows<'a> {
    conv: Conv<'a>,
    /// `[sequences, width - 1, channels]`.
    heads: Option<Vec<f32>>,
    zeros: Vec<f32>,
}

impl<'a> Rows<'a> {
    fn new(conv: &Conv<'a>) -> Self {
        let held = conv.width - 1;
        let heads = conv.initial.filter(|_| held > 0).map(|initial| {
            initial
                .chunks_exact(conv.channels * held)
                .flat_map(|state| transposed(state, conv.channels, held))
                .collect()
        });
        Rows {
            conv: *conv,
            heads,
            zeros: vec![0.0; conv.channels],
        }
    }

    /// The input `back` tokens before row `row` of `sequence`.
    #[inline(always)]
    fn before(&self, sequence: usize, row: usize, back: usize) -> &[f32] {
        let (channels, held) = (self.conv.channels, self.conv.width - 1);
        let start = self.conv.offsets[sequence];
        if row >= start + back {
            return &self.conv.x[(row - back) * channels..][..channels];
        }
        match &self.heads {
            Some(heads) => {
                let index = sequence * held + held + row - start - back;
                &heads[index * channels..][..channels]
            }
            None => &self.zeros,
        }
    }

    /// The rows under the taps at `row`, oldest first.
    #[inline(always)]
    fn taps<const W: usize>(&self, sequence: usize, row: usize) -> [&[f32]; W] {
        let mut taps: [&[f32]; W] = [&[]; W];
        for j in 0..W {
            taps[j] = self.before(sequence, row, W - 1 - j);
        }
        taps
    }
}

/// Runs `$body` with the constant `$W` equal to the width.
macro_rules! with_width {
    ($width:expr, $W:ident => $body:expr) => {
        match $width {
            1 => {
                const $W: usize = 1;
                $body
            }
            2 => {
                const $W: usize = 2;
                $body
            }
            3 => {
                const $W: usize = 3;
                $body
            }
            4 => {
                const $W: usize = 4;
                $body
            }
            5 => {
                const $W: usize = 5;
                $body
            }
            6 => {
                const $W: usize = 6;
                $body
            }
            7 => {
                const $W: usize = 7;
                $body
            }
            _ => {
                const $W: usize = 8;
                $body
            }
        }
    };
}
use with_width;
