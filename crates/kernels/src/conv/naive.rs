//! The equation as loops, in f64.

/// Gives `(y, final_state)`; arguments as in [`super::Conv`].
pub fn forward(
    x: &[f64],
    weight: &[f64],
    bias: Option<&[f64]>,
    initial: Option<&[f64]>,
    offsets: &[usize],
    channels: usize,
    width: usize,
    silu: bool,
) -> (Vec<f64>, Vec<f64>) {
    let held = width - 1;
    let mut y = vec![0.0; x.len()];
    let mut last = vec![0.0; (offsets.len() - 1) * channels * held];
    for (s, pair) in offsets.windows(2).enumerate() {
        let (start, len) = (pair[0] as isize, (pair[1] - pair[0]) as isize);
        for c in 0..channels {
            let input = |t: isize| match t >= 0 {
                true => x[(start + t) as usize * channels + c],
                false => initial.map_or(0.0, |state| {
                    state[(s * channels + c) * held + (t + held as isize) as usize]
                }),
            };
            for t in 0..len {
                let mut sum = bias.map_or(0.0, |bias| bias[c]);
                for j in 0..width {
                    sum += weight[c * width + j] * input(t - held as isize + j as isize);
                }
                let value = if silu {
                    sum / (1.0 + (-sum).exp())
                } else {
                    sum
                };
                y[(start + t) as usize * channels + c] = value;
            }
            for k in 0..held {
                last[(s * channels + c) * held + k] = input(len - held as isize + k as isize);
            }
        }
    }
    (y, last)
}
