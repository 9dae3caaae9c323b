//! The equation as loops, in f64.

/// Gives `(y, final_state)`; arguments as in [`super::Scan`].
pub fn forward(
    u: &[f64],
    delta: &[f64],
    delta_bias: &[f64],
    a: &[f64],
    b: &[f64],
    c: &[f64],
    d: &[f64],
    initial: Option<&[f64]>,
    offsets: &[usize],
    channels: usize,
    state: usize,
) -> (Vec<f64>, Vec<f64>) {
    let size = channels * state;
    let mut y = vec![0.0; u.len()];
    let mut last = vec![0.0; (offsets.len() - 1) * size];
    if let Some(initial) = initial {
        last.copy_from_slice(initial);
    }
    for (s, pair) in offsets.windows(2).enumerate() {
        let h = &mut last[s * size..][..size];
        for t in pair[0]..pair[1] {
            for channel in 0..channels {
                let x = delta[t * channels + channel] + delta_bias[channel];
                let step = x.max(0.0) + (-x.abs()).exp().ln_1p();
                let input = u[t * channels + channel];
                let mut sum = d[channel] * input;
                for n in 0..state {
                    let h = &mut h[channel * state + n];
                    let decay = (step * a[channel * state + n]).exp();
                    *h = decay * *h + step * b[t * state + n] * input;
                    sum += c[t * state + n] * *h;
                }
                y[t * channels + channel] = sum;
            }
        }
    }
    (y, last)
}
