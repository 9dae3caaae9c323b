use super::*;
use crate::instructions::Instructions;
use crate::testing::{assert_near, rand_vec};

/// The equation and its gradients in f64: `[y, dx, dkernel]`.
fn naive(p: Problem, x: &[f32], kernel: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
    let [mut y, mut dx] = [vec![0.0; x.len()], vec![0.0; x.len()]];
    let mut dk = vec![0.0; kernel.len()];
    for pair in p.offsets.windows(2) {
        for c in 0..p.channels {
            let at = |t: usize| (pair[0] + t) * p.channels + c;
            for t in 0..pair[1] - pair[0] {
                for l in 0..=t.min(p.taps.wrapping_sub(1)) {
                    if l < p.taps {
                        let k = c * p.taps + l;
                        y[at(t)] += f64::from(kernel[k]) * f64::from(x[at(t - l)]);
                        dx[at(t - l)] += f64::from(kernel[k]) * f64::from(dy[at(t)]);
                        dk[k] += f64::from(dy[at(t)]) * f64::from(x[at(t - l)]);
                    }
                }
            }
        }
    }
    [y, dx, dk].map(|values| values.iter().map(|value| *value as f32).collect())
}

fn check(lengths: &[usize], channels: usize, taps: usize) {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + length);
    }
    let p = Problem {
        offsets: &offsets,
        channels,
        taps,
    };
    let values = offsets[offsets.len() - 1] * channels;
    let (x, dy) = (rand_vec(1, values), rand_vec(2, values));
    let kernel = rand_vec(3, channels * taps);
    let [y, dx, dk] = naive(p, &x, &kernel, &dy);
    // Everything through the sums, everything through the transforms, and as it is.
    for direct in [usize::MAX, 0, DIRECT] {
        let name = format!("{lengths:?} x {channels}, {taps} taps, direct {direct}");
        let got = forward_above(direct, p, &x, &kernel);
        assert_near(&format!("{name} y"), &got, &y, 3e-6);
        let (got_dx, got_dk) = backward_above(direct, p, &x, &kernel, &dy);
        assert_near(&format!("{name} dx"), &got_dx, &dx, 3e-6);
        assert_near(&format!("{name} dk"), &got_dk, &dk, 3e-6);
    }
}

#[test]
fn outputs_and_gradients_equal_the_sum() {
    for time in [
        1,
        2,
        3,
        15,
        16,
        17,
        DIRECT - 1,
        DIRECT,
        DIRECT + 1,
        100,
        257,
    ] {
        for channels in [1, 5, 16, 35] {
            check(&[time], channels, time);
        }
    }
}

#[test]
fn kernels_may_be_shorter_or_longer_than_the_sequences() {
    for taps in [1, 2, 63, 64, 65, 130, 500] {
        check(&[130], 3, taps);
    }
}

#[test]
fn packs_with_empty_and_single_sequences_equal_the_sum() {
    check(&[0, 70, 1, 0, 64, 65, 200, 3, 0], 18, 200);
    check(&[70, 70, 70], 2, 50);
    check(&[0, 0], 4, 3);
    check(&[], 4, 3);
}

#[test]
fn nothing_passes_from_one_sequence_to_the_next_or_back_in_time() {
    let p = Problem {
        offsets: &[0, 100, 230],
        channels: 3,
        taps: 130,
    };
    let (mut x, kernel) = (rand_vec(1, 230 * 3), rand_vec(2, 3 * 130));
    let before = forward(p, &x, &kernel);
    // Not even what is not finite: a transform would carry it to every token.
    x[150 * 3 + 1] = 1e3;
    let after = forward(p, &x, &kernel);
    assert_eq!(before[..100 * 3], after[..100 * 3]);
    for t in 100..150 {
        for c in 0..3 {
            let (a, b) = (before[t * 3 + c], after[t * 3 + c]);
            assert!((a - b).abs() < 1e-3, "token {t}: {a} and {b}");
        }
    }
    assert!((after[150 * 3 + 1] - before[150 * 3 + 1]).abs() > 1.0);
}

#[test]
fn threads_do_not_change_a_bit() {
    let p = Problem {
        offsets: &[0, 40, 300],
        channels: 50,
        taps: 260,
    };
    let (x, kernel, dy) = (
        rand_vec(1, 15_000),
        rand_vec(2, 13_000),
        rand_vec(3, 15_000),
    );
    let run = |threads| {
        let both = || (forward(p, &x, &kernel), backward(p, &x, &kernel, &dy));
        Instructions::best().run(threads, both)
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn sizes_hold_what_they_must_and_grow_by_half_at_most() {
    for least in 1..3000 {
        let size = fast_size(least);
        assert!(size >= least && size.is_multiple_of(2));
        assert!(size <= (least * 3 / 2).max(4), "{least}: {size}");
    }
    let p = |time, taps| Problem {
        offsets: &[0, 10][..if time == 0 { 1 } else { 2 }],
        channels: 2,
        taps,
    };
    assert_eq!(flops(p(10, 10)), [2 * 2 * 55, 4 * 2 * 55]);
    assert_eq!(flops(p(10, 1)), [2 * 2 * 10, 4 * 2 * 10]);
    assert_eq!(flops(p(0, 1)), [0, 0]);
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        kernels_may_be_shorter_or_longer_than_the_sequences,
        packs_with_empty_and_single_sequences_equal_the_sum,
    ]);
}

/// A problem from bytes, against the sum.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let offsets = bytes.offsets(300);
    let lengths: Vec<usize> = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
    check(&lengths, bytes.number(1, 36), bytes.length(350));
}
