//! Quantised weights against the same written from the equations in float64 (`oracles/quantise.py`).

use anyformer_kernels::matmul::Precision;
use anyformer_kernels::quant::gptq::{Inputs, Options, quantise};
use anyformer_kernels::quant::round::{Scheme, nearest};
use anyformer_kernels::quant::search::smooth;
use anyformer_kernels::quant::{Bits, Packed, Quants, product};

use crate::golden::{Closeness, Golden};
use crate::tolerance::{OUTPUT, check as compare};

/// Compares every form; the weights and, of w8a8, the outputs.
pub fn check(golden: &Golden) -> Result<Closeness, String> {
    let name = &golden.name;
    let fail = |what: &dyn std::fmt::Display| format!("golden {name}: {what}");
    let (shape, weights) = golden.get("weight")?;
    let (&[rows, columns], (_, x)) = (shape, golden.get("x")?) else {
        return Err(fail(&"the weight is no matrix"));
    };
    let mut inputs = Inputs::new(columns);
    inputs.add(x);
    let scheme = |bits, zeros| Scheme {
        bits,
        group: 16,
        zeros,
    };
    let gptq = |zeros, by_size| {
        let options = Options {
            by_size,
            ..Options::default()
        };
        quantise(scheme(Bits::Four, zeros), options, rows, weights, &inputs)
    };
    let near = |bits, zeros| nearest(scheme(bits, zeros), [rows, columns], weights);
    let forms = [
        ("rtn8", near(Bits::Eight, false)),
        ("rtn4", near(Bits::Four, false)),
        ("rtn4_zeros", near(Bits::Four, true)),
        ("gptq4", gptq(false, false)),
        ("gptq4_zeros", gptq(true, false)),
        ("gptq4_order", gptq(false, true)),
    ];
    let packed = |quants: Quants| Packed::new(&quants).map_err(|error| fail(&error));
    let mut worst = 0.0f64;
    for (key, quants) in forms {
        let got = packed(quants.map_err(|error| fail(&error))?)?.widened(0..rows);
        let what = format!("{name} {key}");
        worst = worst.max(compare(&what, &got, golden.get(key)?.1, OUTPUT)?);
    }
    let whole = Scheme {
        group: 0,
        ..scheme(Bits::Eight, false)
    };
    let smoothed = smooth(whole, 0.5, rows, weights, &inputs).map_err(|error| fail(&error))?;
    let got = product(Precision::F32, x, &packed(smoothed)?, None);
    let what = format!("{name} smoothed");
    worst = worst.max(compare(&what, &got, golden.get("smoothed")?.1, OUTPUT)?);
    Ok(Closeness {
        name: name.clone(),
        mixer: golden.mixer.clone(),
        reference: golden.reference(),
        output: worst,
        gradient: f64::NAN,
    })
}
