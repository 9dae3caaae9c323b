use super::*;
use burn::tensor::Distribution;

/// y = a * b (elementwise), s = sum over the last dimension of a; saves nothing.
#[derive(Debug)]
struct ProductAndSum;

impl Kernel for ProductAndSum {
    fn forward(&self, inputs: &[View], _save: bool) -> Forward {
        let (a, b) = (inputs[0], inputs[1]);
        let last = a.shape[a.shape.len() - 1];
        let product = a.data.iter().zip(b.data).map(|(a, b)| a * b).collect();
        let sums = a.data.chunks(last).map(|row| row.iter().sum()).collect();
        Forward {
            outputs: vec![
                Array::new(a.shape, product),
                Array::new(&a.shape[..a.shape.len() - 1], sums),
            ],
            saved: vec![],
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        _saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let (a, b) = (inputs[0], inputs[1]);
        let last = a.shape[a.shape.len() - 1];
        let gy = or_zeros(grads[0], a.data.len());
        let mut da: Vec<f32> = gy.iter().zip(b.data).map(|(g, b)| g * b).collect();
        if let Some(gs) = grads[1] {
            for (row, g) in da.chunks_mut(last).zip(gs.data) {
                row.iter_mut().for_each(|v| *v += g);
            }
        }
        let db = gy.iter().zip(a.data).map(|(g, a)| g * a).collect();
        vec![Some(Array::new(a.shape, da)), Some(Array::new(b.shape, db))]
    }
}

fn fused(a: Tensor<2>, b: Tensor<2>) -> (Tensor<2>, Tensor<1>) {
    let mut out = apply(ProductAndSum, [erase(a), erase(b)]).into_iter();
    let (Some(y), Some(s)) = (out.next(), out.next()) else {
        panic!("two outputs")
    };
    (y.into_tensor(), s.into_tensor())
}

fn composed(a: Tensor<2>, b: Tensor<2>) -> (Tensor<2>, Tensor<1>) {
    (a.clone() * b, a.sum_dim(1).squeeze_dim(1))
}

#[test]
fn gradients_equal_the_composed_form_whichever_outputs_are_used() {
    let device = Device::flex().autodiff();
    device.seed(3);
    let normal = Distribution::Normal(0.0, 1.0);
    let a = Tensor::<2>::random([5, 3], normal, &device).require_grad();
    let b = Tensor::<2>::random([3, 5], normal, &device).require_grad();
    for mode in 0..4 {
        let results: Vec<Vec<f32>> = [fused as fn(_, _) -> _, composed]
            .into_iter()
            .map(|op| {
                // The transposed operand is not contiguous.
                let (y, s): (Tensor<2>, Tensor<1>) = op(a.clone(), b.clone().transpose());
                let loss = match mode {
                    0 => y.powi_scalar(2).sum() + s.powi_scalar(2).sum(),
                    1 => y.powi_scalar(2).sum(),
                    2 => s.powi_scalar(2).sum(),
                    _ => (y * s.unsqueeze_dim(1).tanh()).sum(),
                };
                let grads = loss.backward();
                let mut values = loss.inner().into_data().try_to_vec::<f32>().expect("f32");
                for grad in [a.grad(&grads), b.grad(&grads)] {
                    match grad {
                        Some(grad) => {
                            values.extend(grad.into_data().try_to_vec::<f32>().expect("f32"))
                        }
                        None => values.extend([0.0; 15]),
                    }
                }
                values
            })
            .collect();
        for (got, want) in results[0].iter().zip(&results[1]) {
            assert!((got - want).abs() < 1e-5, "mode {mode}: {got} vs {want}");
        }
    }
}

#[test]
fn untracked_and_mixed_inputs_run() {
    let plain = Device::flex();
    let a = Tensor::<2>::ones([2, 3], &plain);
    let (y, s) = fused(a.clone(), a.clone() * 2.0);
    assert_eq!(y.sum().into_scalar::<f32>(), 12.0);
    assert_eq!(s.sum().into_scalar::<f32>(), 6.0);
    let w = Tensor::<2>::ones([2, 3], &plain.autodiff()).require_grad();
    let (y, _) = fused(w.clone(), a * 3.0);
    let grads = y.sum().backward();
    let grad = w.grad(&grads).expect("tracked");
    assert_eq!(grad.sum().into_scalar::<f32>(), 18.0);
}
