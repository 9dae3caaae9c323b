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

const NAMES: [&str; 8] = ["u", "delta", "delta_bias", "a", "b", "c", "d", "initial"];

struct Case {
    inputs: [Vec<f32>; 8],
    offsets: Vec<usize>,
    channels: usize,
    state: usize,
}

impl Case {
    fn new(offsets: &[usize], channels: usize, state: usize) -> Self {
        let (sequences, total) = (offsets.len() - 1, offsets[offsets.len() - 1]);
        let a: Vec<f32> = rand_vec(4, channels * state)
            .iter()
            .map(|x| -1.2 - x)
            .collect();
        Case {
            inputs: [
                rand_vec(1, total * channels),
                rand_vec(2, total * channels),
                rand_vec(3, channels),
                a,
                rand_vec(5, total * state),
                rand_vec(6, total * state),
                rand_vec(7, channels),
                rand_vec(8, sequences * channels * state),
            ],
            offsets: offsets.to_vec(),
            channels,
            state,
        }
    }

    fn scan(&self, initial: bool) -> Scan<'_> {
        let [u, delta, delta_bias, a, b, c, d, state] = &self.inputs;
        Scan {
            u,
            delta,
            delta_bias,
            a,
            b,
            c,
            d,
            initial: initial.then_some(&state[..]),
            offsets: &self.offsets,
            channels: self.channels,
            state: self.state,
        }
    }

    fn naive(&self, x: &[Vec<f64>], initial: bool) -> (Vec<f64>, Vec<f64>) {
        let initial = initial.then_some(&x[7][..]);
        let (offsets, channels, state) = (&self.offsets, self.channels, self.state);
        naive::forward(
            &x[0], &x[1], &x[2], &x[3], &x[4], &x[5], &x[6], initial, offsets, channels, state,
        )
    }

    /// Holds the outputs against the equation; the gradients too, by differences along each coordinate of the small
    /// arguments and at about `samples` coordinates of every other one.
    fn check(&self, full: bool, samples: usize) {
        self.check_by(assert_close, full, samples);
    }

    fn check_by(&self, close: Close, full: bool, samples: usize) {
        let mut x: Vec<Vec<f64>> = self.inputs.iter().map(|x| wide(x)).collect();
        let scan = self.scan(full);
        let output = run(&scan, true);
        let (y, last) = self.naive(&x, full);
        close("y", &output.y, &narrow(&y), 1e-5);
        close("last", &output.last, &narrow(&last), 1e-5);
        let unsaved = run(&scan, false);
        // A few tokens go another way where nothing is saved.
        let mut lengths = self.offsets.windows(2).map(|pair| pair[1] - pair[0]);
        let brief = lengths.any(|length| step::fits(self.state, length));
        assert!(unsaved.saved.is_empty());
        assert!(brief || (unsaved.y == output.y && unsaved.last == output.last));
        close("y unsaved", &unsaved.y, &narrow(&y), 1e-5);
        close("last unsaved", &unsaved.last, &narrow(&last), 1e-5);
        let (dy, dlast) = (rand_vec(11, y.len()), rand_vec(12, last.len()));
        let grads = backward(&scan, &output.saved, &dy, full.then_some(&dlast[..]));
        let (dy, dlast) = (wide(&dy), wide(&dlast));
        let got = [
            &grads.u,
            &grads.delta,
            &grads.delta_bias,
            &grads.a,
            &grads.b,
            &grads.c,
            &grads.d,
            &grads.initial,
        ];
        for (input, got) in got.into_iter().enumerate().take(if full { 8 } else { 7 }) {
            assert_eq!(got.len(), x[input].len(), "{}", NAMES[input]);
            let stride = (got.len() / samples).max(1);
            let (mut picked, mut want) = (Vec::new(), Vec::new());
            for index in (0..got.len()).step_by(stride) {
                let value = x[input][index];
                let mut loss = [0.0; 2];
                for (side, loss) in loss.iter_mut().enumerate() {
                    x[input][index] = value + if side == 0 { -1e-5 } else { 1e-5 };
                    let (y, last) = self.naive(&x, full);
                    *loss = dot(&y, &dy) + if full { dot(&last, &dlast) } else { 0.0 };
                }
                x[input][index] = value;
                picked.push(got[index]);
                want.push(((loss[1] - loss[0]) / 2e-5) as f32);
            }
            close(NAMES[input], &picked, &want, 3e-5);
        }
    }
}

#[test]
fn outputs_and_every_gradient_equal_the_equation() {
    for full in [false, true] {
        Case::new(&[0, 1], 1, 1).check(full, 1000);
        Case::new(&[0, 3, 3, 8], 5, 3).check(full, 1000);
        Case::new(&[0, 17], 19, 4).check(full, 100);
        for len in [63, 64, 65, 150] {
            Case::new(&[0, len], 3, 2).check(full, 40);
        }
        Case::new(&[0, 0, 130, 131, 170], 83, 16).check(full, 12);
        Case::new(&[0, 1, 1, 5, 8], 21, 48).check(full, 12);
    }
}

/// Values from the published recurrence in f64, arguments made of sines.
#[test]
fn the_published_example() {
    let s = |a: f64, n: usize| -> Vec<f64> { (0..n).map(|i| (a * (i + 1) as f64).sin()).collect() };
    let delta: Vec<f32> = s(0.3, 15)
        .iter()
        .map(|x| (0.05 + 0.1 * (1.0 + x)).exp_m1().ln() as f32)
        .collect();
    let case = Case {
        inputs: [
            narrow(&s(0.7, 15)),
            delta,
            vec![0.0; 3],
            vec![-1.0, -2.0, -1.0, -2.0, -1.0, -2.0],
            narrow(&s(0.5, 10)),
            narrow(&s(1.1, 10)),
            vec![1.0, 0.5, -0.25],
            vec![],
        ],
        offsets: vec![0, 5],
        channels: 3,
        state: 2,
    };
    let output = run(&case.scan(false), false);
    assert_close(
        "y[0]",
        &output.y[..3],
        &[0.772_333_7, 0.718_076_06, 0.002_503_204_1],
        1e-6,
    );
    assert_close(
        "y[4]",
        &output.y[12..],
        &[0.424_294_34, -0.070_292_53, 0.322_171_58],
        1e-6,
    );
    let last = [
        -0.091_861_48,
        -0.063_166_67,
        -0.096_199_74,
        -0.068_932_88,
        -0.082_994_64,
        -0.064_275_24,
    ];
    assert_close("last", &output.last, &last, 1e-6);
}

#[test]
fn carried_state_joins_a_cut() {
    let (channels, state, total) = (7, 4, 140);
    let whole = Case::new(&[0, total], channels, state);
    let want = run(&whole.scan(false), false);
    for cut in [1, 64, 100] {
        let part = |from: usize, to: usize, initial: Vec<f32>| {
            let [u, delta, delta_bias, a, b, c, d, _] = whole.inputs.clone();
            let rows = |x: Vec<f32>, width: usize| x[from * width..to * width].to_vec();
            Case {
                inputs: [
                    rows(u, channels),
                    rows(delta, channels),
                    delta_bias,
                    a,
                    rows(b, state),
                    rows(c, state),
                    d,
                    initial,
                ],
                offsets: vec![0, to - from],
                channels,
                state,
            }
        };
        let first = run(&part(0, cut, vec![]).scan(false), false);
        let second = run(&part(cut, total, first.last).scan(true), false);
        assert_eq!(want.y, [first.y, second.y].concat());
        assert_eq!(want.last, second.last);
    }
}

/// The forward pass with its final states, which begin as NaN.
struct Run {
    y: Vec<f32>,
    last: Vec<f32>,
    saved: Vec<f32>,
}

fn run(scan: &Scan, save: bool) -> Run {
    let mut last = vec![f32::NAN; scan.sequences() * scan.channels * scan.state];
    let Output { y, saved } = forward(scan, save, &mut last);
    Run { y, last, saved }
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        outputs_and_every_gradient_equal_the_equation,
        carried_state_joins_a_cut,
    ]);
}

/// A problem from bytes, against the equation.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let (channels, state) = (bytes.number(1, 40), bytes.one_of(&[1, 2, 5, 16, 20, 32]));
    let case = Case::new(&bytes.offsets(70), channels, state);
    case.check_by(assert_near, bytes.flag(), 5);
}
