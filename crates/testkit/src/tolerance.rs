//! The tolerance policy, in one place.
//!
//! Two tensors are compared by `max |got - want| / max |want|` over the tensor: an error small against the tensor's own
//! scale. A tensor that should be zero everywhere is compared absolutely.

/// Outputs against an independent implementation.
pub const OUTPUT: f64 = 1e-4;
/// Gradients against an independent implementation.
pub const GRADIENT: f64 = 1e-3;
/// Two forms of our own (kernel and portable, whole and streamed).
pub const SELF: f64 = 2e-4;
/// Products of operands rounded to bf16, which keeps three digits of each.
pub const ROUNDED: f64 = 5e-2;
/// Central differences in f32.
pub const DIFFERENCE: f64 = 2e-2;

/// The relative error defined above; infinite when a value is not finite or the lengths differ.
pub fn error(got: &[f32], want: &[f32]) -> f64 {
    if got.len() != want.len() || got.iter().chain(want).any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let largest = |values: &mut dyn Iterator<Item = f32>| {
        values.fold(0f64, |most, value| most.max(f64::from(value.abs())))
    };
    let difference = largest(&mut got.iter().zip(want).map(|(got, want)| got - want));
    let scale = largest(&mut want.iter().copied());
    if scale < 1e-6 {
        difference
    } else {
        difference / scale
    }
}

/// `Err` with both numbers when `got` is further from `want` than `tolerance`.
pub fn check(what: &str, got: &[f32], want: &[f32], tolerance: f64) -> Result<f64, String> {
    let error = error(got, want);
    if error <= tolerance {
        Ok(error)
    } else {
        Err(format!(
            "{what}: relative error {error:.2e} is above {tolerance:.0e} ({} and {} values, first {:?} and {:?})",
            got.len(),
            want.len(),
            got.first(),
            want.first()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_never_passes() {
        assert!(check("nan", &[f32::NAN], &[1.0], 1.0).is_err());
        assert!(check("nan", &[1.0], &[f32::NAN], 1.0).is_err());
        assert!(check("length", &[1.0], &[1.0, 1.0], 1.0).is_err());
        assert!(check("near", &[1.0, 2.0], &[1.0, 2.0001], 1e-4).is_ok());
        assert!(check("zero", &[1e-3], &[0.0], 1e-4).is_err());
    }
}
