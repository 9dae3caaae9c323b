//! The equation as a loop, in f64, for the tests.

use super::{Gate, Problem, Write};

/// `o [total, heads, value_dim]` and the final state.
pub(super) struct Run {
    pub(super) o: Vec<f64>,
    pub(super) last: Vec<f64>,
}

/// Everything in f64, so that finite differences are exact enough.
#[derive(Clone)]
pub(super) struct Wide {
    pub(super) q: Vec<f64>,
    pub(super) k: Vec<f64>,
    pub(super) v: Vec<f64>,
    pub(super) gate: Vec<f64>,
    pub(super) beta: Vec<f64>,
    pub(super) initial: Vec<f64>,
}

pub(super) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

pub(super) fn gate_values(gate: Gate) -> Vec<f64> {
    match gate {
        Gate::None => vec![],
        Gate::Scalar(gate) | Gate::Vector(gate) => widen(gate),
    }
}

pub(super) fn beta_values(write: Write) -> Vec<f64> {
    match write {
        Write::Additive => vec![],
        Write::Delta(beta) => widen(beta),
    }
}

/// The recurrence of [`super`], as it is written there.
pub(super) fn run(p: &Problem, w: &Wide, gate: Gate, write: Write) -> Run {
    let (h, kd, vd) = (p.heads, p.key_dim, p.value_dim);
    let mut o = vec![0.0; p.total() * h * vd];
    let mut last = w.initial.clone();
    for n in 0..p.sequences() {
        for head in 0..h {
            let at = (n * h + head) * kd * vd;
            let state = &mut last[at..at + kd * vd];
            for t in p.offsets[n]..p.offsets[n + 1] {
                let row = (t * p.key_heads + head / (h / p.key_heads)) * kd;
                let (q, k) = (&w.q[row..row + kd], &w.k[row..row + kd]);
                let one = t * h + head;
                let v = &w.v[one * vd..(one + 1) * vd];
                for i in 0..kd {
                    let decay = match gate {
                        Gate::None => 1.0,
                        Gate::Scalar(_) => w.gate[one].exp(),
                        Gate::Vector(_) => w.gate[one * kd + i].exp(),
                    };
                    state[i * vd..(i + 1) * vd]
                        .iter_mut()
                        .for_each(|s| *s *= decay);
                }
                for j in 0..vd {
                    let u = match write {
                        Write::Additive => v[j],
                        Write::Delta(_) => {
                            let held: f64 = (0..kd).map(|i| k[i] * state[i * vd + j]).sum();
                            w.beta[one] * (v[j] - held)
                        }
                    };
                    for i in 0..kd {
                        state[i * vd + j] += k[i] * u;
                    }
                    let sum: f64 = (0..kd).map(|i| q[i] * state[i * vd + j]).sum();
                    o[one * vd + j] = f64::from(p.scale) * sum;
                }
            }
        }
    }
    Run { o, last }
}
