//! Numbers as a reader wants them: three significant digits and a unit.

/// `value` with three significant digits, without an exponent between 1e-4 and 1e6.
pub fn three_digits(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return if value.is_nan() {
            "NaN".into()
        } else if value == 0.0 {
            "0".into()
        } else {
            format!("{value}")
        };
    }
    // The exponent after rounding: 0.9999 is 1.00, not 1.000.
    let scientific = format!("{value:.2e}");
    let magnitude: i32 = scientific
        .rsplit_once('e')
        .and_then(|(_, digits)| digits.parse().ok())
        .unwrap_or(0);
    if !(-4..6).contains(&magnitude) {
        return scientific;
    }
    format!("{value:.*}", (2 - magnitude).max(0) as usize)
}

fn scaled(value: f64, base: f64, units: &[&str], space: &str) -> String {
    let (mut scaled, mut index) = (value, 0);
    // 999.5 would print as "1000": three digits move it to the next unit.
    while index + 1 < units.len() && scaled.abs() >= if base == 1000.0 { 999.5 } else { base } {
        scaled /= base;
        index += 1;
    }
    let whole = scaled.fract() == 0.0 && scaled.abs() < base;
    let number = if whole {
        format!("{scaled:.0}")
    } else {
        three_digits(scaled)
    };
    if units[index].is_empty() {
        number
    } else {
        format!("{number}{space}{}", units[index])
    }
}

/// A count with a decimal prefix: `1.23M`, `45.6k`, `7`.
pub fn count(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T", "P"], "")
}

/// Bytes with a binary prefix: `64 KiB`, `1.50 MiB`.
pub fn bytes(value: f64) -> String {
    scaled(value, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"], " ")
}

/// A duration: `350 µs`, `1.20 ms`, `2.10 s`, `3.5 min`.
pub fn seconds(value: f64) -> String {
    match value.abs() {
        0.0 => "0 s".into(),
        v if v < 1e-6 => format!("{} ns", three_digits(value * 1e9)),
        v if v < 1e-3 => format!("{} µs", three_digits(value * 1e6)),
        v if v < 1.0 => format!("{} ms", three_digits(value * 1e3)),
        v if v < 120.0 => format!("{} s", three_digits(value)),
        v if v < 7200.0 => format!("{:.1} min", value / 60.0),
        _ => format!("{:.1} h", value / 3600.0),
    }
}

/// `count` with thousands separators: `129,135,360`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Seconds since 1970 as `2026-01-31 17:05:09 UTC` (days to civil date in the proleptic Gregorian calendar).
pub fn utc(unix_seconds: i64) -> String {
    let (days, second) = (
        unix_seconds.div_euclid(86_400),
        unix_seconds.rem_euclid(86_400),
    );
    // Years are counted from March, so that the leap day is the last of its year; 400 years have 146,097 days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Seconds since 1970 of the system clock.
pub fn now() -> i64 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    clock.map_or(0, |elapsed| elapsed.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readable_numbers() {
        assert_eq!(count(1_234_567.0), "1.23M");
        assert_eq!(count(999.9), "1.00k");
        assert_eq!(count(7.0), "7");
        assert_eq!(bytes(65_536.0), "64 KiB");
        assert_eq!(bytes(1_572_864.0), "1.50 MiB");
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(seconds(0.00035), "350 µs");
        assert_eq!(seconds(0.0012), "1.20 ms");
        assert_eq!(grouped(129_135_360), "129,135,360");
        assert_eq!(grouped(12), "12");
        assert_eq!(three_digits(-0.001234), "-0.00123");
        assert_eq!(three_digits(f64::NAN), "NaN");
    }

    #[test]
    fn known_dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_700_000_000), "2023-11-14 22:13:20 UTC");
        assert_eq!(utc(-1), "1969-12-31 23:59:59 UTC");
    }
}
