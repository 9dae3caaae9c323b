//! The adapter through which a kernel becomes a differentiable op.
//!
//! A kernel author writes a forward and a backward over slices, once, with any number of inputs, outputs and saved
//! arrays ([`Kernel`]), and calls [`apply`]. burn-autodiff knows one output node per op, so outputs after the first
//! become nodes of their own whose only parent is the first: each hands its gradient over through a slot, and the
//! first node's backward reads all the slots. First order only.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{
    Autodiff, AutodiffBackend, BackendTensor, DispatchAutodiffContext, DispatchDevice,
    DispatchTensor, DispatchTensorKind, Flex, GradientCheckpointingStrategy, tensor::FloatTensor,
};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::profile::{self, Pass};

pub(crate) type Primitive = FloatTensor<Flex>;
pub(crate) type Tracked = FloatTensor<Autodiff<Flex>>;

/// A borrowed, contiguous, row-major f32 array.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Extent of each dimension.
    pub shape: &'a [usize],
    /// `shape.iter().product()` values.
    pub data: &'a [f32],
}

/// An owned, contiguous, row-major f32 array.
#[derive(Clone, Debug)]
pub struct Array {
    /// Extent of each dimension.
    pub shape: Vec<usize>,
    /// `shape.iter().product()` values.
    pub data: Vec<f32>,
}

impl Array {
    /// Wraps `data`; panics when its length is not the product of `shape`.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(
            shape.iter().product::<usize>(),
            data.len(),
            "array of shape {shape:?} holds {} values",
            data.len()
        );
        Array { shape, data }
    }

    /// Borrows the array.
    pub fn view(&self) -> View<'_> {
        View {
            shape: &self.shape,
            data: &self.data,
        }
    }
}

/// What [`Kernel::forward`] returns.
#[derive(Debug)]
pub struct Forward {
    /// At least one output.
    pub outputs: Vec<Array>,
    /// Arrays that [`Kernel::backward`] wants back; empty when nothing is saved.
    pub saved: Vec<Array>,
}

/// A forward and a backward over slices. Non-differentiable arguments are fields of the implementing struct.
pub trait Kernel: Debug + Send + Sync + 'static {
    /// Computes the outputs. `save` is false when no gradient will be asked for: `saved` may stay empty then.
    fn forward(&self, inputs: &[View], save: bool) -> Forward;

    /// Computes one gradient per input, `None` standing for zero. `grads[i]` belongs to output `i`; `None` there means
    /// that the output was not used.
    fn backward(
        &self,
        inputs: &[View],
        saved: &[View],
        grads: &[Option<View>],
    ) -> Vec<Option<Array>>;

    /// Operations of the forward and of the backward pass, one multiply-add being two; zero where they are few beside the
    /// bytes that are moved.
    fn flops(&self, _inputs: &[View]) -> [u64; 2] {
        [0, 0]
    }

    /// True when [`Kernel::backward`] wants the first output back: it then is the first of the saved arrays, and no copy of it
    /// is made.
    fn keeps_output(&self) -> bool {
        false
    }

    /// Bytes that the forward pass reads beside its inputs.
    fn own_bytes(&self) -> u64 {
        0
    }

    /// What profiles call it.
    fn name(&self) -> &'static str {
        profile::short(std::any::type_name::<Self>())
    }
}

/// Bytes of arrays.
fn bytes<'a>(lengths: impl IntoIterator<Item = &'a [f32]>) -> u64 {
    lengths.into_iter().map(|data| 4 * data.len() as u64).sum()
}

/// A float tensor whose rank is forgotten, so that inputs of different ranks share one array.
#[derive(Clone, Debug)]
pub struct Erased(pub(crate) DispatchTensor);

/// Forgets the rank of `tensor`.
pub fn erase<const D: usize>(tensor: Tensor<D>) -> Erased {
    Erased(tensor.into_dispatch())
}

impl Erased {
    /// Remembers the rank; panics when it is not `D`.
    pub fn into_tensor<const D: usize>(self) -> Tensor<D> {
        Tensor::from_dispatch(self.0)
    }
}

thread_local! {
    static PORTABLE: Cell<bool> = const { Cell::new(false) };
}

/// Cumulative lengths of the sequences of an input `[batch, time, ..]`: those given, or one sequence for each row.
pub fn sequences(offsets: Option<&Arc<Vec<usize>>>, batch: usize, time: usize) -> Arc<Vec<usize>> {
    match offsets {
        Some(offsets) => offsets.clone(),
        None => Arc::new((0..=batch).map(|row| row * time).collect()),
    }
}

/// `len` values as `fill` leaves them. They are not zeroed first, which for large arrays takes as long as filling them.
///
/// # Safety
/// `fill` writes every value and reads none before it is written.
#[allow(unsafe_code)]
pub(crate) unsafe fn filled(len: usize, fill: impl FnOnce(&mut [f32])) -> Vec<f32> {
    // Tests see what a kernel forgets.
    if cfg!(test) {
        let mut values = vec![f32::NAN; len];
        fill(&mut values);
        return values;
    }
    let mut values: Vec<std::mem::MaybeUninit<f32>> = Vec::with_capacity(len);
    // SAFETY: values that may be uninitialised need no initialisation; both types have the same layout; the caller promises
    // that `fill` only writes, and writes all.
    unsafe {
        values.set_len(len);
        let mut values = std::mem::ManuallyDrop::new(values);
        let start = values.as_mut_ptr().cast::<f32>();
        fill(std::slice::from_raw_parts_mut(start, len));
        Vec::from_raw_parts(start, len, values.capacity())
    }
}

/// The values of a gradient, zero where the output was not used.
pub(crate) fn or_zeros<'a>(grad: Option<View<'a>>, count: usize) -> Cow<'a, [f32]> {
    match grad {
        Some(grad) => Cow::Borrowed(grad.data),
        None => Cow::Owned(vec![0.0; count]),
    }
}

/// Runs `work` with every op of this thread in its composed, portable form, whatever the device: how tests hold the
/// kernels against the form that other backends run.
pub fn portable<T>(work: impl FnOnce() -> T) -> T {
    let before = PORTABLE.with(|portable| portable.replace(true));
    let result = work();
    PORTABLE.with(|portable| portable.set(before));
    result
}

/// Whether ops of this thread take their portable form.
pub(crate) fn is_portable() -> bool {
    PORTABLE.with(Cell::get)
}

/// True when kernels apply to tensors of `device`; otherwise an op takes its composed, portable form.
pub fn device_is_cpu(device: &Device) -> bool {
    !PORTABLE.with(Cell::get)
        && matches!(
            device.clone().inner().as_dispatch(),
            DispatchDevice::Flex(_)
        )
}

/// True when kernels apply to `tensor`.
pub fn on_cpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    device_is_cpu(&tensor.device())
}

/// Runs `kernel` on CPU tensors and records its backward where an input is tracked.
///
/// Panics when an input is not an f32 tensor of the CPU backend: callers ask [`on_cpu`] first.
pub fn apply<const N: usize>(kernel: impl Kernel, inputs: [Erased; N]) -> Vec<Erased> {
    let kernel: Arc<dyn Kernel> = Arc::new(kernel);
    let context = inputs
        .iter()
        .map(|input| input.0.autodiff)
        .fold(DispatchAutodiffContext::Disabled, |a, b| a.merge(b));
    match context {
        DispatchAutodiffContext::Disabled => {
            let inputs: Vec<Primitive> = inputs.into_iter().map(plain).collect();
            run(&*kernel, &inputs, false)
                .outputs
                .into_iter()
                .map(|array| {
                    Erased(DispatchTensor {
                        kind: DispatchTensorKind::Flex(BackendTensor::Float(primitive(array))),
                        autodiff: context,
                    })
                })
                .collect()
        }
        DispatchAutodiffContext::Enabled(strategy) => {
            let inputs = inputs.map(tracked);
            let outputs = match strategy {
                GradientCheckpointingStrategy::Disabled => {
                    record::<NoCheckpointing, N>(kernel, inputs)
                }
                GradientCheckpointingStrategy::Balanced => {
                    record::<BalancedCheckpointing, N>(kernel, inputs)
                }
            };
            outputs
                .into_iter()
                .map(|tensor| {
                    let inner = DispatchTensorKind::Flex(BackendTensor::Autodiff(tensor));
                    Erased(DispatchTensor {
                        kind: DispatchTensorKind::Autodiff(inner.into()),
                        autodiff: context,
                    })
                })
                .collect()
        }
    }
}

/// True when gradients may flow through `tensor`.
pub fn is_tracked<const D: usize>(tensor: &Tensor<D>) -> bool {
    let erased = erase(tensor.clone());
    matches!(erased.0.autodiff, DispatchAutodiffContext::Enabled(_))
}

/// Reads the values of a CPU tensor without gradients, in place where they are contiguous.
pub(crate) fn with_values<T>(input: Erased, read: impl FnOnce(&[f32]) -> T) -> T {
    read(values(&contiguous(&plain(input))))
}

fn wrong_backend(kind: &DispatchTensorKind) -> ! {
    panic!("a CPU kernel was given a tensor of another backend: {kind:?}")
}

pub(crate) fn plain(input: Erased) -> Primitive {
    match input.0.kind {
        DispatchTensorKind::Flex(BackendTensor::Float(tensor)) => tensor,
        ref kind => wrong_backend(kind),
    }
}

pub(crate) fn tracked(input: Erased) -> Tracked {
    match input.0.kind {
        DispatchTensorKind::Flex(BackendTensor::Float(tensor)) => {
            <Autodiff<Flex> as AutodiffBackend>::from_inner(tensor)
        }
        DispatchTensorKind::Autodiff(inner) => match *inner {
            DispatchTensorKind::Flex(BackendTensor::Autodiff(tensor)) => tensor,
            ref kind => wrong_backend(kind),
        },
        #[allow(unreachable_patterns)]
        ref kind => wrong_backend(kind),
    }
}

fn primitive(array: Array) -> Primitive {
    Primitive::from_data(TensorData::new(array.data, array.shape))
}

/// The dimensions and values of contiguous tensors, borrowed.
struct Borrowed<'a> {
    shapes: Vec<Vec<usize>>,
    data: Vec<&'a [f32]>,
}

impl<'a> Borrowed<'a> {
    fn new(tensors: &'a [Primitive]) -> Self {
        Borrowed {
            shapes: tensors.iter().map(dims).collect(),
            data: tensors.iter().map(values).collect(),
        }
    }

    fn views(&self) -> Vec<View<'_>> {
        self.shapes
            .iter()
            .zip(&self.data)
            .map(|(shape, data)| View { shape, data })
            .collect()
    }
}

fn dims(tensor: &Primitive) -> Vec<usize> {
    tensor.layout().shape().iter().copied().collect()
}

fn values(tensor: &Primitive) -> &[f32] {
    match tensor.as_slice::<f32>() {
        Some(values) => values,
        None => panic!("tensor is not contiguous: {:?}", tensor.layout()),
    }
}

fn contiguous(tensor: &Primitive) -> Primitive {
    assert_eq!(
        tensor.dtype(),
        DType::F32,
        "CPU kernels take f32 tensors; cast first"
    );
    tensor.to_contiguous()
}

fn run(kernel: &dyn Kernel, inputs: &[Primitive], save: bool) -> Forward {
    let inputs: Vec<Primitive> = inputs.iter().map(contiguous).collect();
    let inputs = Borrowed::new(&inputs);
    let views = inputs.views();
    let size = |made: &Forward| {
        let written = made.outputs.iter().chain(&made.saved);
        let moved =
            bytes(inputs.data.iter().copied()) + bytes(written.map(|array| &array.data[..]));
        [moved + kernel.own_bytes(), kernel.flops(&views)[0]]
    };
    profile::span(kernel.name(), Pass::Forward, size, || {
        kernel.forward(&views, save)
    })
}

/// Gradients of the outputs after the first, on their way to the first node's backward.
type Slots = Arc<Mutex<Vec<Option<Primitive>>>>;

/// What the first output's node keeps for its backward.
#[derive(Clone, Debug)]
struct State {
    kernel: Arc<dyn Kernel>,
    inputs: Arc<Vec<Primitive>>,
    /// The first output, where the kernel keeps it.
    output: Option<Primitive>,
    saved: Arc<Vec<Array>>,
    slots: Slots,
}

#[derive(Debug)]
struct First;

impl<const N: usize> Backward<Flex, N> for First {
    type State = State;

    fn backward(self, ops: Ops<State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let mut outputs = vec![Some(grads.consume::<Flex>(&ops.node))];
        let state = ops.state;
        {
            let mut slots = state.slots.lock().unwrap_or_else(PoisonError::into_inner);
            outputs.extend(slots.iter_mut().map(Option::take));
        }
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
        let inputs = Borrowed::new(&state.inputs);
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
        for ((parent, grad), input) in ops.parents.into_iter().zip(result).zip(&inputs.shapes) {
            let Some(parent) = parent else { continue };
            let grad = match grad {
                Some(grad) => {
                    assert_eq!(&grad.shape, input, "gradient shape of {:?}", state.kernel);
                    primitive(grad)
                }
                None => zeros(input),
            };
            grads.register::<Flex>(parent.id, grad);
        }
    }
}

fn zeros(shape: &[usize]) -> Primitive {
    Primitive::zeros(shape.to_vec().into(), DType::F32)
}

/// An output after the first: hands its gradient over and wakes the first node, which may have no gradient of its own.
#[derive(Debug)]
struct Later;

impl Backward<Flex, 1> for Later {
    type State = (Slots, usize, Vec<usize>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (slots, index, first_shape) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        slots.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(grad);
        if let [Some(first)] = ops.parents {
            grads.register::<Flex>(first.id, zeros(&first_shape));
        }
    }
}

fn record<C: CheckpointStrategy, const N: usize>(
    kernel: Arc<dyn Kernel>,
    inputs: [Tracked; N],
) -> Vec<Tracked> {
    let nodes = inputs.each_ref().map(|input| input.node());
    let primitives: Vec<Primitive> = inputs
        .iter()
        .map(|input| contiguous(input.primitive()))
        .collect();
    match Backward::<Flex, N>::prepare::<C>(First, nodes)
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
            let mut outputs = forward.outputs.into_iter().map(primitive);
            let Some(first) = outputs.next() else {
                panic!("{kernel:?} has no output")
            };
            let first_shape = dims(&first);
            let slots: Slots = Arc::new(Mutex::new(vec![None; outputs.len()]));
            let state = State {
                output: kernel.keeps_output().then(|| first.clone()),
                kernel,
                inputs: Arc::new(primitives),
                saved: Arc::new(forward.saved),
                slots: slots.clone(),
            };
            let first = prep.finish(state, first);
            let mut all = vec![first];
            for (index, output) in outputs.enumerate() {
                let parent = [all[0].node()];
                let later = match Backward::<Flex, 1>::prepare::<C>(Later, parent)
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => {
                        prep.finish((slots.clone(), index, first_shape.clone()), output)
                    }
                    OpsKind::UnTracked(prep) => prep.finish(output),
                };
                all.push(later);
            }
            all
        }
    }
}

#[cfg(test)]
mod tests;
