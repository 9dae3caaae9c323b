//! A kernel's node in the graph of burn-autodiff.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, AutodiffBackend, Flex};
use burn::tensor::DType;

use super::{
    Array, Borrowed, Kernel, Primitive, Tracked, View, bytes, contiguous, dims, primitive, run,
    values,
};
use crate::profile::{self, Pass};

/// Gradients of several outputs, on their way to the backward that needs all of them; empty where there is one output.
type Slots = Arc<Mutex<Vec<Option<Primitive>>>>;

/// What a node keeps for its backward.
#[derive(Clone, Debug)]
struct State {
    kernel: Arc<dyn Kernel>,
    shapes: Arc<Vec<Vec<usize>>>,
    /// The inputs that are read again.
    inputs: Arc<Vec<Option<Primitive>>>,
    /// The first output, where the kernel keeps it.
    output: Option<Primitive>,
    saved: Arc<Vec<Array>>,
    slots: Slots,
}

#[derive(Debug)]
struct Whole;

impl<const N: usize> Backward<Flex, N> for Whole {
    type State = State;

    fn backward(self, ops: Ops<State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let own = grads.consume::<Flex>(&ops.node);
        let state = ops.state;
        let outputs: Vec<Option<Primitive>> = {
            let mut slots = state.slots.lock().unwrap_or_else(PoisonError::into_inner);
            match slots.is_empty() {
                true => vec![Some(own)],
                false => slots.iter_mut().map(Option::take).collect(),
            }
        };
        let outputs: Vec<Option<Primitive>> = outputs
            .into_iter()
            .map(|grad| grad.map(|grad| contiguous(&grad)))
            .collect();
        let shapes: Vec<Vec<usize>> = outputs
            .iter()
            .map(|grad| grad.as_ref().map(dims).unwrap_or_default())
            .collect();
        let grad_views: Vec<Option<View>> = outputs
            .iter()
            .zip(&shapes)
            .map(|(grad, shape)| {
                grad.as_ref().map(|grad| View {
                    shape,
                    data: values(grad),
                })
            })
            .collect();
        let output = Borrowed::new(state.output.as_slice());
        let mut saved = output.views();
        saved.extend(state.saved.iter().map(Array::view));
        let inputs = Borrowed {
            shapes: state.shapes.to_vec(),
            data: state
                .inputs
                .iter()
                .map(|input| input.as_ref().map_or(&[][..], values))
                .collect(),
        };
        let (kernel, views) = (&*state.kernel, inputs.views());
        let size = |made: &Vec<Option<Array>>| {
            let read = inputs
                .data
                .iter()
                .copied()
                .chain(saved.iter().map(|saved| saved.data));
            let given = grad_views.iter().flatten().map(|grad| grad.data);
            let written = made.iter().flatten().map(|array| &array.data[..]);
            [
                bytes(read.chain(given).chain(written)),
                kernel.flops(&views)[1],
            ]
        };
        let result = profile::span(kernel.name(), Pass::Backward, size, || {
            kernel.backward(&views, &saved, &grad_views)
        });
        assert_eq!(
            result.len(),
            N,
            "{:?} returned {} gradients for {N} inputs",
            state.kernel,
            result.len()
        );
        let mut made: Vec<Option<Primitive>> = Vec::with_capacity(N);
        for (index, (grad, input)) in result.into_iter().zip(&inputs.shapes).enumerate() {
            made.push(match (grad, kernel.same_gradient(index)) {
                (Some(grad), _) => {
                    assert_eq!(&grad.shape, input, "gradient shape of {:?}", state.kernel);
                    Some(primitive(grad))
                }
                (None, Some(other)) => made[other].clone(),
                (None, None) => None,
            });
        }
        for ((parent, grad), input) in ops.parents.into_iter().zip(made).zip(&inputs.shapes) {
            if let Some(parent) = parent {
                grads.register::<Flex>(parent.id, grad.unwrap_or_else(|| zeros(input)));
            }
        }
    }
}

fn zeros(shape: &[usize]) -> Primitive {
    Primitive::zeros(shape.to_vec().into(), DType::F32)
}

/// One of several outputs: hands its gradient over and wakes the node of the op, which has no value and so no gradient of
/// its own.
#[derive(Debug)]
struct OneOf;

impl Backward<Flex, 1> for OneOf {
    type State = (Slots, usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (slots, index) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        slots.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(grad);
        if let [Some(op)] = ops.parents {
            grads.register::<Flex>(op.id, zeros(&[1]));
        }
    }
}

/// Runs the kernel and records its backward where an input is tracked.
pub(super) fn record<C: CheckpointStrategy, const N: usize>(
    kernel: Arc<dyn Kernel>,
    inputs: [Tracked; N],
) -> Vec<Tracked> {
    let nodes = inputs.each_ref().map(|input| input.node());
    let primitives: Vec<Primitive> = inputs
        .iter()
        .map(|input| contiguous(input.primitive()))
        .collect();
    match Backward::<Flex, N>::prepare::<C>(Whole, nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::UnTracked(prep) => {
            let mut outputs = run(&*kernel, &primitives, false).outputs.into_iter();
            let first = outputs.next().map(primitive).map(|y| prep.finish(y));
            let rest = outputs
                .map(|array| <Autodiff<Flex> as AutodiffBackend>::from_inner(primitive(array)));
            first.into_iter().chain(rest).collect()
        }
        OpsKind::Tracked(prep) => {
            let forward = run(&*kernel, &primitives, true);
            let mut outputs: Vec<Primitive> = forward.outputs.into_iter().map(primitive).collect();
            let kept = kernel.keeps_output().then(|| outputs[0].clone());
            let several = outputs.len() > 1;
            let slots: Slots = Arc::new(Mutex::new(match several {
                true => vec![None; outputs.len()],
                false => Vec::new(),
            }));
            let shapes = primitives.iter().map(dims).collect();
            let again = |(index, input)| kernel.reads_again(index).then_some(input);
            let inputs = primitives.into_iter().enumerate().map(again).collect();
            let state = State {
                output: kept,
                shapes: Arc::new(shapes),
                inputs: Arc::new(inputs),
                kernel,
                saved: Arc::new(forward.saved),
                slots: slots.clone(),
            };
            if !several {
                let Some(output) = outputs.pop() else {
                    panic!("{:?} has no output", state.kernel)
                };
                return vec![prep.finish(state, output)];
            }
            let op = prep.finish(state, zeros(&[1]));
            let mut all = Vec::with_capacity(outputs.len());
            for (index, output) in outputs.into_iter().enumerate() {
                let one = match Backward::<Flex, 1>::prepare::<C>(OneOf, [op.node()])
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => prep.finish((slots.clone(), index), output),
                    OpsKind::UnTracked(prep) => prep.finish(output),
                };
                all.push(one);
            }
            all
        }
    }
}
