//! Small-sample statistics of repeated trials.
//!
//! Every function takes raw observations and returns `None` where the statistic is undefined (no observations, or one
//! observation where a spread is asked for), so that a caller cannot print a made-up number.

use serde::Serialize;

/// Arithmetic mean; `None` without observations.
pub fn mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    Some(values.iter().sum::<f64>() / values.len() as f64)
}

/// Sample standard deviation with `n - 1` in the denominator; `None` below two observations.
pub fn standard_deviation(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let centre = mean(values)?;
    let squares: f64 = values.iter().map(|value| (value - centre).powi(2)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// Standard error of the mean: sample standard deviation (`n - 1`) over `sqrt(n)`; `None` below two observations.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    Some(standard_deviation(values)? / (values.len() as f64).sqrt())
}

/// Median: the middle observation, or the mean of the two middle ones; `None` without observations.
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// Quantile `q` in `[0, 1]`, linear between the two nearest order statistics (type 7 of Hyndman and Fan 1996).
/// `None` without observations, with a `q` outside `[0, 1]`, or if an observation is NaN.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    if values.is_empty() || !(0.0..=1.0).contains(&q) || values.iter().any(|value| value.is_nan()) {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let position = q * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    if below == above {
        return Some(sorted[below]);
    }
    let weight = position - below as f64;
    Some(sorted[below] * (1.0 - weight) + sorted[above] * weight)
}

/// Mean, spread and range of one set of observations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Number of observations, at least one.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard error of the mean (`n - 1`); absent with one observation.
    pub standard_error: Option<f64>,
    /// Smallest observation.
    pub min: f64,
    /// Largest observation.
    pub max: f64,
}

impl Summary {
    /// Summary of `values`; `None` without observations.
    pub fn of(values: &[f64]) -> Option<Self> {
        Some(Self {
            count: values.len(),
            mean: mean(values)?,
            standard_error: standard_error(values),
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0];
        assert_eq!(mean(&values), Some(5.0));
        let deviation = (32.0f64 / 7.0).sqrt();
        assert!((standard_deviation(&values).unwrap() - deviation).abs() < 1e-15);
        assert!((standard_error(&values).unwrap() - deviation / 8f64.sqrt()).abs() < 1e-15);
        assert_eq!(median(&values), Some(4.5));
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.25), Some(1.75));
        assert_eq!(quantile(&[4.0, 1.0], 1.0), Some(4.0));
    }

    #[test]
    fn undefined_is_none() {
        assert_eq!(mean(&[]), None);
        assert_eq!(standard_error(&[1.0]), None);
        assert_eq!(quantile(&[1.0], 1.5), None);
        assert_eq!(quantile(&[1.0, f64::NAN], 0.5), None);
        assert!(Summary::of(&[]).is_none());
        assert_eq!(Summary::of(&[2.0]).unwrap().standard_error, None);
    }
}
