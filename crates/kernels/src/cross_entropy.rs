//! Mean cross entropy over rows of logits, with integer targets.
//!
//! `loss = mean over counted rows of (ln sum_j e^(x_j) - x_target)`. Rows whose target is [`IGNORE`] count neither in the
//! loss nor in the gradient. Only one number per row is saved: probabilities are computed again in the backward.

use crate::math;
use crate::simd::{block_rows, collect, dispatched, each, max, sum};

/// The target of rows that do not count.
pub const IGNORE: i64 = -100;

/// Result of [`cross_entropy`].
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Mean over the counted rows, in nats; 0 when no row counts.
    pub loss: f32,
    /// Rows whose target is not [`IGNORE`].
    pub counted: usize,
    /// Counted rows whose largest logit (the first, among equals) is the target's.
    pub correct: usize,
}

/// Loss of logits `[rows, classes]` against one target per row. `lse` (`[rows]`) receives the logarithm of the sum of the
/// exponentials of each row, which the backward wants; it is 0 on ignored rows.
///
/// Panics when a target is neither [`IGNORE`] nor in `0..classes`.
pub fn cross_entropy(
    classes: usize,
    logits: &[f32],
    targets: &[i64],
    lse: &mut [f32],
) -> CrossEntropy {
    check(classes, logits.len(), targets);
    assert_eq!(targets.len(), lse.len(), "cross entropy: targets and lse");
    let rows = block_rows(classes);
    let blocks = logits
        .chunks(rows * classes)
        .zip(targets.chunks(rows))
        .zip(lse.chunks_mut(rows));
    let partials = collect(blocks, logits.len(), |((logits, targets), lse)| {
        forward_block(classes, logits, targets, lse)
    });
    let (mut total, mut counted, mut correct) = (0.0, 0, 0);
    for (loss, count, hits) in partials {
        total += loss;
        counted += count;
        correct += hits;
    }
    CrossEntropy {
        loss: (total / counted.max(1) as f64) as f32,
        counted,
        correct,
    }
}

/// `dlogits = (softmax(logits) - onehot(target)) scale` on counted rows, 0 elsewhere; `scale` is the gradient of the mean
/// loss divided by the number of counted rows.
pub fn cross_entropy_backward(
    classes: usize,
    logits: &[f32],
    targets: &[i64],
    lse: &[f32],
    scale: f32,
    dlogits: &mut [f32],
) {
    check(classes, logits.len(), targets);
    assert_eq!(targets.len(), lse.len(), "cross entropy: targets and lse");
    assert_eq!(
        logits.len(),
        dlogits.len(),
        "cross entropy: logits and their gradient"
    );
    let rows = block_rows(classes);
    let inputs = logits
        .chunks(rows * classes)
        .zip(targets.chunks(rows))
        .zip(lse.chunks(rows));
    let blocks = inputs.zip(dlogits.chunks_mut(rows * classes));
    each(
        blocks,
        logits.len(),
        |(((logits, targets), lse), dlogits)| {
            backward_block(classes, logits, targets, lse, scale, dlogits);
        },
    );
}

/// Index of the largest logit of each row, the first among equals.
pub fn argmax(classes: usize, logits: &[f32]) -> Vec<usize> {
    assert!(classes > 0, "argmax: no classes");
    logits
        .chunks_exact(classes)
        .map(|row| {
            let mut best = 0;
            for (index, value) in row.iter().enumerate() {
                if *value > row[best] {
                    best = index;
                }
            }
            best
        })
        .collect()
}

fn check(classes: usize, logits: usize, targets: &[i64]) {
    assert_eq!(
        logits,
        classes * targets.len(),
        "cross entropy: logits and targets"
    );
    for target in targets {
        assert!(
            *target == IGNORE || (0..classes as i64).contains(target),
            "cross entropy: target {target} of {classes} classes"
        );
    }
}

dispatched! {
    /// Summed loss, counted rows, correct rows.
    fn forward_block<'a>(
        classes: usize,
        logits: &'a [f32],
        targets: &'a [i64],
        lse: &'a mut [f32],
    ) -> (f64, usize, usize) {
        let mut scratch = vec![0.0; classes];
        let (mut total, mut counted, mut correct) = (0.0, 0, 0);
        for ((row, target), lse) in logits.chunks_exact(classes).zip(targets).zip(lse) {
            *lse = 0.0;
            if *target == IGNORE {
                continue;
            }
            let largest = max(row);
            for (e, x) in scratch.iter_mut().zip(row) {
                *e = math::exp(x - largest);
            }
            let log_sum = sum(&scratch).ln();
            *lse = largest + log_sum;
            let target = *target as usize;
            let value = row[target];
            total += ((largest - value) + log_sum) as f64;
            counted += 1;
            correct += usize::from(value == largest && !row[..target].contains(&largest));
        }
        (total, counted, correct)
    }
}

dispatched! {
    fn backward_block<'a>(
        classes: usize,
        logits: &'a [f32],
        targets: &'a [i64],
        lse: &'a [f32],
        scale: f32,
        dlogits: &'a mut [f32],
    ) {
        let rows = logits.chunks_exact(classes).zip(dlogits.chunks_exact_mut(classes));
        for ((row, drow), (target, lse)) in rows.zip(targets.iter().zip(lse)) {
            if *target == IGNORE {
                drow.fill(0.0);
                continue;
            }
            for (d, x) in drow.iter_mut().zip(row) {
                *d = math::exp(x - lse) * scale;
            }
            drow[*target as usize] -= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    fn naive(classes: usize, logits: &[f64], targets: &[i64]) -> f64 {
        let (mut total, mut counted) = (0.0, 0);
        for (row, target) in logits.chunks(classes).zip(targets) {
            if *target >= 0 {
                let sum: f64 = row.iter().map(|x| x.exp()).sum();
                total -= (row[*target as usize].exp() / sum).ln();
                counted += 1;
            }
        }
        total / counted.max(1) as f64
    }

    fn targets(seed: u64, rows: usize, classes: usize) -> Vec<i64> {
        rand_vec(seed, rows)
            .iter()
            .map(|v| {
                let at = ((v + 1.0) / 2.0 * (classes + 1) as f32) as i64;
                if at == classes as i64 { IGNORE } else { at }
            })
            .collect()
    }

    #[test]
    fn loss_and_gradient_match_naive() {
        for (rows, classes) in [(1, 2), (7, 3), (9, 33), (5, 130)] {
            let x: Vec<f32> = rand_vec(1, rows * classes)
                .iter()
                .map(|v| v * 5.0)
                .collect();
            let mut target = targets(2, rows, classes);
            target[0] = 1;
            let (want, grads) = differences(&[&x], &[1.0], |v| vec![naive(classes, v[0], &target)]);
            let mut lse = vec![9.0; rows];
            let result = cross_entropy(classes, &x, &target, &mut lse);
            assert_close("loss", &[result.loss], &want, 1e-6);
            let best = argmax(classes, &x);
            let hits = target
                .iter()
                .zip(&best)
                .filter(|(t, b)| **t == **b as i64)
                .count();
            assert_eq!(result.correct, hits);
            assert_eq!(result.counted, target.iter().filter(|t| **t >= 0).count());
            let mut dx = vec![9.0; x.len()];
            let scale = 1.0 / result.counted as f32;
            cross_entropy_backward(classes, &x, &target, &lse, scale, &mut dx);
            assert_close("dlogits", &dx, &grads[0], 1e-5);
        }
    }

    #[test]
    fn extreme_logits_masks_and_ties() {
        let mut lse = [0.0; 3];
        let x = [1e30, -1e30, 0.0, 0.0, f32::NEG_INFINITY, 3.0];
        let result = cross_entropy(2, &x, &[0, 1, 1], &mut lse);
        assert_eq!(result.correct, 2, "the first of equal logits wins");
        assert!((result.loss - std::f32::consts::LN_2 / 3.0).abs() < 1e-7);
        let mut dx = [9.0; 6];
        cross_entropy_backward(2, &x, &[0, 1, 1], &lse, 1.0, &mut dx);
        assert_close("dx", &dx, &[0.0, 0.0, 0.5, -0.5, 0.0, 0.0], 1e-6);
        let result = cross_entropy(2, &[1.0, f32::NAN], &[0], &mut lse[..1]);
        assert!(result.loss.is_nan());
    }

    #[test]
    fn nothing_counted_gives_zero() {
        let mut lse = [0.0; 2];
        let result = cross_entropy(3, &[1.0; 6], &[IGNORE; 2], &mut lse);
        assert_eq!(
            result,
            CrossEntropy {
                loss: 0.0,
                counted: 0,
                correct: 0
            }
        );
        let mut dx = [9.0; 6];
        cross_entropy_backward(3, &[1.0; 6], &[IGNORE; 2], &lse, 1.0, &mut dx);
        assert_eq!(dx, [0.0; 6]);
    }

    #[test]
    fn many_blocks_agree_with_naive() {
        let (rows, classes) = (3000, 50);
        let x = rand_vec(5, rows * classes);
        let target = targets(6, rows, classes);
        let mut lse = vec![0.0; rows];
        let result = cross_entropy(classes, &x, &target, &mut lse);
        let x64: Vec<f64> = x.iter().map(|v| *v as f64).collect();
        let want = naive(classes, &x64, &target) as f32;
        assert!(
            (result.loss - want).abs() < 1e-6 * want,
            "{} {want}",
            result.loss
        );
    }

    #[test]
    #[should_panic(expected = "target 3 of 3 classes")]
    fn target_out_of_range() {
        cross_entropy(3, &[0.0; 3], &[3], &mut [0.0]);
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[
            loss_and_gradient_match_naive,
            extreme_logits_masks_and_ties,
            many_blocks_agree_with_naive,
        ]);
    }
}
