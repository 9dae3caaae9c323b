//! Deterministic random numbers and comparisons for the tests.

use crate::instructions::Instructions;

/// `n` values uniform in [-1, 1) from splitmix64.
pub fn rand_vec(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Asserts `max |got - want| <= tol (1e-6 + max |want|)`.
pub fn assert_close(name: &str, got: &[f32], want: &[f32], tol: f32) {
    assert_eq!(got.len(), want.len(), "{name}: lengths differ");
    let scale = want.iter().fold(0.0f32, |a, b| a.max(b.abs())) + 1e-6;
    for (index, (a, b)) in got.iter().zip(want).enumerate() {
        let error = (a - b).abs() / scale;
        assert!(
            error <= tol,
            "{name}[{index}]: got {a}, want {b}, relative error {error:e} > {tol:e}"
        );
    }
}

/// [`assert_close`] or [`assert_near`].
pub type Close = fn(&str, &[f32], &[f32], f32);

/// The same where summands are about as large as 1: sums of them that cancel are not held to more than the rounding of those.
pub fn assert_near(name: &str, got: &[f32], want: &[f32], tol: f32) {
    let with_unit = |values: &[f32]| [values, &[1.0]].concat();
    assert_close(name, &with_unit(got), &with_unit(want), tol);
}

/// The outputs of a naive f64 form and, by central differences, the gradient of `sum(dy * output)` for every input.
pub fn differences(
    inputs: &[&[f32]],
    dy: &[f32],
    naive: impl Fn(&[&[f64]]) -> Vec<f64>,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let step = 1e-5;
    let mut values: Vec<Vec<f64>> = inputs
        .iter()
        .map(|input| input.iter().map(|v| *v as f64).collect())
        .collect();
    let call = |values: &[Vec<f64>]| {
        let views: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
        naive(&views)
    };
    let loss = |values: &[Vec<f64>]| -> f64 {
        let y = call(values);
        assert_eq!(y.len(), dy.len());
        y.iter().zip(dy).map(|(y, dy)| y * *dy as f64).sum()
    };
    let outputs = call(&values).iter().map(|v| *v as f32).collect();
    let grads = (0..values.len())
        .map(|input| {
            (0..values[input].len())
                .map(|index| {
                    let before = values[input][index];
                    values[input][index] = before + step;
                    let up = loss(&values);
                    values[input][index] = before - step;
                    let down = loss(&values);
                    values[input][index] = before;
                    ((up - down) / (2.0 * step)) as f32
                })
                .collect()
        })
        .collect();
    (outputs, grads)
}

/// Runs `tests` with each set of instructions that is smaller than the machine's: its own is what they run with anyway.
pub fn with_fewer_instructions(tests: &[fn()]) {
    for level in Instructions::all() {
        if level < Instructions::best() {
            level.run(2, || tests.iter().for_each(|test| test()));
        }
    }
}
