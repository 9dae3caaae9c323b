//! A few tokens on AVX-512, for states of whole vectors: the state of a channel is read as it lies, moved on and written to
//! its new place, without turning blocks of channels round and back. Sixteen channels' outputs are summed together.
#![allow(unsafe_code)]

use super::{LANES, Scan, Task};
#[cfg(target_arch = "x86_64")]
use crate::instructions::Instructions;

/// Sequences of at most this many tokens go this way.
const STEPS: usize = 4;

/// True when [`steps`] can be asked: AVX-512, a few tokens, a state of whole vectors.
pub(super) fn fits(state: usize, rows: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    let wide = Instructions::Avx512.usable();
    #[cfg(not(target_arch = "x86_64"))]
    let wide = false;
    wide && state > 0 && state.is_multiple_of(16) && rows <= STEPS
}

/// Moves the channels of a task on over its tokens. `last` holds their states, overwritten; each token's outputs go to
/// `write` with the block and the token. Panics where [`fits`] says no.
pub(super) fn steps(
    scan: &Scan,
    task: &Task,
    last: &mut [f32],
    write: impl Fn(usize, usize, &[f32; LANES]),
) {
    let first = task.blocks.start * LANES;
    let channels = (task.blocks.end * LANES).min(scan.channels) - first;
    assert!(
        fits(scan.state, task.rows.len()) && last.len() == channels * scan.state,
        "a step of other sizes"
    );
    let initial = scan.initial.map(|initial| {
        let at = (task.sequence * scan.channels + first) * scan.state;
        &initial[at..at + last.len()]
    });
    match initial {
        None => last.fill(0.0),
        Some(initial) if task.rows.is_empty() => last.copy_from_slice(initial),
        Some(_) => {}
    }
    #[cfg(target_arch = "x86_64")]
    for block in task.blocks.clone() {
        let at = (block * LANES - first) * scan.state;
        let size = scan.width(block) * scan.state;
        let to = last[at..at + size].as_mut_ptr();
        for row in task.rows.clone() {
            let from = match initial {
                Some(initial) if row == task.rows.start => initial[at..at + size].as_ptr(),
                _ => to.cast_const(),
            };
            // SAFETY: both hold the states of the block's channels; AVX-512 was detected.
            let out = unsafe { wide::step(scan, row, block, from, to) };
            write(block, row, &out);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;
    use std::f32::consts::LOG2_E;

    use super::{LANES, Scan};
    /// Values of the state between those that are worked on and those that are asked for.
    const AHEAD: usize = 512;
    use crate::gemm::dots::totals;
    use crate::math::{softplus, wide::exp2};

    /// One token of one block of channels: states `[channels, state]` go from `from` to `to`; returns the outputs.
    ///
    /// # Safety
    /// Both hold the states of the block's channels, which are whole vectors, and may be the same; AVX-512 is there.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn step(
        scan: &Scan,
        row: usize,
        block: usize,
        from: *const f32,
        to: *mut f32,
    ) -> [f32; LANES] {
        let state = scan.state;
        let (delta, u) = (
            scan.lanes(scan.delta, row, block),
            scan.lanes(scan.u, row, block),
        );
        let (bias, d) = (
            scan.lanes(scan.delta_bias, 0, block),
            scan.lanes(scan.d, 0, block),
        );
        let (mut delta_of, mut input_of) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            delta_of[l] = softplus(delta[l] + bias[l]);
            input_of[l] = delta_of[l] * u[l];
            delta_of[l] *= LOG2_E;
        }
        let width = scan.width(block);
        let a = &scan.a[block * LANES * state..][..width * state];
        let b = &scan.b[row * state..][..state];
        let c = &scan.c[row * state..][..state];
        let mut sums = [_mm512_setzero_ps(); LANES];
        for (l, sum) in sums.iter_mut().enumerate().take(width) {
            let (delta, input) = (_mm512_set1_ps(delta_of[l]), _mm512_set1_ps(input_of[l]));
            for n in (0..state).step_by(16) {
                // SAFETY: the state of channel `l` is whole vectors, of which this is one; so are its `a`, `b` and `c`.
                unsafe {
                    let at = l * state + n;
                    // The exponentials leave the loads too few instructions to run ahead by themselves.
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at + AHEAD).cast());
                    _mm_prefetch::<_MM_HINT_ET0>(to.wrapping_add(at + AHEAD).cast());
                    let decay = exp2(_mm512_mul_ps(delta, _mm512_loadu_ps(a.as_ptr().add(at))));
                    let write = _mm512_mul_ps(input, _mm512_loadu_ps(b.as_ptr().add(n)));
                    let h = _mm512_fmadd_ps(decay, _mm512_loadu_ps(from.add(at)), write);
                    _mm512_storeu_ps(to.add(at), h);
                    *sum = _mm512_fmadd_ps(_mm512_loadu_ps(c.as_ptr().add(n)), h, *sum);
                }
            }
        }
        let mut out = [0.0; LANES];
        // SAFETY: `out` holds 16 values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), totals(sums)) };
        for l in 0..LANES {
            out[l] = d[l].mul_add(u[l], out[l]);
        }
        out
    }
}
