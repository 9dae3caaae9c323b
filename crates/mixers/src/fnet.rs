//! FNet: the real part of a discrete Fourier transform over time and features, in place of attention.
//!
//! Lee-Thorp et al. (2022), arXiv 2105.03824: `y = Re(F_time(F_dim(x)))`, no parameters. On the CPU by fast transforms. Elsewhere, with `a b = time`, a the largest
//! divisor up to the root, the transform over time is done in two steps of a and b points (Cooley and Tukey) with
//! factors `exp(-2 pi i k n / time)` between them, each step a matrix product; a prime length is one product.

use anyformer_ops::adapter::on_cpu;
use anyformer_ops::fourier::{real_part, real_part_flops};
use anyformer_ops::{Device, Tensor, meter};
use serde::{Deserialize, Serialize};

use crate::card::{Card, Direction, Knob, TokenEntry, read, resolve};
use crate::mixer::{Context, Cost, RunError, State, TokenMixer};
use crate::parts::each_sequence;

/// Knobs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FnetConfig {
    /// Divide by `sqrt(time dim)`, so that the transform keeps lengths.
    pub ortho: bool,
}

static CARD: Card = Card {
    name: "fnet",
    title: "FNet",
    paper: "Lee-Thorp, Ainslie, Eckstein, Ontanon: FNet: Mixing Tokens with Fourier Transforms (NAACL 2022), arXiv 2105.03824",
    equation: "y = Re(F_time(F_dim(x))), F the discrete Fourier transform",
    direction: Direction::Bidirectional,
    streams: false,
    state: "none",
    notes: "No parameters: the channel mixer does all the learning. Every output depends on every input, so it can be neither causal nor streamed. As published the transform is not scaled and grows as sqrt(time dim); ortho divides that out. time log time; on other devices than the CPU lengths with divisors near the root cost time (a + b), a prime length time squared.",
    knobs: &[Knob {
        name: "ortho",
        doc: "divide by sqrt(time dim)",
    }],
    presets: &[],
};

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: |options| resolve::<FnetConfig>(&CARD, options),
    build: |dim, options, _| {
        let config: FnetConfig = read(&CARD, options)?;
        Ok(Box::new(Fnet { dim, config }))
    },
};

struct Fnet {
    dim: usize,
    config: FnetConfig,
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

impl Fnet {
    /// One dense batch `[batch, time, dim]`.
    fn dense(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, dim] = x.dims();
        let device = x.device();
        if on_cpu(&x) {
            return self.scaled(real_part(x));
        }
        // The same number for every way.
        meter::add(real_part_flops(time, dim) * batch as u64);
        let [a, b] = factors(time);
        // Over the features: real to complex.
        let [cos, sin] = turns(dim, dim, dim, &device);
        let flat = x.reshape([batch * time, dim]);
        let mut re = flat.clone().matmul(cos).reshape([batch, a, b * dim]);
        let mut im = flat.matmul(sin).neg().reshape([batch, a, b * dim]);
        if a > 1 {
            let [cos, sin] =
                turns(a, a, a, &device).map(|t| t.unsqueeze::<3>().expand([batch, a, a]));
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
        let [cos, sin] =
            turns(b, b, b, &device).map(|t| t.unsqueeze::<4>().expand([batch, a, b, b]));
        let y: Tensor<4> = cos.matmul(grid(re)) + sin.matmul(grid(im));
        self.scaled(y.swap_dims(1, 2).reshape([batch, time, dim]))
    }

    fn scaled(&self, y: Tensor<3>) -> Tensor<3> {
        let [_, time, dim] = y.dims();
        match self.config.ortho {
            true => y.mul_scalar(((time * dim) as f32).powf(-0.5)),
            false => y,
        }
    }
}

impl TokenMixer for Fnet {
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<(Tensor<3>, Option<State>), RunError> {
        each_sequence(CARD.name, x, context, state, |x| Ok(self.dense(x)))
    }

    fn cost(&self, time: usize) -> Cost {
        Cost {
            flops: real_part_flops(time, self.dim),
            ..Cost::default()
        }
    }
}
