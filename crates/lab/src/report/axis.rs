//! Scales and ticks. A plot is drawn in transformed coordinates (the logarithm where the scale is one), and ticks are
//! chosen here, at round values.

use crate::units;

/// How an axis is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    Log10,
    /// For lengths and bytes, which come in powers of two.
    Log2,
}

/// What an axis shows, which decides how ticks are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Count,
    Bytes,
    Seconds,
}

/// One axis of a plot.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    /// Quantity and unit.
    pub(super) label: String,
    pub(super) scale: Scale,
    pub(super) unit: Unit,
    /// Hard ends, such as 0 and 100 for a percentage.
    pub(super) limits: (f64, f64),
}

impl Axis {
    pub(super) fn new(label: impl Into<String>, scale: Scale, unit: Unit) -> Self {
        Self {
            label: label.into(),
            scale,
            unit,
            limits: (f64::NEG_INFINITY, f64::INFINITY),
        }
    }

    pub(super) fn within(mut self, low: f64, high: f64) -> Self {
        self.limits = (low, high);
        self
    }

    /// Whether `value` has a place on the axis.
    pub(super) fn holds(&self, value: f64) -> bool {
        value.is_finite() && (self.scale == Scale::Linear || value > 0.0)
    }

    pub(super) fn forward(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => value,
            Scale::Log10 => value.log10(),
            Scale::Log2 => value.log2(),
        }
    }

    pub(super) fn backward(&self, place: f64) -> f64 {
        match self.scale {
            Scale::Linear => place,
            Scale::Log10 => 10f64.powf(place),
            Scale::Log2 => place.exp2(),
        }
    }

    /// The drawn range in transformed coordinates, with some air around the values.
    pub(super) fn range(&self, values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
        let places = values
            .filter(|value| self.holds(*value))
            .map(|value| self.forward(value));
        let (low, high) = places.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| {
            (low.min(p), high.max(p))
        });
        if low > high {
            return None;
        }
        let extent = high - low;
        // A single value still needs a range: a tenth of itself, or a factor of about two on a logarithmic axis.
        let air = match (extent > 0.0, self.scale) {
            (true, _) => extent * 0.05,
            (false, Scale::Linear) => (low.abs() * 0.1).max(1e-9),
            (false, Scale::Log10) => 0.3,
            (false, Scale::Log2) => 1.0,
        };
        let end = |place: f64, limit: f64| {
            if self.holds(limit) {
                Some(self.forward(limit))
            } else {
                None
            }
            .unwrap_or(place)
        };
        let low = (low - air).max(end(f64::NEG_INFINITY, self.limits.0));
        let high = (high + air).min(end(f64::INFINITY, self.limits.1));
        if low < high {
            Some((low, high))
        } else {
            Some((low - air, low + air))
        }
    }

    /// Round places inside the range, in transformed coordinates.
    pub(super) fn ticks(&self, low: f64, high: f64) -> Vec<f64> {
        match self.scale {
            Scale::Linear => linear(low, high),
            Scale::Log10 => decades(low, high),
            Scale::Log2 => powers(low, high),
        }
    }

    /// A measured value with its unit, for a tooltip.
    pub(super) fn value(&self, value: f64) -> String {
        match self.unit {
            Unit::Count if value.abs() < 1000.0 => units::three_digits(value),
            Unit::Count => units::count(value),
            Unit::Bytes => units::bytes(value),
            Unit::Seconds => units::seconds(value),
        }
    }

    /// A tick's text.
    pub(super) fn tick(&self, place: f64) -> String {
        let value = self.backward(place);
        // Rounding noise of the transform must not show: 99.99999 is 100.
        let rounded: f64 = format!("{value:.6e}").parse().unwrap_or(value);
        short(&match self.unit {
            Unit::Count if rounded.abs() < 1000.0 => units::three_digits(rounded),
            Unit::Count if self.scale == Scale::Log2 => return units::grouped(rounded as u64),
            Unit::Count => units::count(rounded),
            Unit::Bytes => units::bytes(rounded),
            Unit::Seconds => units::seconds(rounded),
        })
    }
}

/// Drops zeros after the decimal point: `1.50M` is `1.5M`, `2.00 ms` is `2 ms`.
pub(super) fn short(text: &str) -> String {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '-')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if !number.contains('.') || unit.starts_with('e') {
        return text.to_string();
    }
    format!(
        "{}{unit}",
        number.trim_end_matches('0').trim_end_matches('.')
    )
}

fn linear(low: f64, high: f64) -> Vec<f64> {
    let raw = (high - low) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|step| *step >= raw)
        .unwrap_or(power);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|index| index as f64 * step).collect()
}

fn decades(low: f64, high: f64) -> Vec<f64> {
    let (first, last) = (low.floor() as i32, high.ceil() as i32);
    let fits = |place: &f64| (low..=high).contains(place);
    for digits in [&[1.0][..], &[1.0, 3.0], &[1.0, 2.0, 5.0]] {
        let all =
            (first..=last).flat_map(|d| digits.iter().map(move |m: &f64| f64::from(d) + m.log10()));
        let ticks: Vec<f64> = all.filter(fits).collect();
        if ticks.len() >= if digits.len() == 3 { 3 } else { 4 } {
            return thin(ticks, 7);
        }
    }
    // Less than about a decade: round values on a linear division.
    let values = linear(10f64.powf(low), 10f64.powf(high));
    values
        .into_iter()
        .filter(|value| *value > 0.0)
        .map(f64::log10)
        .collect()
}

fn powers(low: f64, high: f64) -> Vec<f64> {
    thin(
        (low.ceil() as i32..=high.floor() as i32)
            .map(f64::from)
            .collect(),
        7,
    )
}

fn thin(ticks: Vec<f64>, most: usize) -> Vec<f64> {
    let every = ticks.len().div_ceil(most).max(1);
    ticks.into_iter().step_by(every).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &Axis, low: f64, high: f64) -> Vec<String> {
        axis.ticks(axis.forward(low), axis.forward(high))
            .into_iter()
            .map(|place| axis.tick(place))
            .collect()
    }

    #[test]
    fn ticks_are_round() {
        let axis = |scale, unit| Axis::new("", scale, unit);
        assert_eq!(
            texts(&axis(Scale::Linear, Unit::Count), 0.0, 100.0),
            ["0", "20", "40", "60", "80", "100"]
        );
        assert_eq!(
            texts(&axis(Scale::Linear, Unit::Count), 0.0, 1.6e6),
            ["0", "500k", "1M", "1.5M"]
        );
        assert_eq!(
            texts(&axis(Scale::Log10, Unit::Seconds), 9e-5, 2e-1),
            ["100 µs", "1 ms", "10 ms", "100 ms"]
        );
        assert_eq!(
            texts(&axis(Scale::Log10, Unit::Seconds), 9e-5, 1e-3),
            ["100 µs", "200 µs", "500 µs", "1 ms"]
        );
        assert_eq!(
            texts(&axis(Scale::Log2, Unit::Count), 512.0, 4096.0),
            ["512", "1,024", "2,048", "4,096"]
        );
        assert_eq!(
            texts(&axis(Scale::Log2, Unit::Bytes), 2048.0, 16384.0),
            ["2 KiB", "4 KiB", "8 KiB", "16 KiB"]
        );
        assert!(axis(Scale::Log2, Unit::Bytes).ticks(0.0, 40.0).len() <= 7);
    }

    #[test]
    fn ranges_hold_their_values_and_respect_limits() {
        let axis = Axis::new("", Scale::Linear, Unit::Count).within(0.0, 100.0);
        assert_eq!(axis.range([0.5, 99.0].into_iter()), Some((0.0, 100.0)));
        assert_eq!(axis.range([f64::NAN].into_iter()), None);
        let (low, high) = axis.range([100.0].into_iter()).unwrap();
        assert!(low < high);
        let log = Axis::new("", Scale::Log10, Unit::Count);
        assert_eq!(log.range([0.0, -1.0].into_iter()), None);
        let (low, high) = log.range([10.0].into_iter()).unwrap();
        assert!(low < 1.0 && high > 1.0);
    }
}
