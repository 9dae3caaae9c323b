//! What parameters and choices are while a function is run for [`super::recomputed`] and [`super::reversible`].

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::param::Param;

/// Choices in the order in which they were made.
pub type Choices = VecDeque<Arc<Vec<u32>>>;

/// One run of a function.
enum Run {
    /// The forward pass: nothing is recorded, choices are noted.
    Forward(Choices),
    /// Again, in the backward pass: parameters are leaves of their own, choices are given back.
    Again {
        leaves: BTreeMap<usize, (Param, Tensor<1>)>,
        choices: Choices,
    },
    /// A plain pass whose choices are noted.
    Noted(Choices),
    /// A plain pass that makes the choices of another.
    Given(Choices),
}

/// Runs `work` and returns with its result the choices that it made ([`decided`]).
pub fn noted<T>(work: impl FnOnce() -> T) -> (T, Choices) {
    let scope = Scope::new(Run::Noted(Choices::new()));
    let result = work();
    (result, scope.take_choices())
}

/// Runs `work` with the choices that another run made: how a function with jumps is held against differences.
pub fn given<T>(choices: Choices, work: impl FnOnce() -> T) -> T {
    let _scope = Scope::new(Run::Given(choices));
    work()
}

thread_local! {
    static RUNS: RefCell<Vec<Run>> = const { RefCell::new(Vec::new()) };
}

/// Ends a run when it goes out of scope, by a panic too.
pub(crate) struct Scope {
    depth: usize,
}

impl Scope {
    fn new(run: Run) -> Self {
        RUNS.with_borrow_mut(|runs| {
            runs.push(run);
            Scope { depth: runs.len() }
        })
    }

    /// A forward pass of which nothing is recorded.
    pub(crate) fn forward() -> Self {
        Self::new(Run::Forward(Choices::new()))
    }

    /// A pass whose parameters are leaves of their own, with the choices of the forward pass.
    pub(crate) fn again(choices: Choices) -> Self {
        let leaves = BTreeMap::new();
        Self::new(Run::Again { leaves, choices })
    }

    /// Choices noted so far, which are forgotten.
    pub(crate) fn take_choices(&self) -> Choices {
        RUNS.with_borrow_mut(|runs| match &mut runs[self.depth - 1] {
            Run::Forward(choices)
            | Run::Again { choices, .. }
            | Run::Noted(choices)
            | Run::Given(choices) => std::mem::take(choices),
        })
    }

    /// The parameters that were asked for, with the leaves that stood for them; the run ends.
    pub(crate) fn into_leaves(self) -> Vec<(Param, Tensor<1>)> {
        RUNS.with_borrow_mut(|runs| match &mut runs[self.depth - 1] {
            Run::Again { leaves, .. } => std::mem::take(leaves).into_values().collect(),
            _ => Vec::new(),
        })
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        RUNS.with_borrow_mut(|runs| runs.truncate(self.depth - 1));
    }
}

/// What a parameter of that value is to whoever asks now.
pub(crate) fn in_scope(param: &Param, value: Tensor<1>) -> Tensor<1> {
    let counts = |run: &&mut Run| !matches!(run, Run::Noted(_) | Run::Given(_));
    RUNS.with_borrow_mut(|runs| match runs.iter_mut().rev().find(counts) {
        None | Some(Run::Noted(_) | Run::Given(_)) => value,
        Some(_) if !value.device().is_autodiff() => value,
        Some(Run::Forward(_)) => value.inner(),
        Some(Run::Again { .. }) if !param.trainable() => Tensor::from_inner(value.inner()),
        Some(Run::Again { leaves, .. }) => {
            let leaf = || Tensor::from_inner(value.inner()).require_grad();
            let held = leaves.entry(param.address());
            held.or_insert_with(|| (param.clone(), leaf())).1.clone()
        }
    })
}

/// Whether the pass of this thread records nothing whatever the parameters say.
pub(crate) fn off_record() -> bool {
    let counts = |run: &&Run| !matches!(run, Run::Noted(_) | Run::Given(_));
    RUNS.with_borrow(|runs| matches!(runs.iter().rev().find(counts), Some(Run::Forward(_))))
}

/// A choice that the backward pass must not make anew, where rounding may turn it: `choose()`, or, when a function is run
/// again, what it chose in the forward pass.
pub fn decided(choose: impl FnOnce() -> Vec<u32>) -> Arc<Vec<u32>> {
    // A function run again may hold others, whose forward pass is then run: they note what they are given.
    let given = RUNS.with_borrow_mut(|runs| {
        runs.iter_mut().rev().find_map(|run| match run {
            Run::Again { choices, .. } | Run::Given(choices) => Some(choices.pop_front()),
            Run::Forward(_) | Run::Noted(_) => None,
        })
    });
    let choice = match given {
        Some(Some(choice)) => choice,
        Some(None) | None => Arc::new(choose()),
    };
    RUNS.with_borrow_mut(|runs| {
        for run in runs.iter_mut().rev() {
            match run {
                Run::Forward(choices) | Run::Noted(choices) => choices.push_back(choice.clone()),
                Run::Again { .. } | Run::Given(_) => break,
            }
        }
    });
    choice
}
