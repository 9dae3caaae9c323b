use super::*;
use crate::testing::{Close, assert_close, assert_near, rand_vec};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| *x as f64).collect()
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

const OFFSETS: [&[usize]; 4] = [
    &[0, 1],
    &[0, 5, 5, 7, 8],
    &[0, 63, 127, 192],
    &[0, 0, 70, 71],
];

#[test]
fn outputs_and_gradients_equal_the_equation() {
    for (case, offsets) in OFFSETS.into_iter().enumerate() {
        for width in [1, 2, 4, 8] {
            for mode in 0..4 {
                check(offsets, width, 5, mode & 1 == 1, mode & 2 == 2, case < 2);
            }
        }
    }
    check(&[0, 40], 4, 37, true, true, false);
}

fn check(
    offsets: &[usize],
    width: usize,
    channels: usize,
    silu: bool,
    full: bool,
    differences: bool,
) {
    check_by(
        assert_close,
        offsets,
        width,
        channels,
        silu,
        full,
        differences,
    );
}

fn check_by(
    close: Close,
    offsets: &[usize],
    width: usize,
    channels: usize,
    silu: bool,
    full: bool,
    differences: bool,
) {
    let (sequences, total) = (offsets.len() - 1, offsets[offsets.len() - 1]);
    let held = sequences * channels * (width - 1);
    let x = rand_vec(1, total * channels);
    let weight = rand_vec(2, channels * width);
    let bias = rand_vec(3, channels);
    let initial = rand_vec(4, held);
    let (dy, dlast) = (rand_vec(5, x.len()), rand_vec(6, held));
    let conv = Conv {
        x: &x,
        weight: &weight,
        bias: full.then_some(&bias[..]),
        initial: full.then_some(&initial[..]),
        offsets,
        channels,
        width,
        silu,
    };
    let run = |x: &[f64], weight: &[f64], bias: &[f64], initial: &[f64]| {
        let (bias, initial) = (full.then_some(bias), full.then_some(initial));
        naive::forward(x, weight, bias, initial, offsets, channels, width, silu)
    };
    let mut inputs = [wide(&x), wide(&weight), wide(&bias), wide(&initial)];
    let (want_y, want_last) = run(&inputs[0], &inputs[1], &inputs[2], &inputs[3]);
    let (y, last) = forward(&conv);
    close("y", &y, &narrow(&want_y), 1e-6);
    assert_close("last", &last, &narrow(&want_last), 0.0);
    if !differences && channels < 30 {
        return;
    }
    let grads = backward(&conv, &dy, full.then_some(&dlast[..]));
    let (dy, dlast) = (wide(&dy), wide(&dlast));
    let got = [&grads.x, &grads.weight, &grads.bias, &grads.initial];
    let count = if full { 4 } else { 2 };
    for (input, got) in got.into_iter().enumerate().take(count) {
        let mut want = vec![0.0; got.len()];
        for index in 0..got.len() {
            let mut loss = [0.0; 2];
            let value = inputs[input][index];
            for (side, loss) in loss.iter_mut().enumerate() {
                inputs[input][index] = value + if side == 0 { -1e-5 } else { 1e-5 };
                let (y, last) = run(&inputs[0], &inputs[1], &inputs[2], &inputs[3]);
                *loss = dot(&y, &dy) + if full { dot(&last, &dlast) } else { 0.0 };
            }
            inputs[input][index] = value;
            want[index] = (loss[1] - loss[0]) / 2e-5;
        }
        close(
            ["dx", "dweight", "dbias", "dinitial"][input],
            got,
            &narrow(&want),
            2e-5,
        );
    }
}

/// A packed row of sequences equals the sequences on their own, and a cut with a carried state equals no cut.
#[test]
fn carried_state_joins_a_cut() {
    let (channels, width) = (3, 4);
    let (x, weight) = (rand_vec(7, 90 * channels), rand_vec(8, channels * width));
    let run = |x: &[f32], initial: Option<&[f32]>| {
        let offsets = [0, x.len() / channels];
        let (bias, silu) = (None, true);
        forward(&Conv {
            x,
            weight: &weight,
            bias,
            initial,
            offsets: &offsets,
            channels,
            width,
            silu,
        })
    };
    let (whole, whole_last) = run(&x, None);
    for cut in [1, 2, 64, 65, 89] {
        let (first, state) = run(&x[..cut * channels], None);
        let (second, last) = run(&x[cut * channels..], Some(&state));
        assert_eq!(whole, [first, second].concat());
        assert_eq!(whole_last, last);
    }
}

/// Long enough for several groups of segments: the loss is linear in the weight, so its gradient can be held against it.
#[test]
fn weight_gradient_adds_up_over_groups() {
    let (total, channels, width) = (3001, 4, 3);
    let (x, dy) = (
        rand_vec(9, total * channels),
        rand_vec(10, total * channels),
    );
    let weight = rand_vec(11, channels * width);
    let offsets = [0, 1500, total];
    let (bias, initial) = (None, None);
    let conv = Conv {
        x: &x,
        weight: &weight,
        bias,
        initial,
        offsets: &offsets,
        channels,
        width,
        silu: false,
    };
    let (y, _) = forward(&conv);
    let grads = backward(&conv, &dy, None);
    let loss = dot(&wide(&y), &wide(&dy));
    assert!((dot(&wide(&grads.weight), &wide(&weight)) - loss).abs() < 1e-3);
    assert!((dot(&wide(&grads.x), &wide(&x)) - loss).abs() < 1e-3);
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        outputs_and_gradients_equal_the_equation,
        carried_state_joins_a_cut,
        weight_gradient_adds_up_over_groups,
    ]);
}

/// A problem from bytes, against the equation.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let [silu, full, differences] = [(); 3].map(|()| bytes.flag());
    // Differences take two passes for each value.
    let (most, channels) = if differences { (12, 20) } else { (140, 40) };
    let (offsets, width) = (bytes.offsets(most), bytes.number(1, 8));
    let channels = bytes.number(1, channels);
    check_by(
        assert_near,
        &offsets,
        width,
        channels,
        silu,
        full,
        differences,
    );
}
