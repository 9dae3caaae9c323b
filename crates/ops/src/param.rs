//! Parameters: named flat leaves with a shape, and the builder that makes them.
//!
//! A parameter is stored flat and seen at any rank ([`Param::tensor`]), so optimisers, checkpoints and counters walk one
//! list ([`ParamStore`]) whatever the model is. The builder names a parameter by its path and seeds it by that name, so
//! the order of construction changes nothing. A builder without a device only records shapes: counting the parameters
//! of a large model allocates none of them.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyformer_kernels::matmul::Precision;
use anyformer_kernels::quant::Bits;
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::recompute;

use held::Held;
pub use init::{Init, normal};

mod forms;
mod held;
mod init;

#[derive(Debug)]
struct Inner {
    name: String,
    shape: Vec<usize>,
    decay: bool,
    trainable: bool,
    packs: bool,
    tracking: Arc<AtomicBool>,
    rounds: Arc<AtomicBool>,
    value: RwLock<Option<Held>>,
}

/// A handle on one parameter; clones share the value.
#[derive(Clone, Debug)]
pub struct Param(Arc<Inner>);

/// A value that does not fit its parameter.
#[derive(Debug, thiserror::Error)]
#[error("set parameter {name}: expected {expected} values of shape {shape:?}, got {got}")]
pub struct WrongSize {
    name: String,
    shape: Vec<usize>,
    expected: usize,
    got: usize,
}

impl Param {
    /// The path of the parameter, as it stands in a checkpoint: `layers.0.mixer.q_proj.weight`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Extents, in the order of PyTorch: a linear weight is `[out, in]`.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// False for parameters that the paper keeps out of weight decay.
    pub fn decays(&self) -> bool {
        self.0.decay
    }

    /// False for buffers: saved and loaded, never trained.
    pub fn trainable(&self) -> bool {
        self.0.trainable
    }

    /// True for matrices that only linear layers and lookups of rows read, which multiply with them packed.
    pub fn packs(&self) -> bool {
        self.0.packs
    }

    /// The value at rank `D`. Tracked by autodiff unless tracking is off or the parameter is a buffer.
    ///
    /// Panics when the parameter was built without a device or `D` is not its rank.
    pub fn tensor<const D: usize>(&self) -> Tensor<D> {
        let Ok(shape) = <[usize; D]>::try_from(self.0.shape.clone()) else {
            panic!("{} has shape {:?}, not rank {D}", self.name(), self.shape())
        };
        let value = self.leaf();
        let value = if self.0.tracking.load(Ordering::Relaxed) || !value.device().is_autodiff() {
            value
        } else {
            value.inner()
        };
        recompute::in_scope(self, value).reshape(shape)
    }

    /// The leaf that gradients are asked of.
    pub(crate) fn leaf(&self) -> Tensor<1> {
        let guard = self.0.value.read().unwrap_or_else(PoisonError::into_inner);
        match guard.as_ref() {
            Some(held) => held.dense(),
            None => panic!("{} was built without a device", self.name()),
        }
    }

    /// The same number for all handles on one parameter.
    pub(crate) fn address(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }

    /// A copy of the values.
    pub fn values(&self) -> Vec<f32> {
        let guard = self.0.value.read().unwrap_or_else(PoisonError::into_inner);
        let Some(value) = guard.as_ref() else {
            panic!("{} was built without a device", self.name())
        };
        match value {
            Held::Dense(value) => tensor_values(untracked(value.clone())),
            Held::Packed(packed, _) => packed.widened(0..packed.shape()[0]),
            Held::Panelled(panels, _) => panels.rows(),
            Held::Unset(count, _) => vec![0.0; *count],
        }
    }

    /// Replaces the values.
    pub fn set(&self, values: Vec<f32>) -> Result<(), WrongSize> {
        if values.len() != self.count() {
            return Err(WrongSize {
                name: self.name().to_string(),
                shape: self.shape().to_vec(),
                expected: self.count(),
                got: values.len(),
            });
        }
        self.update(|held| *held = values);
        Ok(())
    }

    /// Changes the values in place; no copy is made when nothing else holds the tensor. Packed values are widened for good.
    pub fn update(&self, change: impl FnOnce(&mut Vec<f32>)) {
        let mut guard = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        let Some(value) = guard.take() else {
            panic!("{} was built without a device", self.name())
        };
        let (device, mut values) = match value {
            Held::Dense(value) => (value.device(), tensor_values(untracked(value))),
            Held::Packed(packed, device) => (device, packed.widened(0..packed.shape()[0])),
            Held::Panelled(panels, device) => (device, panels.rows()),
            Held::Unset(count, device) => (device, vec![0.0; count]),
        };
        change(&mut values);
        *guard = Some(Held::Dense(leaf(values, &device, self.0.trainable)));
    }

    /// The gradient of this parameter, flat, or `None` when it had no part in the loss.
    pub fn gradient(&self, gradients: &mut Gradients) -> Option<Vec<f32>> {
        let guard = self.0.value.read().unwrap_or_else(PoisonError::into_inner);
        match guard.as_ref()? {
            Held::Dense(value) => value.grad_remove(gradients).map(tensor_values),
            Held::Packed(..) | Held::Panelled(..) | Held::Unset(..) => None,
        }
    }
}

fn untracked(value: Tensor<1>) -> Tensor<1> {
    if value.device().is_autodiff() {
        value.inner()
    } else {
        value
    }
}

/// Copies a float tensor of any rank to the host.
pub fn tensor_values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = untracked_any(tensor).into_data();
    match data.try_into_vec::<f32>() {
        Ok(values) => values,
        Err(error) => panic!("a float tensor holds f32: {error:?}"),
    }
}

fn untracked_any<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.device().is_autodiff() {
        tensor.inner()
    } else {
        tensor
    }
}

fn leaf(values: Vec<f32>, device: &Device, trainable: bool) -> Tensor<1> {
    let count = values.len();
    let tensor = Tensor::from_data(TensorData::new(values, [count]), device);
    if trainable && device.is_autodiff() {
        tensor.require_grad()
    } else {
        tensor
    }
}

/// All parameters of a model, in order of construction.
#[derive(Clone, Debug)]
pub struct ParamStore {
    params: Vec<Param>,
    device: Option<Device>,
    tracking: Arc<AtomicBool>,
    rounds: Arc<AtomicBool>,
}

impl ParamStore {
    /// Every parameter and buffer.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Number of trainable values.
    pub fn count(&self) -> usize {
        let trainable = self.params.iter().filter(|p| p.trainable());
        trainable.map(Param::count).sum()
    }

    /// Finds a parameter by its full name.
    pub fn get(&self, name: &str) -> Option<&Param> {
        self.params.iter().find(|p| p.name() == name)
    }

    /// The device on which new inputs belong: the tracked one while tracking is on.
    ///
    /// Panics when the store was built without a device.
    pub fn device(&self) -> Device {
        let Some(device) = &self.device else {
            panic!("the model was built without a device")
        };
        if self.tracking.load(Ordering::Relaxed) {
            device.clone()
        } else {
            device.clone().inner()
        }
    }

    /// Whether layers whose weights are packed in 8 or 4 bits round their inputs to 8 bits, which is less near to the model. Off
    /// unless it is turned on. Returns whether there is such a weight.
    pub fn round_inputs(&self, on: bool) -> bool {
        self.rounds.store(on, Ordering::Relaxed);
        let few = |param: &Param| {
            let bits = param.packed().map(|packed| packed.bits());
            matches!(bits, Some(Bits::Eight | Bits::Four))
        };
        self.params.iter().any(few)
    }

    /// Turns the recording of gradients on or off for every parameter.
    pub fn set_tracking(&self, on: bool) {
        self.tracking.store(on, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Shared {
    device: Option<Device>,
    /// No value is drawn: all are 0 until they are set.
    unfilled: bool,
    seed: u64,
    tracking: Arc<AtomicBool>,
    rounds: Arc<AtomicBool>,
    params: Mutex<(Vec<Param>, BTreeSet<String>)>,
}

/// Makes parameters under a path.
#[derive(Clone, Debug)]
pub struct Builder {
    shared: Arc<Shared>,
    prefix: String,
    linear: LinearInit,
    residual_scale: f32,
    precision: Precision,
}

/// How the weights of linear layers are filled unless a layer says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LinearInit {
    /// Uniform in `±1/sqrt(fan_in)`.
    FanIn,
    /// Normal with this standard deviation; biases zero.
    Normal(f32),
}

impl Builder {
    /// A builder whose parameters live on `device` (an autodiff device, where they are to be trained).
    pub fn new(device: &Device, seed: u64) -> Self {
        Self::make(Some(device.clone()), false, seed)
    }

    /// A builder that records names and shapes and allocates nothing.
    pub fn shapes_only() -> Self {
        Self::make(None, false, 0)
    }

    /// A builder whose parameters are 0, to be set from a file: drawing values for nothing takes time and memory.
    pub fn unfilled(device: &Device) -> Self {
        Self::make(Some(device.clone()), true, 0)
    }

    fn make(device: Option<Device>, unfilled: bool, seed: u64) -> Self {
        Builder {
            shared: Arc::new(Shared {
                device,
                unfilled,
                seed,
                tracking: Arc::new(AtomicBool::new(true)),
                rounds: Arc::default(),
                params: Mutex::default(),
            }),
            prefix: String::new(),
            linear: LinearInit::FanIn,
            residual_scale: 1.0,
            precision: Precision::F32,
        }
    }

    /// The same builder with another rule for linear layers.
    pub fn with_linear_init(self, linear: LinearInit) -> Self {
        Builder { linear, ..self }
    }

    /// The same builder with a factor on the initial weights of layers that write into the residual stream.
    pub fn with_residual_scale(self, residual_scale: f32) -> Self {
        Builder {
            residual_scale,
            ..self
        }
    }

    /// The same builder with another precision of the products of linear layers.
    pub fn with_precision(self, precision: Precision) -> Self {
        Builder { precision, ..self }
    }

    /// Where parameters live; `None` where none are made.
    pub fn device(&self) -> Option<&Device> {
        self.shared.device.as_ref()
    }

    /// The precision of the products of linear layers.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The rule for linear layers.
    pub fn linear_init(&self) -> LinearInit {
        self.linear
    }

    /// The factor for layers that write into the residual stream.
    pub fn residual_scale(&self) -> f32 {
        self.residual_scale
    }

    /// A builder one level down the path.
    pub fn at(&self, name: impl std::fmt::Display) -> Builder {
        Builder {
            prefix: self.path(name),
            ..self.clone()
        }
    }

    fn path(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }

    /// A trained parameter under weight decay.
    pub fn param(&self, name: &str, shape: &[usize], init: Init) -> Param {
        self.make_param(name, shape, init, [true, true, false])
    }

    /// As [`Builder::param`], of a matrix that only linear layers and lookups of rows read.
    pub fn matrix(&self, name: &str, shape: &[usize], init: Init) -> Param {
        self.make_param(name, shape, init, [true, true, true])
    }

    /// A trained parameter without weight decay.
    pub fn param_no_decay(&self, name: &str, shape: &[usize], init: Init) -> Param {
        self.make_param(name, shape, init, [false, true, false])
    }

    /// A parameter of the whole model without weight decay, under this name whatever the path: made by the first that asks for
    /// it, and whether this was it. Another shape than the first asked for is refused.
    pub fn shared(&self, name: &str, shape: &[usize], init: Init) -> Result<(Param, bool), String> {
        match self.store().get(name) {
            Some(param) if param.shape() == shape => Ok((param.clone(), false)),
            Some(param) => Err(format!(
                "{name} is one for all layers: one asks for {:?}, another for {shape:?}",
                param.shape()
            )),
            None => {
                let top = Builder {
                    prefix: String::new(),
                    ..self.clone()
                };
                Ok((top.param_no_decay(name, shape, init), true))
            }
        }
    }

    /// A buffer: saved and loaded, never trained.
    pub fn buffer(&self, name: &str, shape: &[usize], init: Init) -> Param {
        self.make_param(name, shape, init, [false, false, false])
    }

    fn make_param(
        &self,
        name: &str,
        shape: &[usize],
        init: Init,
        [decay, trainable, packs]: [bool; 3],
    ) -> Param {
        let name = self.path(name);
        let shared = &self.shared;
        let value = shared.device.as_ref().map(|device| {
            let mut rng = ChaCha8Rng::seed_from_u64(shared.seed ^ fnv1a(&name));
            let count = shape.iter().product();
            if shared.unfilled {
                return Held::Unset(count, device.clone());
            }
            let values = init.values(&mut rng, count);
            assert_eq!(values.len(), count, "initial values of {name}");
            Held::Dense(leaf(values, device, trainable))
        });
        let param = Param(Arc::new(Inner {
            name: name.clone(),
            shape: shape.to_vec(),
            decay,
            trainable,
            packs,
            tracking: shared.tracking.clone(),
            rounds: shared.rounds.clone(),
            value: RwLock::new(value),
        }));
        let mut held = shared.params.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(held.1.insert(name.clone()), "parameter {name} made twice");
        held.0.push(param.clone());
        param
    }

    /// The parameters made so far by this builder and all its siblings.
    pub fn store(&self) -> ParamStore {
        let held = self
            .shared
            .params
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        ParamStore {
            params: held.0.clone(),
            device: self.shared.device.clone(),
            tracking: self.shared.tracking.clone(),
            rounds: self.shared.rounds.clone(),
        }
    }
}

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests;
