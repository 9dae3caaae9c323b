//! Development only: one tolerance policy, goldens, finite differences, and the laws that every registered architecture
//! must keep.

pub mod cases;
pub mod golden;
pub mod import;
pub mod laws;
pub mod model_laws;
pub mod quantise;
pub mod tolerance;
pub mod whole;

use anyformer_mixers::{ConfigError, Options, TokenEntry, TokenMixer};
use anyformer_ops::{Builder, Device, ParamStore, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Uniform numbers in `[-1, 1)`.
pub fn uniform<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|_| rng.random::<f32>() * 2.0 - 1.0)
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
}

/// A mixer with its parameters, every one moved off its initial value so that no term is hidden behind a zero or a one.
pub fn stirred(
    entry: &TokenEntry,
    dim: usize,
    options: &Options,
    device: &Device,
) -> Result<(Box<dyn TokenMixer>, ParamStore), ConfigError> {
    let builder = Builder::new(device, 5);
    let mixer = (entry.build)(dim, options, &builder)?;
    let store = builder.store();
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    for param in store.params() {
        param.update(|values| {
            for value in values {
                *value += 0.1 * (rng.random::<f32>() * 2.0 - 1.0);
            }
        });
    }
    Ok((mixer, store))
}
