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

/// Exit codes: the worker's own where there is nothing to run on, and one more.
pub mod code {
    pub use cacheclip_kernels::cuda::code::*;

    /// Of a part: its time was up before it was through; what it gave is right. Of all: nothing failed, and not all was done.
    pub const CUT: u8 = 75;
}
