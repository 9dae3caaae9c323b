//! Operands rounded to bf16. Products of rounded operands are tested where they are made; here, that they stand where they
//! belong.

use super::*;

/// Within what three digits of the operands leave of the largest value.
fn near(name: &str, got: &[f32], want: &[f64]) {
    let largest = want.iter().fold(0.5, |most: f64, x| most.max(x.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!(
            (f64::from(*got) - want).abs() < 0.03 * largest,
            "{name}: {got} {want} of {largest}"
        );
    }
}

/// Outputs and gradients of a case against the equation.
pub(super) fn check(case: &Case) {
    let output = forward(&case.fast());
    let (o, lse) = case.naive().forward();
    near("o", &output.o, &o);
    let (d_o, dlse) = (rand_vec(4, o.len()), rand_vec(5, lse.len()));
    let grads = backward(&case.fast(), &output.o, &output.lse, &d_o, Some(&dlse));
    let [dq, dk, dv, dbias] = case.naive().backward(&wide(&d_o), &wide(&dlse));
    near("dq", &grads.q, &dq);
    near("dk", &grads.k, &dk);
    near("dv", &grads.v, &dv);
    near("dbias", &grads.bias, &dbias);
}

#[test]
fn rounded_operands_stay_near_the_equation() {
    for mask in masks() {
        let (q, k) = ([0, 6, 6, 76, 85, 92], [0, 66, 70, 140, 240, 240]);
        let case = Case::new(&q, &k, [6, 2, 8, 3], mask, true).brief();
        check(&case);
        check(&case.clone().with_bias(50, 9));
        check(&case.clone().with_dropout(0.3));
        let mut whole = case.clone();
        whole.precision = Precision::F32;
        let differs = forward(&case.fast()).o != forward(&whole.fast()).o;
        assert!(differs || mask.window == Some(0), "nothing is rounded");
    }
}
