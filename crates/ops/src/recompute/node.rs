//! The nodes of the autodiff graph behind [`super::recomputed`] and [`super::reversible`].

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{
    BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, Flex,
    GradientCheckpointingStrategy,
};
use burn::tensor::Tensor;

use super::scope::{Choices, Scope, in_scope};
use super::{Function, Given, added};
use crate::adapter::{Erased, Primitive, Tracked, erase, plain, tracked};
use crate::param::Param;

/// A function whose errors cannot happen: it has run before on the same input.
type Sure = Arc<dyn Fn(Tensor<3>) -> Given + Send + Sync>;

fn sure<E: std::fmt::Display + 'static>(function: &Function<E>) -> Sure {
    let function = function.clone();
    Arc::new(move |x| match function(x) {
        Ok(given) => given,
        Err(error) => panic!("a function that ran forward fails when it is run again: {error}"),
    })
}

fn to_primitive<const D: usize>(x: Tensor<D>) -> Primitive {
    plain(erase(x))
}

fn to_tensor<const D: usize>(x: Primitive) -> Tensor<D> {
    let tensor = DispatchTensor {
        kind: DispatchTensorKind::Flex(BackendTensor::Float(x)),
        autodiff: DispatchAutodiffContext::Disabled,
    };
    Erased(tensor).into_tensor()
}

/// What a function gave when it was run again.
struct Pulled {
    y: Tensor<3>,
    dx: Tensor<3>,
}

/// Runs `function` at `x` again and hands the gradients `dy` and `dloss` through it: those of the parameters go to `grads`,
/// that of `x` is returned.
fn pull(
    function: &Sure,
    choices: Choices,
    x: Tensor<3>,
    (dy, dloss): (Tensor<3>, Option<Tensor<1>>),
    grads: &mut Gradients,
) -> Pulled {
    let scope = Scope::again(choices);
    let leaf = Tensor::from_inner(x).require_grad();
    let Given { y, loss } = function(leaf.clone());
    let value = y.clone().inner();
    // A gradient is handed on by the product with it. The leaf takes part even where the function does not read it.
    let zero = leaf.clone().slice([0..1, 0..1, 0..1]).reshape([1]) * 0.0;
    let mut total = zero + (y * Tensor::from_inner(dy)).sum();
    if let (Some(loss), Some(dloss)) = (loss, dloss) {
        total = total + loss * Tensor::from_inner(dloss);
    }
    let inner = total.backward();
    let dx = leaf.grad(&inner).unwrap_or_else(|| value.zeros_like());
    let gradients: Vec<(Param, Primitive)> = scope
        .into_leaves()
        .into_iter()
        .filter_map(|(param, leaf)| Some((param, to_primitive(leaf.grad(&inner)?))))
        .collect();
    for (param, gradient) in gradients {
        // Another run may be around this one, whose leaf the parameter then is.
        let held = in_scope(&param, param.leaf());
        grads.register::<Flex>(tracked(erase(held)).id(), gradient);
    }
    Pulled { y: value, dx }
}

/// Tensors end to end; one alone as it is.
fn flat(parts: Vec<Tensor<1>>) -> Tensor<1> {
    match parts.len() {
        1 => parts.into_iter().next(),
        _ => Some(Tensor::cat(parts, 0)),
    }
    .unwrap_or_else(|| unreachable!("a part at least"))
}

/// Streams of `shape` and a loss, end to end: the node's one output.
fn packed<const N: usize>(y: [Tensor<3>; N], loss: Option<Tensor<1>>) -> Tensor<1> {
    let count = y[0].dims().iter().product::<usize>();
    let streams = y.map(|y| y.reshape([count]));
    flat(streams.into_iter().chain(loss).collect())
}

/// The reverse of [`packed`], and of gradients too.
fn parts<const N: usize>(all: Tensor<1>, shape: [usize; 3]) -> ([Tensor<3>; N], Option<Tensor<1>>) {
    let count = shape.iter().product::<usize>();
    let stream = |at: usize| all.clone().narrow(0, at * count, count).reshape(shape);
    let loss = all.dims()[0] > N * count;
    let streams = std::array::from_fn(stream);
    (streams, loss.then(|| all.clone().narrow(0, N * count, 1)))
}

/// Records a node; `None` where no input needs a gradient.
fn record<B: Backward<Flex, N>, const N: usize>(
    backward: B,
    inputs: &[Tracked; N],
    context: DispatchAutodiffContext,
    output: Tensor<1>,
    state: B::State,
) -> Option<Tensor<1>> {
    fn under<C: CheckpointStrategy, B: Backward<Flex, N>, const N: usize>(
        backward: B,
        inputs: &[Tracked; N],
        output: Primitive,
        state: B::State,
    ) -> Option<Tracked> {
        let nodes = inputs.each_ref().map(|input| input.node());
        match backward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => Some(prep.finish(state, output)),
            OpsKind::UnTracked(_) => None,
        }
    }
    let output = to_primitive(output);
    let tensor = match context {
        DispatchAutodiffContext::Enabled(GradientCheckpointingStrategy::Balanced) => {
            under::<BalancedCheckpointing, B, N>(backward, inputs, output, state)
        }
        _ => under::<NoCheckpointing, B, N>(backward, inputs, output, state),
    };
    let inner = DispatchTensorKind::Flex(BackendTensor::Autodiff(tensor?));
    let kind = DispatchTensorKind::Autodiff(inner.into());
    let tensor = Erased(DispatchTensor {
        kind,
        autodiff: context,
    });
    Some(tensor.into_tensor())
}

#[derive(Debug)]
struct Again;

/// What [`Again`] needs.
#[derive(Clone)]
struct Once {
    function: Sure,
    choices: Choices,
    x: Tensor<3>,
}

impl std::fmt::Debug for Once {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Once({:?})", self.x.dims())
    }
}

impl Backward<Flex, 1> for Again {
    type State = Once;

    fn backward(self, ops: Ops<Once, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let all = to_tensor::<1>(grads.consume::<Flex>(&ops.node));
        let Once {
            function,
            choices,
            x,
        } = ops.state;
        let ([dy], dloss) = parts(all, x.dims());
        let pulled = pull(&function, choices, x, (dy, dloss), grads);
        if let [Some(parent)] = ops.parents {
            grads.register::<Flex>(parent.id, to_primitive(pulled.dx));
        }
    }
}

/// As [`super::recomputed`]; `None` where `x` needs no gradient.
pub(super) fn recomputed<E: std::fmt::Display + 'static>(
    x: Tensor<3>,
    function: &Function<E>,
) -> Result<Option<Given>, E> {
    let shape = x.dims();
    let x = erase(x);
    let context = x.0.autodiff;
    let x = tracked(x);
    let value = to_tensor::<3>(x.primitive().clone());
    let scope = Scope::forward();
    let given = function(value.clone())?;
    let state = Once {
        function: sure(function),
        choices: scope.take_choices(),
        x: value,
    };
    drop(scope);
    let output = packed([given.y], given.loss);
    let held = record(Again, &[x], context, output, state);
    Ok(held.map(|held| {
        let ([y], loss) = parts(held, shape);
        Given { y, loss }
    }))
}

#[derive(Debug)]
struct Back;

/// What [`Back`] needs.
#[derive(Clone)]
struct Streams {
    functions: Vec<(usize, Sure, Choices)>,
    y: [Tensor<3>; 2],
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape = self.y[0].dims();
        write!(f, "Streams({} of {shape:?})", self.functions.len())
    }
}

impl Backward<Flex, 2> for Back {
    type State = Streams;

    fn backward(self, ops: Ops<Streams, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let all = to_tensor::<1>(grads.consume::<Flex>(&ops.node));
        let Streams { functions, mut y } = ops.state;
        let (mut dy, dloss) = parts::<2>(all, y[0].dims());
        for (to, function, choices) in functions.into_iter().rev() {
            let from = 1 - to;
            let given = (dy[to].clone(), dloss.clone());
            let pulled = pull(&function, choices, y[from].clone(), given, grads);
            y[to] = y[to].clone() - pulled.y;
            dy[from] = dy[from].clone() + pulled.dx;
        }
        for (parent, dx) in ops.parents.into_iter().zip(dy) {
            if let Some(parent) = parent {
                grads.register::<Flex>(parent.id, to_primitive(dx));
            }
        }
    }
}

/// Two streams and the losses of what was added to them.
type Added = ([Tensor<3>; 2], Option<Tensor<1>>);

/// As [`super::reversible`]; `None` where no stream needs a gradient.
pub(super) fn reversible<E: std::fmt::Display + 'static>(
    streams: [Tensor<3>; 2],
    functions: &[(usize, Function<E>)],
) -> Result<Option<Added>, E> {
    let shape = streams[0].dims();
    let streams = streams.map(erase);
    let context = streams[0].0.autodiff.merge(streams[1].0.autodiff);
    let streams = streams.map(tracked);
    let value = |x: &Tracked| to_tensor::<3>(x.primitive().clone());
    let mut y = streams.each_ref().map(value);
    let (mut losses, mut held) = (Vec::new(), Vec::new());
    for (to, function) in functions {
        let scope = Scope::forward();
        let (now, loss) = added(y, std::slice::from_ref(&(*to, function.clone())))?;
        y = now;
        losses.push(loss);
        held.push((*to, sure(function), scope.take_choices()));
    }
    let state = Streams {
        functions: held,
        y: y.clone(),
    };
    let output = packed(y, super::sum(losses));
    let held = record(Back, &streams, context, output, state);
    Ok(held.map(|held| parts(held, shape)))
}
