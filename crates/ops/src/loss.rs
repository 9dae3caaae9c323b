//! Mean cross entropy of logits against integer targets.
#![allow(unsafe_code)]

use std::sync::{Arc, OnceLock};

use anyformer_kernels::cross_entropy as kernel;
pub use anyformer_kernels::cross_entropy::IGNORE;
use burn::tensor::{Int, Tensor, TensorData, activation};

use crate::activation::{only, single};
use crate::adapter::{Array, Forward, Kernel, View, erase, filled, on_cpu};

/// Result of [`cross_entropy`].
#[derive(Clone, Debug)]
pub struct Loss {
    /// `[1]`: mean over the counted rows, in nats; 0 when no row counts.
    pub loss: Tensor<1>,
    /// Rows whose target is not [`IGNORE`].
    pub counted: usize,
    /// Counted rows whose largest logit is the target's.
    pub correct: usize,
}

#[derive(Debug)]
struct CrossEntropy {
    targets: Arc<Vec<i64>>,
    /// Filled by the forward: counted and correct rows.
    counts: Arc<OnceLock<(usize, usize)>>,
}

impl Kernel for CrossEntropy {
    fn forward(&self, inputs: &[View], save: bool) -> Forward {
        let logits = inputs[0];
        let mut lse = vec![0.0; logits.shape[0]];
        let result = kernel::cross_entropy(logits.shape[1], logits.data, &self.targets, &mut lse);
        self.counts.get_or_init(|| (result.counted, result.correct));
        let rows = lse.len();
        Forward {
            outputs: vec![Array::new([1], vec![result.loss])],
            saved: if save {
                vec![Array::new([rows], lse)]
            } else {
                vec![]
            },
        }
    }

    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>> {
        let logits = inputs[0];
        let counted = self.counts.get().map_or(1, |counts| counts.0.max(1));
        let scale = only(grads).data[0] / counted as f32;
        let fill = |dlogits: &mut [f32]| {
            let (classes, lse) = (logits.shape[1], saved[0].data);
            kernel::cross_entropy_backward(
                classes,
                logits.data,
                &self.targets,
                lse,
                scale,
                dlogits,
            );
        };
        // SAFETY: the kernel writes every value, zeros in the rows that do not count.
        let dlogits = unsafe { filled(logits.data.len(), fill) };
        vec![Some(Array::new(logits.shape, dlogits))]
    }
}

/// Mean cross entropy of logits `[rows, classes]` against one target per row. Rows whose target is [`IGNORE`] do not
/// count.
///
/// Panics when a target is neither [`IGNORE`] nor in `0..classes`: data loaders check theirs.
pub fn cross_entropy(logits: Tensor<2>, targets: Arc<Vec<i64>>) -> Loss {
    let [rows, classes] = logits.dims();
    assert_eq!(rows, targets.len(), "cross entropy: one target per row");
    if on_cpu(&logits) {
        let counts = Arc::new(OnceLock::new());
        let kernel = CrossEntropy {
            targets,
            counts: counts.clone(),
        };
        let loss = single(kernel, [erase(logits)]);
        let (counted, correct) = counts.get().copied().unwrap_or_default();
        return Loss {
            loss,
            counted,
            correct,
        };
    }
    composed(logits, &targets, classes)
}

fn composed(logits: Tensor<2>, targets: &[i64], classes: usize) -> Loss {
    let rows = targets.len();
    let device = logits.device();
    for target in targets {
        assert!(
            *target == IGNORE || (0..classes as i64).contains(target),
            "cross entropy: target {target} of {classes} classes"
        );
    }
    let counts: Vec<f32> = targets
        .iter()
        .map(|target| f32::from(u8::from(*target != IGNORE)))
        .collect();
    let counted = targets.iter().filter(|target| **target != IGNORE).count();
    let classes: Vec<i64> = targets.iter().map(|target| (*target).max(0)).collect();
    let best = logits.clone().argmax(1).into_data().convert::<i64>();
    let correct = match best.as_slice::<i64>() {
        Ok(best) => best.iter().zip(targets).filter(|(a, b)| a == b).count(),
        Err(error) => unreachable!("class numbers were converted: {error:?}"),
    };
    let index = Tensor::<2, Int>::from_data(TensorData::new(classes, [rows, 1]), &device);
    let mask = Tensor::<2>::from_data(TensorData::new(counts, [rows, 1]), &device);
    let picked = activation::log_softmax(logits, 1).gather(1, index) * mask;
    Loss {
        loss: picked.sum().neg().div_scalar(counted.max(1) as f32),
        counted,
        correct,
    }
}

/// `T² KL(softmax(teacher / T) || softmax(scores / T))`, mean over the rows of scores `[rows, classes]`, shape `[1]`; no
/// gradient goes to the teacher. Hinton et al. (2015), arXiv 1503.02531.
///
/// Panics when the teacher has another number of scores: callers check.
pub fn distance(scores: Tensor<2>, teacher: &[f32], temperature: f64) -> Tensor<1> {
    let [rows, classes] = scores.dims();
    let data = TensorData::new(teacher.to_vec(), [rows, classes]);
    let teacher = Tensor::<2>::from_data(data, &scores.device()) / temperature;
    let wanted = activation::log_softmax(teacher, 1);
    let given = activation::log_softmax(scores / temperature, 1);
    let apart = wanted.clone().exp() * (wanted - given);
    apart.sum() * (temperature * temperature / rows.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::portable;
    use crate::check::{agree, values};
    use burn::tensor::Device;

    #[test]
    fn loss_agrees_with_composed() {
        for targets in [vec![2, IGNORE, 0, 4, 4], vec![IGNORE; 5], vec![1; 5]] {
            let targets = Arc::new(targets);
            let x: Vec<f32> = values(1, 25).iter().map(|v| v * 6.0).collect();
            agree("cross entropy", 1e-5, &[x], |v| {
                cross_entropy(v[0].clone().reshape([5, 5]), targets.clone()).loss * 3.0
            });
        }
    }

    #[test]
    fn counts_agree_with_composed() {
        let data = TensorData::new(
            vec![1.0f32, 2.0, 0.0, 5.0, -1.0, 2.0, 0.0, 0.0, 9.0],
            [3, 3],
        );
        let logits = Tensor::<2>::from_data(data, &Device::flex());
        let targets = Arc::new(vec![1, 2, IGNORE]);
        let kernel = cross_entropy(logits.clone(), targets.clone());
        let composed = portable(|| cross_entropy(logits, targets));
        assert_eq!((kernel.counted, kernel.correct), (2, 1));
        assert_eq!((composed.counted, composed.correct), (2, 1));
    }
}
