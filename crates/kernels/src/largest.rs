//! The largest values of each row, by number: which tokens a cluster takes.

use crate::simd::{block_rows, collect};

/// The numbers of the `count` largest of every row of `x [rows, width]`, rising within a row; of equals the first. NaN counts as the
/// smallest.
///
/// Panics when a row is shorter than `count` or `x` is not whole rows.
pub fn largest(x: &[f32], width: usize, count: usize) -> Vec<u32> {
    assert!(
        count <= width && x.len().is_multiple_of(width.max(1)),
        "the {count} largest of rows of {width}"
    );
    if count == 0 {
        return Vec::new();
    }
    let rows = block_rows(width);
    let blocks = collect(x.chunks(rows * width), x.len(), |rows| {
        let mut keys = vec![0u64; width];
        let mut found = Vec::with_capacity(rows.len() / width * count);
        for row in rows.chunks_exact(width) {
            for (at, (key, value)) in keys.iter_mut().zip(row).enumerate() {
                *key = u64::from(order(*value)) << 32 | u64::from(!(at as u32));
            }
            if count < width {
                keys.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
            }
            let start = found.len();
            found.extend(keys[..count].iter().map(|key| !(*key as u32)));
            found[start..].sort_unstable();
        }
        found
    });
    blocks.concat()
}

/// A number that rises as the value does.
fn order(value: f32) -> u32 {
    if value.is_nan() {
        return 0;
    }
    let bits = value.to_bits();
    match bits >> 31 {
        0 => bits | 1 << 31,
        _ => !bits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::rand_vec;

    #[test]
    fn the_largest_are_those_that_sorting_puts_first() {
        for (rows, width) in [(1, 1), (3, 7), (40, 300), (2, 5000)] {
            let mut x = rand_vec(1, rows * width);
            // Equals, both zeros, and what is no number.
            for at in (0..x.len()).step_by(3) {
                x[at] = (x[at] * 2.0).round();
            }
            x[0] = f32::NAN;
            for count in [0, 1, width / 2, width] {
                let got = largest(&x, width, count);
                let want = x.chunks(width).flat_map(|row| {
                    let mut all: Vec<u32> = (0..width as u32).collect();
                    let key = |at: &u32| {
                        let value = row[*at as usize];
                        if value.is_nan() {
                            f32::NEG_INFINITY
                        } else {
                            value
                        }
                    };
                    all.sort_by(|a, b| key(b).total_cmp(&key(a)));
                    all.truncate(count);
                    all.sort_unstable();
                    all
                });
                assert_eq!(got, want.collect::<Vec<u32>>(), "{rows} x {width}, {count}");
            }
        }
    }
}
