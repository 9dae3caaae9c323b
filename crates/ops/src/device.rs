//! The device by name: a run-time choice, made once by the binary.

use burn::tensor::Device;

/// A device that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such name.
    #[error("find device {got:?}: expected \"cpu\" or \"gpu\"")]
    Unknown {
        /// What was asked for.
        got: String,
    },
    /// The binary holds no GPU code.
    #[error(
        "use device \"gpu\": this binary was built without it; rebuild with `--features gpu`, or take `--device cpu`"
    )]
    NotBuilt,
    /// No adapter, or it cannot do what is needed.
    #[error("start device \"gpu\": {message}; `anyformer doctor` shows what was found")]
    Start {
        /// What the driver said.
        message: String,
    },
}

/// True when the GPU was compiled in.
pub const fn has_gpu() -> bool {
    cfg!(feature = "gpu")
}

/// The device `cpu` or `gpu`, without autodiff.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    match name {
        "cpu" => Ok(Device::flex()),
        "gpu" => gpu(),
        _ => Err(DeviceError::Unknown {
            got: name.to_string(),
        }),
    }
}

#[cfg(not(feature = "gpu"))]
fn gpu() -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt)
}

/// The default adapter. A runtime starts once in a process; later calls get the same device.
#[cfg(feature = "gpu")]
fn gpu() -> Result<Device, DeviceError> {
    use std::sync::OnceLock;
    static STARTED: OnceLock<Result<Device, String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        Device::wgpu_options()
            .device_kind(burn::tensor::DeviceKind::DefaultDevice)
            .init()
            .map_err(|error| error.to_string())
    });
    started
        .clone()
        .map_err(|message| DeviceError::Start { message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(device("cpu").is_ok());
        let error = device("tpu").expect_err("no such device").to_string();
        assert!(
            error.contains("\"tpu\"") && error.contains("\"gpu\""),
            "{error}"
        );
        if !has_gpu() {
            assert!(matches!(device("gpu"), Err(DeviceError::NotBuilt)));
        }
    }
}
