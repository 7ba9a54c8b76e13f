//! `cacheclip-gpu-check`: what the worker's CUDA device computes and how fast, in one command that builds nothing.
//!
//! ```text
//! conduct ── a process for every part, with its share of the time ──► report (written after every row)
//!    part: device · kernels · times · exact · prompts · decode · overlap
//!             └── bed: a CUDA device, or in a rehearsal the CPU
//! ```
//!
//! A part has a process of its own: a fault of the device spoils every later call of the process that met it. A part
//! that is cut leaves the rows it had. Everything but the kernels alone is written over [`bed::Bed`], so that the whole
//! program is rehearsed on the CPU, with shapes small enough for that, where no GPU is.

pub mod bed;
pub mod budget;
pub mod conduct;
pub mod find;
pub mod model;
pub mod parts;
pub mod report;
pub mod scale;
pub mod scorer;
pub mod targets;
pub mod work;

/// Exit codes where there is nothing to run on: the worker's own, of no device, too old a device, too old a driver, a missing
/// library, and a build without CUDA.
pub mod code {
    /// No driver, or no device.
    pub const NO_DEVICE: u8 = 80;
    /// A device older than the kernels.
    pub const CAPABILITY: u8 = 81;
    /// A driver older than this build, or than the toolkit.
    pub const DRIVER: u8 = 82;
    /// cuBLAS, or NVRTC and no kept kernels.
    pub const TOOLKIT: u8 = 83;
    /// A build without CUDA.
    pub const BUILD: u8 = 86;
    /// Of a part: its time was up before it was through; what it gave is right. Of all: nothing failed, and not all was done.
    pub const CUT: u8 = 75;
}
