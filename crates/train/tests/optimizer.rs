//! The optimiser against its equation, written as a loop in f64.

mod common;

use anyformer_ops::{Builder, Device, Init};
use anyformer_train::{AdamW, TrainConfig};
use common::mix;

fn noise(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u64)
        .map(|index| (mix(seed << 20 ^ index) >> 40) as f32 / (1 << 23) as f32 - 1.0)
        .collect()
}

#[test]
fn adamw_is_its_equation_with_groups_clipping_and_accumulation() {
    let config = TrainConfig {
        lr: 0.02,
        weight_decay: 0.3,
        clip: 0.5,
        ..TrainConfig::default()
    };
    let builder = Builder::new(&Device::flex().autodiff(), 0);
    let count = 21;
    let make = |seed: u64| Init::With(Box::new(move |_, count| noise(seed, count)));
    let decays = builder.param("weight", &[3, 7], make(1));
    let stays = builder.param_no_decay("bias", &[count], make(2));
    let buffer = builder.buffer("table", &[2], Init::Ones);
    let mut optimizer = AdamW::new(&builder.store());
    let params = [&decays, &stays];
    let mut naive: Vec<[Vec<f64>; 3]> = params
        .iter()
        .map(|param| {
            [
                param.values().iter().map(|v| f64::from(*v)).collect(),
                vec![0.0; count],
                vec![0.0; count],
            ]
        })
        .collect();
    for step in 1..=5u64 {
        // Two batches of 3 and 1 places, losses sum(p * c): their gradients are c.
        let mut sum = optimizer.gradient();
        let mut mean = vec![vec![0.0; count]; 2];
        for (batch, places) in [(0, 3.0), (1, 1.0)] {
            let factors: Vec<Vec<f32>> = (0..2)
                .map(|which| noise(step * 10 + batch * 2 + which + 50, count))
                .collect();
            let term = |which: usize| {
                let factor = anyformer_ops::Tensor::<1>::from_data(
                    factors[which].as_slice(),
                    &builder.store().device(),
                );
                match which {
                    0 => (decays.tensor::<2>().reshape([count]) * factor).sum(),
                    _ => (stays.tensor::<1>() * factor).sum(),
                }
            };
            let mut gradients = (term(0) + term(1)).backward();
            optimizer.accumulate(&mut sum, &mut gradients, places);
            for (mean, factors) in mean.iter_mut().zip(&factors) {
                mean.iter_mut()
                    .zip(factors)
                    .for_each(|(mean, factor)| *mean += places * f64::from(*factor) / 4.0);
            }
        }
        let norm = mean
            .iter()
            .flatten()
            .map(|value| value * value)
            .sum::<f64>()
            .sqrt();
        assert!((sum.norm() - norm).abs() < 1e-5 * norm && norm > config.clip);
        assert_eq!(optimizer.first_not_finite(&sum), None);
        optimizer.update(&sum, sum.norm(), config.lr, &config);
        for (index, [values, first, second]) in naive.iter_mut().enumerate() {
            let decay = if index == 0 { config.weight_decay } else { 0.0 };
            for place in 0..count {
                let gradient = mean[index][place] * config.clip / norm;
                let [beta1, beta2] = config.betas;
                first[place] = beta1 * first[place] + (1.0 - beta1) * gradient;
                second[place] = beta2 * second[place] + (1.0 - beta2) * gradient * gradient;
                let power = step as i32;
                let direction = first[place]
                    / (1.0 - beta1.powi(power))
                    / ((second[place] / (1.0 - beta2.powi(power))).sqrt() + config.eps);
                values[place] -= config.lr * (direction + decay * values[place]);
            }
        }
    }
    for (param, [values, ..]) in params.iter().zip(&naive) {
        for (got, want) in param.values().iter().zip(values) {
            assert!(
                (f64::from(*got) - want).abs() < 2e-5,
                "{}: {got} {want}",
                param.name()
            );
        }
    }
    assert_eq!(buffer.values(), [1.0, 1.0]);
    let names: Vec<String> = optimizer
        .tensors()
        .into_iter()
        .map(|tensor| tensor.name)
        .collect();
    assert_eq!(
        names,
        [
            "weight.first_moment",
            "weight.second_moment",
            "bias.first_moment",
            "bias.second_moment"
        ]
    );
    let mut tensors = optimizer.tensors();
    tensors.pop();
    let error = AdamW::new(&builder.store())
        .restore(5, tensors)
        .unwrap_err();
    assert!(error.contains("bias.second_moment is missing"), "{error}");
}
