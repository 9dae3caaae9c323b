//! A right operand that is packed once and multiplied with many times: the weight of a linear layer, for inference.

use super::Precision;
#[cfg(target_arch = "x86_64")]
use super::{Finish, Level, blocked, pack, tile::WIDTH};
use crate::activation::Activation;
#[cfg(target_arch = "x86_64")]
use crate::gemm::Matrix;

/// A weight `[out, in]` in panels: the same bytes in the order in which a product reads them. Only made where AVX-512 is (for
/// bf16 AVX512-BF16), elsewhere a product packs for itself.
#[derive(Debug)]
pub struct Panelled {
    #[cfg(target_arch = "x86_64")]
    panels: pack::Panels,
    precision: Precision,
    shape: [usize; 2],
}

impl Panelled {
    /// Packs contiguous rows of a weight `[out, in]`; `None` where this machine's product does not take it so.
    ///
    /// Panics when the weight has another size.
    pub fn new(precision: Precision, shape: [usize; 2], weight: &[f32]) -> Option<Self> {
        let [out, width] = shape;
        assert_eq!(weight.len(), out * width, "a weight of {out} x {width}");
        #[cfg(target_arch = "x86_64")]
        if Level::best(precision) == Level::Avx512 && !weight.is_empty() {
            let rows = Matrix::rows(weight, width);
            let side = pack::Side::new(precision, out, width, rows, WIDTH);
            let mut panels = pack::Panels::new(out, side.units(), WIDTH);
            panels.fill(&side, 0..out, 0..side.units(), true);
            return Some(Panelled {
                panels,
                precision,
                shape,
            });
        }
        None
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// What the values were rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The values as contiguous rows, in f32 those that were packed.
    pub fn rows(&self) -> Vec<f32> {
        let [out, width] = self.shape;
        let mut values = vec![0.0; out * width];
        #[cfg(target_arch = "x86_64")]
        self.panels.unpack(self.precision, self.shape, &mut values);
        values
    }

    /// `f(x Wᵀ + b)` for contiguous x `[rows, in]`, f and b where they are given; a new `[rows, out]`.
    ///
    /// Panics when x or the bias has another size.
    pub fn product(
        &self,
        rows: usize,
        x: &[f32],
        bias: Option<&[f32]>,
        then: Option<Activation>,
    ) -> Vec<f32> {
        let [out, width] = self.shape;
        assert_eq!(x.len(), rows * width, "the input of a product");
        if let Some(bias) = bias {
            assert_eq!(bias.len(), out, "the bias of a product of {rows} x {out}");
        }
        let mut y = Vec::with_capacity(rows * out);
        #[cfg(target_arch = "x86_64")]
        {
            let a = Matrix::rows(x, width);
            let right = blocked::Right::Held(&self.panels);
            let size = [rows, width, out];
            let finish = Finish { add: false, bias };
            // SAFETY: sizes were checked, AVX-512 when the weight was packed; without `add` nothing is read from `y`, and every
            // element of it is written.
            unsafe {
                blocked::multiply(self.precision, size, a, right, y.as_mut_ptr(), finish, then);
                y.set_len(rows * out);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        y.resize(rows * out, 0.0);
        y
    }
}

#[cfg(test)]
mod tests {
    use super::super::product;
    use super::*;
    use crate::gemm::Matrix;
    use crate::testing::{assert_close, rand_vec};

    #[test]
    fn a_packed_weight_gives_the_product_of_the_weight() {
        for precision in [Precision::F32, Precision::Bf16] {
            for [rows, width, out] in [
                [1, 5, 3],
                [7, 700, 70],
                [64, 96, 200],
                [65, 513, 33],
                [300, 40, 100],
                [500, 300, 31],
            ] {
                let (x, weight, bias) = (
                    rand_vec(1, rows * width),
                    rand_vec(2, out * width),
                    rand_vec(3, out),
                );
                let Some(held) = Panelled::new(precision, [out, width], &weight) else {
                    return;
                };
                let got = held.product(rows, &x, Some(&bias), Some(Activation::Relu));
                let (a, b) = (
                    Matrix::rows(&x, width),
                    Matrix::rows(&weight, width).transposed(),
                );
                let mut want = product(precision, [rows, width, out], a, b, Some(&bias));
                want.iter_mut().for_each(|value| *value = value.max(0.0));
                assert_close("held", &got, &want, 2e-5);
                match precision {
                    Precision::F32 => assert_eq!(held.rows(), weight),
                    Precision::Bf16 => assert_close("rounded", &held.rows(), &weight, 1e-2),
                }
            }
        }
    }
}
