//! The forward pass with memory of its own for the final states, as tests call it.

use super::{Gate, Problem, Write};

/// What [`forward`] gives.
pub struct Whole {
    pub o: Vec<f32>,
    pub final_state: Vec<f32>,
    pub chunk_states: Vec<f32>,
}

/// As [`super::forward`]; the final states begin as NaN, which must not be seen.
pub fn forward(
    problem: &Problem,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    gate: Gate,
    write: Write,
    initial: Option<&[f32]>,
    save: bool,
) -> Whole {
    let mut final_state = vec![f32::NAN; problem.sequences() * problem.heads * problem.state()];
    let state = &mut final_state[..];
    let super::Output { o, chunk_states } =
        super::forward(problem, q, k, v, gate, write, initial, save, state);
    Whole {
        o,
        final_state,
        chunk_states,
    }
}
