//! Functions of which nothing is kept but what goes in or comes out: the backward pass runs them again.
//!
//! [`recomputed`] keeps the input of one function (Chen et al., 2016, arXiv 1604.06174). [`reversible`] keeps only the
//! last values of two streams to which functions of each other were added in turn, and takes the additions back one by
//! one (Gomez et al., RevNet, 2017, arXiv 1707.04585). Both give the gradients of the same function kept whole, up to
//! rounding, for one more forward pass. A function is run on parameters of its own in that pass ([`crate::Param`] hands
//! out copies that count as leaves), so that the graph around it is not touched.
//!
//! Choices that rounding could turn (which bucket, which expert) are made once: [`decided`] notes them in the forward
//! pass and gives them back when the function is run again.

mod node;
mod scope;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::adapter::{is_tracked, on_cpu};
pub use scope::{Choices, decided, given, noted};
pub(crate) use scope::{in_scope, off_record};

/// What a function gives.
#[derive(Clone, Debug)]
pub struct Given {
    /// Of the shape of the input.
    pub y: Tensor<3>,
    /// A loss `[1]` that it wants added, where there is one.
    pub loss: Option<Tensor<1>>,
}

/// A function of `[batch, time, dim]` to the same shape that depends on nothing else but parameters, so that it can be run
/// again.
pub type Function<E> = Arc<dyn Fn(Tensor<3>) -> Result<Given, E> + Send + Sync>;

thread_local! {
    static KEPT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` with every function of this thread kept whole: what tests hold the others against.
pub fn kept<T>(work: impl FnOnce() -> T) -> T {
    let before = KEPT.replace(true);
    let result = work();
    KEPT.set(before);
    result
}

/// Whether a function of `x` is run again instead of being kept.
fn runs_again(x: &Tensor<3>) -> bool {
    is_tracked(x) && on_cpu(x) && !KEPT.get()
}

/// The sum of losses, some of which may be absent.
fn sum(losses: impl IntoIterator<Item = Option<Tensor<1>>>) -> Option<Tensor<1>> {
    losses.into_iter().flatten().reduce(|a, b| a + b)
}

/// `function(x)`, of which `x` alone is kept for the backward pass. Where nothing is tracked, and on devices other than the
/// CPU, it is a plain call.
pub fn recomputed<E>(x: Tensor<3>, function: &Function<E>) -> Result<Given, E>
where
    E: std::fmt::Display + 'static,
{
    if !runs_again(&x) {
        return function(x);
    }
    match node::recomputed(x.clone(), function)? {
        Some(given) => Ok(given),
        None => function(x),
    }
}

/// Adds functions of one stream to the other in turn: for each `(to, f)` in order, `x[to] += f(x[1 - to])`, with `to` 0 or 1.
/// Returns the streams and the sum of the functions' losses. No more is kept for the backward pass than the streams as
/// they come out and go in. Where nothing is tracked, and on devices other than the CPU, plain calls.
pub fn reversible<E>(
    streams: [Tensor<3>; 2],
    functions: &[(usize, Function<E>)],
) -> Result<([Tensor<3>; 2], Option<Tensor<1>>), E>
where
    E: std::fmt::Display + 'static,
{
    if streams.iter().any(runs_again) && !functions.is_empty() {
        let held = node::reversible(streams.clone(), functions)?;
        if let Some(given) = held {
            return Ok(given);
        }
    }
    added(streams, functions)
}

/// The additions of [`reversible`], kept whole.
fn added<E>(
    mut streams: [Tensor<3>; 2],
    functions: &[(usize, Function<E>)],
) -> Result<([Tensor<3>; 2], Option<Tensor<1>>), E> {
    let mut losses = Vec::new();
    for (to, function) in functions {
        let Given { y, loss } = function(streams[1 - to].clone())?;
        streams[*to] = streams[*to].clone() + y;
        losses.push(loss);
    }
    Ok((streams, sum(losses)))
}
