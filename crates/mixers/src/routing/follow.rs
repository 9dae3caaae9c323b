//! Directions that follow the tokens through training, and tokens that are pulled to them.
//!
//! The paper's equation for online k-means (section 4.1) moves a direction by a running mean of what is nearest to it; only
//! directions count here, so the mean of the unit vectors is brought to unit length first, and the direction after.

use anyformer_ops::embedding::embedding;
use anyformer_ops::norm::l2_normalise;
use anyformer_ops::recompute::decided;
use anyformer_ops::{Tensor, tensor_values};
use std::sync::Arc;

use super::{Routing, unit};
use crate::mixer::Context;

impl Routing {
    /// In training, moves the directions by `parts` (queries, and keys of their own; `[tokens * heads, head_dim]`), and leaves
    /// the loss that pulls these to the directions as they were.
    pub(super) fn follow(&self, parts: &[&Tensor<2>], context: &Context) {
        let (decay, commitment) = (self.config.decay, self.config.commitment);
        if context.training.is_none() || (decay == 0.0 && commitment == 0.0) {
            return;
        }
        let (heads, width) = (self.config.heads, self.head_dim);
        let size = self.config.clusters * width;
        // Where the block is run again the directions have moved: what they were is noted with the choices.
        let noted = decided(|| {
            let means = self.means.values();
            let mut sums = vec![0.0; means.len()];
            let mut chosen = Vec::new();
            for part in parts {
                let mut rows = tensor_values((*part).clone());
                unit(&mut rows, width);
                let mut ids = self.nearest_of_all(&rows, &means);
                for (row, id) in ids.iter_mut().enumerate() {
                    *id += (row % heads * self.config.clusters) as u32;
                    let sum = sums[*id as usize * width..][..width].iter_mut();
                    sum.zip(&rows[row * width..])
                        .for_each(|(sum, value)| *sum += value);
                }
                chosen.extend(ids);
            }
            if decay > 0.0 {
                self.means
                    .update(|means| moved(means, sums, decay as f32, width));
            }
            chosen.extend(means.iter().map(|value| value.to_bits()));
            chosen
        });
        let Some(losses) = context.losses.as_ref().filter(|_| commitment > 0.0) else {
            return;
        };
        let (ids, means) = noted.split_at(noted.len() - heads * size);
        let means: Vec<f32> = means.iter().map(|bits| f32::from_bits(*bits)).collect();
        let means = Tensor::<1>::from_data(means.as_slice(), &parts[0].device());
        let means = means.reshape([heads * self.config.clusters, width]);
        let all = parts
            .iter()
            .map(|part| l2_normalise((*part).clone(), 1e-12));
        let all = Tensor::cat(all.collect(), 0);
        let count = ids.len();
        let own = embedding(means, Arc::new(ids.to_vec()), [1, count]).reshape([count, width]);
        let apart = all - own;
        losses.add((apart.clone() * apart).mean() * commitment);
    }
}

/// Directions `decay` of the way where they were and the rest at the mean of what is nearest, of unit length; those that nothing is
/// nearest to stay.
fn moved(means: &mut [f32], mut sums: Vec<f32>, decay: f32, width: usize) {
    unit(&mut sums, width);
    for (mean, sum) in means.chunks_mut(width).zip(sums.chunks(width)) {
        if sum.iter().all(|value| *value == 0.0) {
            continue;
        }
        for (mean, sum) in mean.iter_mut().zip(sum) {
            *mean = decay * *mean + (1.0 - decay) * sum;
        }
        unit(mean, width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_move_part_of_the_way_and_stay_where_nothing_is_near() {
        let mut means = vec![1.0, 0.0, 0.0, 1.0];
        moved(&mut means, vec![0.0, 3.0, 0.0, 0.0], 0.6, 2);
        let length = (0.36f32 + 0.16).sqrt();
        let want = [0.6 / length, 0.4 / length, 0.0, 1.0];
        for (got, want) in means.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{means:?}");
        }
    }
}
