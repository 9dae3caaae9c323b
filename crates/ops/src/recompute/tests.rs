use super::*;
use crate::activation::activate;
use crate::check::values;
use crate::{Builder, Device, Linear, tensor_values};
use anyformer_kernels::activation::Activation;

const SHAPE: [usize; 3] = [2, 3, 4];

fn input(seed: u64) -> Tensor<3> {
    let device = Device::flex().autodiff();
    let x = Tensor::<1>::from_data(values(seed, 24).as_slice(), &device);
    x.reshape(SHAPE).require_grad()
}

/// A layer with a function that bends, and a loss of its own.
fn layer(builder: &Builder, name: &str) -> Function<String> {
    let linear = Linear::new(builder, name, 4, 4, true);
    Arc::new(move |x: Tensor<3>| {
        let y = activate(linear.forward(x), Activation::Silu);
        let loss = (y.clone() * y.clone()).mean();
        Ok(Given {
            y,
            loss: Some(loss),
        })
    })
}

/// Outputs, and the gradients of the streams and of every parameter.
fn run(
    builder: &Builder,
    work: impl Fn([Tensor<3>; 2]) -> ([Tensor<3>; 2], Option<Tensor<1>>),
) -> Vec<Vec<f32>> {
    let streams = [input(1), input(2)];
    let ([a, b], loss) = work(streams.clone());
    let mut all = vec![tensor_values(a.clone()), tensor_values(b.clone())];
    let loss = loss.expect("losses");
    all.push(tensor_values(loss.clone()));
    let total = (a * input(3)).sum() + (b.clone() * b).sum() + loss * 0.7;
    let mut grads = total.backward();
    for x in streams {
        all.push(tensor_values(x.grad(&grads).expect("tracked")));
    }
    for param in builder.store().params() {
        all.push(param.gradient(&mut grads).expect("took part"));
    }
    all
}

fn close(got: &[Vec<f32>], want: &[Vec<f32>]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() < 1e-5 * (1.0 + want.abs()),
                "{got} {want}"
            );
        }
    }
}

#[test]
fn what_is_run_again_has_the_gradients_of_what_is_kept() {
    let builder = Builder::new(&Device::flex().autodiff(), 5);
    let (f, g) = (layer(&builder, "f"), layer(&builder, "g"));
    // f twice: a parameter of two layers.
    let functions = [(0, f.clone()), (1, g.clone()), (0, f.clone())];
    let whole = run(&builder, |x| added(x, &functions).expect("runs"));
    let back = run(&builder, |x| reversible(x, &functions).expect("runs"));
    close(&back, &whole);
    let again = run(&builder, |x| {
        let wrapped = functions.clone().map(|(to, function)| {
            let again: Function<String> = Arc::new(move |x| recomputed(x, &function));
            (to, again)
        });
        // Functions run again inside of functions run again.
        let inner = reversible(x.clone(), &wrapped).expect("runs");
        let outer = added(x, &wrapped).expect("runs");
        for (inner, outer) in inner.0.iter().zip(&outer.0) {
            assert_eq!(tensor_values(inner.clone()), tensor_values(outer.clone()));
        }
        inner
    });
    close(&again, &whole);
    let one = run(&builder, |x| {
        let wrapped = functions.clone().map(|(to, function)| {
            let again: Function<String> = Arc::new(move |x| recomputed(x, &function));
            (to, again)
        });
        added(x, &wrapped).expect("runs")
    });
    close(&one, &whole);
}

#[test]
fn choices_are_made_once() {
    use std::sync::atomic::{AtomicU32, Ordering};
    let made = Arc::new(AtomicU32::new(0));
    let chosen = made.clone();
    // Another choice every time it is asked.
    let scaled: Function<String> = Arc::new(move |x| {
        let choice = decided(|| vec![1 + chosen.fetch_add(1, Ordering::Relaxed)]);
        Ok(Given {
            y: x * f64::from(choice[0]),
            loss: None,
        })
    });
    let inner = scaled.clone();
    let nested: Function<String> = Arc::new(move |x| recomputed(x, &inner));
    for (function, factor) in [(scaled, 1.0), (nested, 2.0)] {
        let x = input(1);
        let ([_, b], _) = reversible([x.clone(), input(2)], &[(1, function)]).expect("runs");
        let grads = b.sum().backward();
        let dx = tensor_values(x.grad(&grads).expect("tracked"));
        assert!(dx.iter().all(|dx| *dx == factor), "{dx:?}");
        assert_eq!(made.load(Ordering::Relaxed), factor as u32);
    }
}

#[test]
fn errors_come_back_and_leave_no_run_behind() {
    let fails: Function<String> = Arc::new(|_| Err("no".into()));
    assert_eq!(recomputed(input(1), &fails).expect_err("fails"), "no");
    let streams = [input(1), input(2)];
    assert!(reversible(streams, &[(0, fails)]).is_err());
    assert!(!off_record());
    let builder = Builder::new(&Device::flex().autodiff(), 5);
    let weight = Linear::new(&builder, "a", 2, 2, false).weight.tensor::<2>();
    assert!(weight.device().is_autodiff());
}
