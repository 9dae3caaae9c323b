//! Positions that need the scores themselves: biases learned from the distance of query and key, and rotary forms that treat near
//! and far keys apart.
//!
//! - `t5`, Raffel et al. (2020), arXiv 1910.10683: a learned number for each bucket of distances and each head; half of the buckets
//!   hold one distance each, the others grow like its logarithm up to `position_distance`. Looking both ways, each side has half.
//! - `kerple_log`, `kerple_power`, Chi et al. (2022), arXiv 2205.09921: `-r1 log(1 + r2 |i-j|)` and `-r1 |i-j|^r2`, r1 and r2 above 0
//!   (r2 at most 2 in the power form) learned for each head; here through an exponential and a sigmoid.
//! - `fire`, Li et al. (2023), arXiv 2310.04418: a small perceptron of `log(c (i-j) + 1) / log(c max(i, L) + 1)`, c and L learned.
//! - `sandwich`, Chi et al. (2023), arXiv 2212.10356: the inner product of the sinusoids of i and j, times a factor, here learned for
//!   each head.
//! - `rerope`, Su (2023): rotary positions whose distance stops at `position_window`; with `position_group` g it goes on g times
//!   slower instead (leaky). `self_extend`, Jin et al. (2024), arXiv 2401.01325: beyond the window positions are `floor(i / g)`,
//!   moved so that both parts meet. Both have a trained rotary model's weights and are meant for evaluation.
//!
//! - `disentangled`, He et al. (2021), arXiv 2006.03654: products of contents with vectors of distances, see [`disentangled`].
//!
//! Biases of the distance alone are a table, and attention adds them block by block, in memory linear in the length. For `fire`,
//! `disentangled`, `rerope` and `self_extend` the whole matrix of scores is made, sequence by sequence: memory grows with its square.

mod disentangled;
mod fire;
mod xpos;

use std::sync::Arc;

use anyformer_ops::activation::{sigmoid, softmax};
use anyformer_ops::adapter::sequences;
use anyformer_ops::attention::{AttentionOptions, attention_flops, biased_attention};
use anyformer_ops::embedding::embedding;
use anyformer_ops::{Builder, Device, Init, Linear, Param, Tensor, meter};
use serde::{Deserialize, Serialize};

pub use disentangled::Terms;
use disentangled::{Disentangled, Knobs};
use fire::fire;
pub(crate) use xpos::{XPOS_LIMIT, xpos};

/// How attention knows positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// Rotary: queries and keys turned by their position.
    #[default]
    Rope,
    /// A bias that falls linearly with distance, one slope per head.
    Alibi,
    /// Rotary, with scores that decay with distance besides.
    Xpos,
    /// A learned bias for each bucket of distances.
    T5,
    /// A learned bias that falls with the logarithm of the distance.
    KerpleLog,
    /// A learned bias that falls with a power of the distance.
    KerplePower,
    /// A perceptron of the distance over the query's place.
    Fire,
    /// The inner product of sinusoids.
    Sandwich,
    /// Rotary, far keys at one distance or nearly so.
    Rerope,
    /// Rotary, far keys by groups.
    SelfExtend,
    /// Products of queries and keys with a vector for each bucket of distances.
    Disentangled,
    /// None; give the model positions of its own.
    None,
}

/// Inner width of FIRE's perceptron.
const FIRE_HIDDEN: usize = 32;

/// What a scheme needs to know of its mixer.
pub(crate) struct Shape<'a> {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
    pub(crate) buckets: usize,
    pub(crate) distance: usize,
    pub(crate) near: usize,
    pub(crate) group: usize,
    pub(crate) base: f64,
    pub(crate) dim: usize,
    /// Whether there are as many query heads as key heads.
    pub(crate) square: bool,
    pub(crate) terms: Terms,
    pub(crate) shared: bool,
    pub(crate) norm: bool,
    pub(crate) eps: f32,
    /// Whether projections of queries and keys have biases.
    pub(crate) bias: bool,
    pub(crate) builder: &'a Builder,
}

/// A scheme that was built.
pub(crate) enum Scheme {
    T5 {
        /// `[buckets, heads]`.
        table: Param,
        both_ways: bool,
        distance: usize,
    },
    Kerple {
        /// `[heads]`: the logarithm of r1.
        r1: Param,
        /// `[heads]`: of r2 its logarithm or, in the power form, the sigmoid's argument of its half.
        r2: Param,
        power: bool,
    },
    Fire {
        w1: Linear,
        w2: Linear,
        /// `[2]`: logarithms of c and L.
        scales: Param,
    },
    Sandwich {
        /// `[heads]`.
        factor: Param,
        frequencies: Vec<f64>,
    },
    Far {
        inv_freq: Vec<f32>,
        near: usize,
        group: usize,
        extend: bool,
    },
    Disentangled(Disentangled),
}

impl Scheme {
    /// The scheme of a position, where it needs the scores; or what is wrong with it.
    pub(crate) fn new(position: Position, shape: &Shape) -> Result<Option<Self>, String> {
        let Shape {
            heads,
            head_dim,
            causal,
            builder,
            ..
        } = *shape;
        let per_head =
            |name: &str, value: f32| builder.param_no_decay(name, &[heads], Init::Constant(value));
        Ok(Some(match position {
            Position::T5 => {
                let least = if causal { 2 } else { 4 };
                let exact = shape.buckets / least;
                if exact == 0 || !shape.buckets.is_multiple_of(least) || shape.distance <= exact {
                    return Err(format!(
                        "position_buckets {} must be a multiple of {least} and position_distance {} above {exact}",
                        shape.buckets, shape.distance
                    ));
                }
                Scheme::T5 {
                    table: builder.param_no_decay(
                        "position_bias",
                        &[shape.buckets, heads],
                        Init::Normal(0.02),
                    ),
                    both_ways: !causal,
                    distance: shape.distance,
                }
            }
            Position::KerpleLog => Scheme::Kerple {
                r1: per_head("kerple_r1", 0.0),
                r2: per_head("kerple_r2", 0.0),
                power: false,
            },
            Position::KerplePower => Scheme::Kerple {
                r1: per_head("kerple_r1", -2.0),
                r2: per_head("kerple_r2", 0.0),
                power: true,
            },
            Position::Fire => {
                if !causal || shape.window.is_some() {
                    return Err(
                        "fire divides by the query's place: it looks back only and has no window"
                            .into(),
                    );
                }
                let at = builder.at("fire");
                Scheme::Fire {
                    // A bias after the last layer would be the same for every key.
                    w1: Linear::new(&at, "fc1", 1, FIRE_HIDDEN, true),
                    w2: Linear::new(&at, "fc2", FIRE_HIDDEN, heads, false),
                    scales: at.param_no_decay(
                        "scales",
                        &[2],
                        Init::With(Box::new(|_, _| vec![0.1f32.ln(), 512f32.ln()])),
                    ),
                }
            }
            Position::Sandwich => Scheme::Sandwich {
                factor: per_head("sandwich_factor", (head_dim as f32).powf(-0.5)),
                frequencies: (0..head_dim / 2)
                    .map(|pair| 10_000f64.powf(-2.0 * pair as f64 / head_dim as f64))
                    .collect(),
            },
            Position::Rerope | Position::SelfExtend => {
                let extend = position == Position::SelfExtend;
                if shape.near == 0 || extend && shape.group == 0 || !head_dim.is_multiple_of(2) {
                    return Err(format!(
                        "expected position_window above 0, position_group above 0 for self_extend and an even head_dim, got {}, {} and {head_dim}",
                        shape.near, shape.group
                    ));
                }
                Scheme::Far {
                    inv_freq: (0..head_dim / 2)
                        .map(|pair| shape.base.powf(-2.0 * pair as f64 / head_dim as f64) as f32)
                        .collect(),
                    near: shape.near,
                    group: shape.group,
                    extend,
                }
            }
            Position::Disentangled => {
                if !shape.square {
                    return Err("disentangled has a key head for every query head".into());
                }
                let knobs = Knobs {
                    terms: shape.terms,
                    shared: shape.shared,
                    norm: shape.norm,
                    eps: shape.eps,
                    buckets: shape.buckets,
                    distance: shape.distance,
                };
                let sizes = [shape.dim, heads, head_dim];
                Scheme::Disentangled(Disentangled::new(knobs, sizes, shape.bias, builder)?)
            }
            _ => return Ok(None),
        }))
    }

    /// Trainable numbers.
    pub(crate) fn count(&self) -> usize {
        let linear =
            |linear: &Linear| linear.weight.count() + linear.bias.as_ref().map_or(0, Param::count);
        match self {
            Scheme::T5 { table, .. } => table.count(),
            Scheme::Kerple { r1, r2, .. } => r1.count() + r2.count(),
            Scheme::Fire { w1, w2, scales } => linear(w1) + linear(w2) + scales.count(),
            Scheme::Sandwich { factor, .. } => factor.count(),
            Scheme::Far { .. } => 0,
            Scheme::Disentangled(scheme) => scheme.count(),
        }
    }

    /// What scores are multiplied by where it is not one over the root of `width`, the features of a head.
    pub(crate) fn scale(&self, width: usize) -> Option<f32> {
        match self {
            Scheme::Disentangled(scheme) => Some(scheme.scale(width)),
            _ => None,
        }
    }

    /// Operations for a sequence of `time` tokens beside those of attention without positions.
    pub(crate) fn flops(&self, time: usize, width: usize) -> u64 {
        match self {
            Scheme::Disentangled(scheme) => scheme.flops(time, width),
            _ => 0,
        }
    }

    /// As [`anyformer_ops::attention::flash_attention`], with this scheme's scores; `projections` are those of
    /// queries and keys.
    pub(crate) fn attend(
        &self,
        projections: [&Linear; 2],
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        options: &AttentionOptions,
    ) -> Tensor<4> {
        let [batch, time, heads, width] = q.dims();
        let [_, held, kv_heads, _] = k.dims();
        let q_offsets = sequences(options.q_offsets.as_ref(), batch, time);
        let k_offsets = sequences(options.k_offsets.as_ref(), batch, held);
        let scale = options.scale.unwrap_or((width as f32).powf(-0.5));
        let ends = q_offsets.windows(2).zip(k_offsets.windows(2));
        let longest = ends.fold([1, 1], |[queries, keys], (q, k)| {
            [queries.max(q[1] - q[0]), keys.max(k[1] - k[0])]
        });
        if let Some(table) = self.by_distance(heads, longest, &q.device()) {
            return biased_attention([q, k, v], table, longest[0] - 1, options);
        }
        meter::add(attention_flops(
            &q_offsets,
            &k_offsets,
            heads,
            width,
            options.causal,
            options.window,
        ));
        // [heads, places, width] of a sequence.
        let part = |x: &Tensor<4>, range: [usize; 2], count: usize| {
            let [batch, time, own, width] = x.dims();
            let length = range[1] - range[0];
            x.clone()
                .reshape([batch * time, own, 1, width])
                .narrow(0, range[0], length)
                .expand([length, own, count, width])
                .reshape([length, own * count, width])
                .swap_dims(0, 1)
        };
        let pairs = q_offsets.windows(2).zip(k_offsets.windows(2));
        let rows = pairs.filter(|(queries, _)| queries[1] > queries[0]);
        let lengths = rows.clone();
        let lengths = lengths.map(|(queries, keys)| (queries[1] - queries[0], keys[1] - keys[0]));
        let places = match self {
            Scheme::Disentangled(scheme) => Some((scheme, scheme.places(lengths, projections))),
            _ => None,
        };
        let rows = rows.map(|(queries, keys)| {
            let own = part(&q, [queries[0], queries[1]], 1);
            let [k, v] = [&k, &v].map(|x| part(x, [keys[0], keys[1]], heads / kv_heads));
            let (count, length) = (queries[1] - queries[0], keys[1] - keys[0]);
            let scores = match self {
                _ if let Some((scheme, places)) = &places => {
                    let terms = scheme.terms(places, &own, &k);
                    (own.matmul(k.swap_dims(1, 2)) + terms).mul_scalar(scale)
                }
                Scheme::Fire { w1, w2, scales } => {
                    let products = own.matmul(k.swap_dims(1, 2)).mul_scalar(scale);
                    products + fire(w1, w2, scales, heads, count, length, &q.device())
                }
                _ => self.far(own, k, count, length).mul_scalar(scale),
            };
            let allowed = forbidden(count, length, options, &q.device());
            softmax(scores + allowed).matmul(v).swap_dims(0, 1)
        });
        let value_dim = v.dims()[3];
        Tensor::cat(rows.collect(), 0).reshape([batch, time, heads, value_dim])
    }

    /// A number for each head and distance, `[heads, distances]` from `1 - queries` (the key later) up to `keys - 1`; none
    /// where it is not the distance alone that counts.
    fn by_distance(
        &self,
        heads: usize,
        [queries, keys]: [usize; 2],
        device: &Device,
    ) -> Option<Tensor<2>> {
        let distances: Vec<i64> = (1 - queries as i64..keys as i64).collect();
        let count = distances.len();
        let table = match self {
            Scheme::Fire { .. } | Scheme::Far { .. } | Scheme::Disentangled(_) => return None,
            Scheme::T5 {
                table,
                both_ways,
                distance,
            } => {
                let buckets = table.shape()[0];
                let ids = distances
                    .iter()
                    .map(|at| bucket(*at, buckets, *both_ways, *distance) as u32);
                embedding(table.tensor::<2>(), Arc::new(ids.collect()), [1, count])
                    .reshape([count, heads])
            }
            Scheme::Kerple { r1, r2, power } => {
                let far = |at: &i64| at.unsigned_abs() as f32;
                let far: Vec<f32> = distances.iter().map(far).collect();
                let far = Tensor::<1>::from_data(far.as_slice(), device).reshape([count, 1]);
                let row = |param: &Param| param.tensor::<1>().reshape([1, heads]);
                let falls = match power {
                    false => (row(r2).exp() * far + 1.0).log(),
                    // The power of zero is zero, with no gradient of its own.
                    true => {
                        let there = far.clone().clamp_max(1.0);
                        ((far.clamp_min(1.0).log()) * (sigmoid(row(r2)) * 2.0)).exp() * there
                    }
                };
                (row(r1).exp() * falls).neg()
            }
            Scheme::Sandwich {
                factor,
                frequencies,
            } => {
                let product = |at: &i64| -> f32 {
                    let cosines = frequencies.iter().map(|turn| (*at as f64 * turn).cos());
                    cosines.sum::<f64>() as f32
                };
                let products: Vec<f32> = distances.iter().map(product).collect();
                let products = Tensor::<1>::from_data(products.as_slice(), device);
                products.reshape([count, 1]) * factor.tensor::<1>().reshape([1, heads])
            }
        };
        Some(table.swap_dims(0, 1))
    }

    /// Rotary scores, near and far pairs apart: `[heads, queries, keys]`, without the scale.
    fn far(&self, q: Tensor<3>, k: Tensor<3>, queries: usize, keys: usize) -> Tensor<3> {
        let Scheme::Far {
            inv_freq,
            near,
            group,
            extend,
        } = self
        else {
            unreachable!("called for this scheme only")
        };
        let turned = |x: &Tensor<3>, places: &[f64]| turn(x, places, inv_freq);
        let scores = |queries: &[f64], keys: &[f64]| {
            turned(&q, queries).matmul(turned(&k, keys).swap_dims(1, 2))
        };
        let at = |query: usize| (keys - queries + query) as f64;
        let here: Vec<f64> = (0..queries).map(at).collect();
        let there: Vec<f64> = (0..keys).map(|key| key as f64).collect();
        let close = scores(&here, &there);
        let near = *near as f64;
        let (here, there): (Vec<f64>, Vec<f64>) = match (*extend, *group as f64) {
            (true, group) => {
                let shift = near - (near / group).floor();
                let query = |at: &f64| (at / group).floor() + shift;
                let key = |at: &f64| (at / group).floor();
                (
                    here.iter().map(query).collect(),
                    there.iter().map(key).collect(),
                )
            }
            // Every far key at one distance.
            (false, 0.0) => (vec![near; queries], vec![0.0; keys]),
            (false, group) => {
                let query = |at: &f64| at / group + near - near / group;
                let key = |at: &f64| at / group;
                (
                    here.iter().map(query).collect(),
                    there.iter().map(key).collect(),
                )
            }
        };
        let apart = scores(&here, &there);
        let choice = (0..queries * keys).map(|place| {
            let distance = at(place / keys) - (place % keys) as f64;
            f32::from(u8::from(distance < near))
        });
        let choice: Vec<f32> = choice.collect();
        let close_ones = Tensor::<1>::from_data(choice.as_slice(), &q.device());
        let close_ones = close_ones.reshape([1, queries, keys]);
        close * close_ones.clone() + apart * (close_ones.neg() + 1.0)
    }
}

/// Turns x `[heads, places, width]` by places that need not be whole, in the half-split layout.
fn turn(x: &Tensor<3>, places: &[f64], inv_freq: &[f32]) -> Tensor<3> {
    let half = inv_freq.len();
    let table = |wave: fn(f64) -> f64| {
        let angles = places.iter().flat_map(|at| {
            inv_freq
                .iter()
                .map(move |turn| wave(at * f64::from(*turn)) as f32)
        });
        let values: Vec<f32> = angles.collect();
        Tensor::<1>::from_data(values.as_slice(), &x.device()).reshape([1, places.len(), half])
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let [low, high] = [0, half].map(|from| x.clone().narrow(2, from, half));
    let first = low.clone() * cos.clone() - high.clone() * sin.clone();
    Tensor::cat(vec![first, high * cos + low * sin], 2)
}

/// 0 where a query may see a key, else far below every score: `[1, queries, keys]`.
fn forbidden(
    queries: usize,
    keys: usize,
    options: &AttentionOptions,
    device: &Device,
) -> Tensor<3> {
    let value = |at: usize| {
        let distance = (keys - queries + at / keys) as i64 - (at % keys) as i64;
        let late = options.causal && distance < 0;
        let far = options
            .window
            .is_some_and(|window| distance.unsigned_abs() as usize >= window);
        if late || far { -1e30 } else { 0.0 }
    };
    let values: Vec<f32> = (0..queries * keys).map(value).collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape([1, queries, keys])
}

/// The bucket of a distance `i - j`.
fn bucket(distance: i64, buckets: usize, both_ways: bool, longest: usize) -> usize {
    let (mut first, mut buckets) = (0, buckets);
    let mut back = distance.max(0) as usize;
    if both_ways {
        buckets /= 2;
        back = distance.unsigned_abs() as usize;
        if distance < 0 {
            first = buckets;
        }
    }
    let exact = buckets / 2;
    if back < exact {
        return first + back;
    }
    let part = (back as f64 / exact as f64).ln() / (longest as f64 / exact as f64).ln();
    first + (exact + (part * (buckets - exact) as f64) as usize).min(buckets - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_the_paper() {
        // One way, 32 buckets up to 128: 16 exact ones, then logarithms.
        assert_eq!(bucket(-3, 32, false, 128), 0);
        assert_eq!(bucket(15, 32, false, 128), 15);
        assert_eq!(bucket(16, 32, false, 128), 16);
        assert_eq!(bucket(127, 32, false, 128), 31);
        assert_eq!(bucket(5000, 32, false, 128), 31);
        // Both ways: half of them each.
        assert_eq!(bucket(7, 32, true, 128), 7);
        assert_eq!(bucket(-7, 32, true, 128), 16 + 7);
        assert_eq!(bucket(-500, 32, true, 128), 31);
    }
}
