//! Why there is no device, or why it did not do what it was told.

use super::Unsupported;

/// An error of a CUDA device; each is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver's library is not on this machine, or it has no device of that number.
    #[error("no CUDA device: {0}")]
    NoDevice(String),
    /// No kernels for this model or device.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The driver is older than what was compiled for it, or than what this build calls.
    #[error("the CUDA driver is too old: {0}; update it, or use a toolkit that is not newer than the driver")]
    OldDriver(String),
    /// A library of the toolkit is missing or lacks a function, and no kept kernels stand in for it.
    #[error("{0}")]
    Toolkit(String),
    /// The budget is used up; others' work goes on.
    #[error("{wanted} bytes of device memory wanted, {used} of {limit} in use")]
    OutOfMemory {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes there may be.
        limit: u64,
    },
    /// The driver refused, or a launch before failed: the device can no longer be trusted.
    #[error("the CUDA device failed to {0}: {1}")]
    Fault(&'static str, String),
}

/// Exit codes of programs that cannot compute on the CUDA device they were told to.
pub mod code {
    /// No driver, or no device of that number.
    pub const NO_DEVICE: u8 = 80;
    /// A device older than the kernels.
    pub const CAPABILITY: u8 = 81;
    /// A driver older than this build, or than the toolkit.
    pub const DRIVER: u8 = 82;
    /// cuBLAS, or NVRTC and no kept kernels.
    pub const TOOLKIT: u8 = 83;
    /// Too little memory for the model.
    pub const MEMORY: u8 = 84;
    /// A model that kernels are not for.
    pub const MODEL: u8 = 85;
    /// A build without CUDA.
    pub const BUILD: u8 = 86;
}
