//! The adapter through which a kernel becomes a differentiable op.
//!
//! A kernel author writes a forward and a backward over slices, once, with any number of inputs, outputs and saved
//! arrays ([`Kernel`]), and calls [`apply`]. burn-autodiff knows one output node per op, so where there are several outputs
//! they become nodes of their own whose only parent is a node without a value: each hands its gradient over through a slot,
//! and that node's backward reads all the slots. First order only.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, NoCheckpointing};
use burn::backend::{
    Autodiff, AutodiffBackend, BackendTensor, DispatchAutodiffContext, DispatchDevice,
    DispatchTensor, DispatchTensorKind, Flex, GradientCheckpointingStrategy, tensor::FloatTensor,
};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::profile::{self, Pass};

mod record;
use record::record;

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

    /// False when [`Kernel::backward`] does not read the values of this input: they are not kept for it, and the view that it
    /// gets has a shape and no data.
    fn reads_again(&self, _input: usize) -> bool {
        true
    }

    /// The earlier input whose gradient is that of this input as well; [`Kernel::backward`] returns `None` for this one.
    fn same_gradient(&self, _input: usize) -> Option<usize> {
        None
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

#[cfg(test)]
mod tests;
