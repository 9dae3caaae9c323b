//! The decay of `xpos`.

use anyformer_ops::Tensor;

/// xPos, Sun et al. (2022), arXiv 2212.10554: queries times `zeta^(t / 512)`, keys over it, `zeta` of pair m being
/// `(2 m / d + 0.4) / 1.4`; positions `[batch * time]`, x `[batch, time, heads, head_dim]` in the half-split layout.
pub(crate) fn xpos(q: Tensor<4>, k: Tensor<4>, positions: &[usize]) -> [Tensor<4>; 2] {
    let [batch, time, _, width] = q.dims();
    let power = |sign: f64| {
        let factors = positions.iter().flat_map(|at| {
            (0..width).map(move |feature| {
                let pair = (feature % (width / 2)) as f64;
                let zeta = (2.0 * pair / width as f64 + 0.4) / 1.4;
                zeta.powf(sign * *at as f64 / 512.0) as f32
            })
        });
        let factors: Vec<f32> = factors.collect();
        Tensor::<1>::from_data(factors.as_slice(), &q.device()).reshape([batch, time, 1, width])
    };
    [q.clone() * power(1.0), k * power(-1.0)]
}

/// The longest text at which xPos's factors are finite and their products exact enough, in tokens.
pub(crate) const XPOS_LIMIT: usize = 30_000;
