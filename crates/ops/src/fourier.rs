//! The real part of a Fourier transform over time and features as an op; see [`anyformer_kernels::fourier`].
//!
//! Composed, with `a b = time`, a the largest divisor up to the root, the transform over time is done in two steps of a and b
//! points (Cooley and Tukey) with factors `exp(-2 pi i k n / time)` between them, each step a matrix product; a prime length is one
//! product.

use anyformer_kernels::fourier as kernel;
use burn::tensor::{Device, Tensor};

use crate::activation::{only, output, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, on_cpu};
use crate::meter;

/// Operations of [`real_part`] over a sequence, a transform of n values counted as `2.5 n log2 n`.
pub fn real_part_flops(time: usize, dim: usize) -> u64 {
    kernel::flops(time, dim)
}

/// `Re(F_time(F_dim(x)))` for `x [batch, time, dim]`: fast transforms on the CPU, elsewhere products of time `time (a + b)`.
pub fn real_part(x: Tensor<3>) -> Tensor<3> {
    let [batch, time, dim] = x.dims();
    meter::add(batch as u64 * kernel::flops(time, dim));
    match on_cpu(&x) {
        true => single(RealPart, [erase(x)]),
        false => composed(x),
    }
}

#[derive(Debug)]
struct RealPart;

fn sizes(x: View) -> [usize; 3] {
    match *x.shape {
        [batch, time, dim] => [batch, time, dim],
        _ => panic!("a transform of a tensor of rank 3"),
    }
}

impl Kernel for RealPart {
    fn reads_again(&self, _input: usize) -> bool {
        false
    }

    fn flops(&self, inputs: &[View]) -> [u64; 2] {
        let [batch, time, dim] = sizes(inputs[0]);
        [batch as u64 * kernel::flops(time, dim); 2]
    }

    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let x = inputs[0];
        output(x.shape, kernel::real_part(x.data, sizes(x)))
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let x = inputs[0];
        vec![Some(Array::new(
            x.shape,
            kernel::real_part(only(grads).data, sizes(x)),
        ))]
    }
}

/// `cos` and `sin` of `2 pi i j / points`, `[rows, columns]`.
fn turns(rows: usize, columns: usize, points: usize, device: &Device) -> [Tensor<2>; 2] {
    let angle = |step: usize| std::f64::consts::TAU * step as f64 / points as f64;
    let table = |of: fn(f64) -> f64| -> Tensor<2> {
        let circle: Vec<f32> = (0..points).map(|step| of(angle(step)) as f32).collect();
        let values: Vec<f32> = (0..rows * columns)
            .map(|at| circle[(at / columns) * (at % columns) % points])
            .collect();
        Tensor::<1>::from_data(values.as_slice(), device).reshape([rows, columns])
    };
    [table(f64::cos), table(f64::sin)]
}

/// The largest divisor of `time` up to its root, and the other factor.
fn factors(time: usize) -> [usize; 2] {
    let divisors = (1..).take_while(|a| a * a <= time);
    let a = divisors.filter(|a| time.is_multiple_of(*a)).last();
    let a = a.unwrap_or(1);
    [a, time / a]
}

fn composed(x: Tensor<3>) -> Tensor<3> {
    let ([batch, time, dim], device) = (x.dims(), x.device());
    let [a, b] = factors(time);
    // Over the features: real to complex.
    let [cos, sin] = turns(dim, dim, dim, &device);
    let flat = x.reshape([batch * time, dim]);
    let mut re = flat.clone().matmul(cos).reshape([batch, a, b * dim]);
    let mut im = flat.matmul(sin).neg().reshape([batch, a, b * dim]);
    if a > 1 {
        let [cos, sin] = turns(a, a, a, &device).map(|t| t.unsqueeze::<3>().expand([batch, a, a]));
        let turned = cos.clone().matmul(re.clone()) + sin.clone().matmul(im.clone());
        im = cos.matmul(im) - sin.matmul(re);
        re = turned;
        let [cos, sin] =
            turns(a, b, time, &device).map(|t| t.reshape([1, a, b, 1]).expand([1, a, b, dim]));
        let [cos, sin] = [cos, sin].map(|t| t.reshape([1, a, b * dim]));
        let turned = re.clone() * cos.clone() + im.clone() * sin.clone();
        im = im * cos - re * sin;
        re = turned;
    }
    let grid = |x: Tensor<3>| x.reshape([batch, a, b, dim]);
    let [cos, sin] = turns(b, b, b, &device).map(|t| t.unsqueeze::<4>().expand([batch, a, b, b]));
    let y: Tensor<4> = cos.matmul(grid(re)) + sin.matmul(grid(im));
    y.swap_dims(1, 2).reshape([batch, time, dim])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{agree, values};

    #[test]
    fn the_kernel_agrees_with_the_composed_form() {
        for [batch, time, dim] in [[2, 1, 3], [1, 7, 4], [2, 12, 5], [1, 64, 6]] {
            let count = batch * time * dim;
            agree("real part", 1e-4, &[values(1, count)], |x| {
                real_part(x[0].clone().reshape([batch, time, dim])).reshape([count])
            });
        }
    }
}
