//! A linear recurrence with complex diagonal dynamics that do not depend on the token (LRU, arXiv 2303.06349).
//!
//! `h_t = lambda h_(t-1) + v_t` for each complex number of the state. Backwards `g_t = dh_t + conj(lambda) g_(t+1)`, `dv_t = g_t`,
//! `dlambda = sum_t conj(h_(t-1)) g_t`.
//!
//! Shapes: v and h `[total, 2, state]` (real parts, then imaginary ones), lambda `[2, state]`, the states before and after each
//! sequence `[sequences, 2, state]`. Sequences are packed. Tokens go one after the other, states fill the lanes.
#![allow(unsafe_code)]

use rayon::prelude::*;

use crate::disjoint::Disjoint;
use crate::simd::dispatched;

/// States of a task.
const LANES: usize = 32;
type Lanes = [f32; LANES];
/// Real and imaginary parts.
type Pair = [Lanes; 2];

/// The arguments.
#[derive(Clone, Copy, Debug)]
pub struct Diagonal<'a> {
    /// `[2, state]`.
    pub lambda: &'a [f32],
    /// States before each sequence, `[sequences, 2, state]`; zeros when absent.
    pub initial: Option<&'a [f32]>,
    /// Cumulative lengths of the packed sequences.
    pub offsets: &'a [usize],
}

/// Operations over `total` tokens.
pub fn flops(total: usize, state: usize) -> u64 {
    8 * (total * state) as u64
}

/// Gradients in the shapes of the arguments.
#[derive(Clone, Debug)]
pub struct Grads {
    /// `[total, 2, state]`.
    pub v: Vec<f32>,
    /// `[2, state]`.
    pub lambda: Vec<f32>,
    /// `[sequences, 2, state]`.
    pub initial: Vec<f32>,
}

/// States `from..from + width` of one sequence.
#[derive(Clone, Copy)]
struct Task {
    sequence: usize,
    from: usize,
    width: usize,
    rows: [usize; 2],
}

impl Diagonal<'_> {
    fn state(&self) -> usize {
        self.lambda.len() / 2
    }

    /// Values of the states of all sequences.
    fn sizes(&self) -> usize {
        (self.offsets.len() - 1) * self.lambda.len()
    }

    fn check(&self, v: &[f32]) {
        let total = self.offsets[self.offsets.len() - 1];
        assert!(self.lambda.len().is_multiple_of(2), "diagonal lambda");
        assert_eq!(v.len(), total * self.lambda.len(), "diagonal v");
        assert!(
            self.initial
                .is_none_or(|initial| initial.len() == self.sizes()),
            "diagonal initial"
        );
    }

    fn tasks(&self) -> Vec<Task> {
        let mut tasks = Vec::new();
        for (sequence, rows) in self.offsets.windows(2).enumerate() {
            for from in (0..self.state()).step_by(LANES) {
                tasks.push(Task {
                    sequence,
                    from,
                    width: LANES.min(self.state() - from),
                    rows: [rows[0], rows[1]],
                });
            }
        }
        tasks
    }

    /// Reads a task's part of row `row` of `[.., 2, state]`.
    #[inline(always)]
    fn read(&self, values: &[f32], row: usize, task: Task) -> Pair {
        let mut pair = [[0.0; LANES]; 2];
        for (part, lanes) in pair.iter_mut().enumerate() {
            let at = (2 * row + part) * self.state() + task.from;
            // A whole block is one copy of a known size.
            match values.get(at..at + LANES) {
                Some(values) if task.width == LANES => lanes.copy_from_slice(values),
                _ => lanes[..task.width].copy_from_slice(&values[at..at + task.width]),
            }
        }
        pair
    }

    /// Writes it.
    #[inline(always)]
    fn write(&self, values: &Disjoint, row: usize, task: Task, pair: &Pair) {
        for (part, lanes) in pair.iter().enumerate() {
            let at = (2 * row + part) * self.state() + task.from;
            // SAFETY: tasks own different (sequence, states) pairs, and a place belongs to one; the part is gone afterwards.
            unsafe { values.part(at, task.width) }.copy_from_slice(&lanes[..task.width]);
        }
    }
}

/// Fills the states `[total, 2, state]` after every token and those after each sequence. All of both is written, nothing read
/// before.
pub fn forward(diagonal: &Diagonal, v: &[f32], h: &mut [f32], last: &mut [f32]) {
    diagonal.check(v);
    assert_eq!(h.len(), v.len(), "diagonal h");
    assert_eq!(last.len(), diagonal.sizes(), "diagonal last");
    let (h, last) = (Disjoint::new(h), Disjoint::new(last));
    diagonal
        .tasks()
        .into_par_iter()
        .with_max_len(1)
        .for_each(|task| walk(diagonal, task, v, &h, &last));
}

/// Gradients from those of the states after every token and, where these were used, after each sequence; `h` is what
/// [`forward`] gave.
pub fn backward(diagonal: &Diagonal, h: &[f32], dh: &[f32], dlast: Option<&[f32]>) -> Grads {
    diagonal.check(h);
    assert_eq!(dh.len(), h.len(), "diagonal dh");
    assert!(
        dlast.is_none_or(|dlast| dlast.len() == diagonal.sizes()),
        "diagonal dlast"
    );
    let size = diagonal.lambda.len();
    let mut grads = Grads {
        v: vec![0.0; h.len()],
        lambda: vec![0.0; size],
        initial: vec![0.0; diagonal.sizes()],
    };
    let (dv, dinitial) = (
        Disjoint::new(&mut grads.v),
        Disjoint::new(&mut grads.initial),
    );
    let tasks = diagonal.tasks();
    let sums: Vec<Pair> = tasks
        .par_iter()
        .with_max_len(1)
        .map(|task| walk_back(diagonal, *task, h, dh, dlast, &dv, &dinitial))
        .collect();
    for (task, sums) in tasks.iter().zip(sums) {
        for (part, sums) in sums.iter().enumerate() {
            let at = part * diagonal.state() + task.from;
            let total = &mut grads.lambda[at..at + task.width];
            total
                .iter_mut()
                .zip(sums)
                .for_each(|(total, sum)| *total += sum);
        }
    }
    grads
}

dispatched! {
    fn walk<'a>(
        diagonal: &'a Diagonal<'a>,
        task: Task,
        v: &'a [f32],
        h: &'a Disjoint<'a>,
        last: &'a Disjoint<'a>,
    ) {
        let [real, imag] = diagonal.read(diagonal.lambda, 0, task);
        let mut held = match diagonal.initial {
            Some(initial) => diagonal.read(initial, task.sequence, task),
            None => [[0.0; LANES]; 2],
        };
        for row in task.rows[0]..task.rows[1] {
            let v = diagonal.read(v, row, task);
            let before = held;
            for l in 0..LANES {
                held[0][l] = (-imag[l]).mul_add(before[1][l], real[l].mul_add(before[0][l], v[0][l]));
                held[1][l] = imag[l].mul_add(before[0][l], real[l].mul_add(before[1][l], v[1][l]));
            }
            diagonal.write(h, row, task, &held);
        }
        diagonal.write(last, task.sequence, task, &held);
    }
}

dispatched! {
    fn walk_back<'a>(
        diagonal: &'a Diagonal<'a>,
        task: Task,
        h: &'a [f32],
        dh: &'a [f32],
        dlast: Option<&'a [f32]>,
        dv: &'a Disjoint<'a>,
        dinitial: &'a Disjoint<'a>,
    ) -> Pair {
        let [real, imag] = diagonal.read(diagonal.lambda, 0, task);
        let none = [[0.0; LANES]; 2];
        // What comes from later tokens; of the last, from the state that goes on.
        let mut g = match dlast {
            Some(dlast) => diagonal.read(dlast, task.sequence, task),
            None => none,
        };
        let mut sums = none;
        for row in (task.rows[0]..task.rows[1]).rev() {
            let dh = diagonal.read(dh, row, task);
            let before = match (row == task.rows[0], diagonal.initial) {
                (false, _) => diagonal.read(h, row - 1, task),
                (true, Some(initial)) => diagonal.read(initial, task.sequence, task),
                (true, None) => none,
            };
            let mut here = none;
            for l in 0..LANES {
                here[0][l] = g[0][l] + dh[0][l];
                here[1][l] = g[1][l] + dh[1][l];
                sums[0][l] += here[0][l].mul_add(before[0][l], here[1][l] * before[1][l]);
                sums[1][l] += here[1][l].mul_add(before[0][l], -(here[0][l] * before[1][l]));
                g[0][l] = real[l].mul_add(here[0][l], imag[l] * here[1][l]);
                g[1][l] = real[l].mul_add(here[1][l], -(imag[l] * here[0][l]));
            }
            diagonal.write(dv, row, task, &here);
        }
        diagonal.write(dinitial, task.sequence, task, &g);
        sums
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;

#[cfg(any(test, fuzzing))]
mod tests {
    use super::*;
    use crate::testing::{assert_close, differences, rand_vec};

    /// The equation; the states after every token, then those after each sequence.
    fn naive([v, lambda, initial]: [&[f64]; 3], offsets: &[usize]) -> Vec<f64> {
        let state = lambda.len() / 2;
        let (mut h, mut ends) = (vec![0.0; v.len()], Vec::new());
        for (row, pair) in offsets.windows(2).enumerate() {
            let mut held = initial[row * 2 * state..][..2 * state].to_vec();
            for t in pair[0]..pair[1] {
                for n in 0..state {
                    let (a, b) = (held[n], held[state + n]);
                    let (real, imag) = (lambda[n], lambda[state + n]);
                    held[n] = real * a - imag * b + v[t * 2 * state + n];
                    held[state + n] = real * b + imag * a + v[t * 2 * state + state + n];
                }
                h[t * 2 * state..][..2 * state].copy_from_slice(&held);
            }
            ends.extend(held);
        }
        h.extend(ends);
        h
    }

    /// Outputs and every gradient with a state before each sequence.
    fn check(offsets: &[usize], state: usize) {
        let size = 2 * state;
        let (total, count) = (offsets[offsets.len() - 1], offsets.len() - 1);
        let (v, initial) = (rand_vec(1, total * size), rand_vec(3, count * size));
        let lambda: Vec<f32> = rand_vec(2, size).iter().map(|x| 0.7 * x).collect();
        let d = rand_vec(4, (total + count) * size);
        let (want, grads) = differences(&[&v, &lambda, &initial], &d, |x| {
            naive([x[0], x[1], x[2]], offsets)
        });
        let diagonal = Diagonal {
            lambda: &lambda,
            initial: Some(&initial),
            offsets,
        };
        let (mut h, mut last) = (vec![f32::NAN; total * size], vec![f32::NAN; count * size]);
        forward(&diagonal, &v, &mut h, &mut last);
        assert_close("h", &h, &want[..total * size], 2e-6);
        assert_close("last", &last, &want[total * size..], 2e-6);
        let (dh, dlast) = d.split_at(total * size);
        let got = backward(&diagonal, &h, dh, Some(dlast));
        assert_close("dv", &got.v, &grads[0], 2e-5);
        assert_close("dlambda", &got.lambda, &grads[1], 2e-5);
        assert_close("dinitial", &got.initial, &grads[2], 2e-5);
    }

    #[test]
    fn states_and_gradients_match_the_equation() {
        for state in [1, 5, 32, 35] {
            let offsets = [0, 3, 3, 7, 8];
            check(&offsets, state);
            let size = 2 * state;
            let v = rand_vec(1, 8 * size);
            let lambda: Vec<f32> = rand_vec(2, size).iter().map(|x| 0.7 * x).collect();
            let d = rand_vec(4, 12 * size);
            let diagonal = Diagonal {
                lambda: &lambda,
                initial: None,
                offsets: &offsets,
            };
            // Without a state before: as if it were zero.
            let zero = vec![0.0; 4 * size];
            let zeros = Diagonal {
                initial: Some(&zero),
                ..diagonal
            };
            let run = |diagonal: &Diagonal| {
                let (mut h, mut last) = (vec![0.0; 8 * size], vec![0.0; 4 * size]);
                forward(diagonal, &v, &mut h, &mut last);
                let got = backward(diagonal, &h, &d[..8 * size], None);
                (h, last, got.v, got.lambda)
            };
            assert_eq!(run(&diagonal), run(&zeros));
        }
    }

    /// A problem from bytes, against the equation.
    pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
        check(&bytes.offsets(9), bytes.number(1, 35));
    }

    #[test]
    fn fewer_instructions_match_as_well() {
        crate::testing::with_fewer_instructions(&[states_and_gradients_match_the_equation]);
    }
}
