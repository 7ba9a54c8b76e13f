//! The CUDA device. **Signatures only in this commit**: what they are for is said here, so that measuring can be written
//! against them; nothing below does anything yet.
//!
//! cudarc opens the driver, and a binding of ours opens cuBLAS, when a device is opened: nothing of CUDA is linked, no
//! toolkit is needed to build, and a machine without a driver gets an error and not a loader's message. candle's CUDA is
//! not used: its tensors would own what our kernels write to, and linking it makes a binary that does not start without
//! a driver.

use crate::config::Config;
use crate::error::Error;
use std::path::PathBuf;

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which device, from 0.
    pub ordinal: usize,
    /// Most bytes of device memory; `None` for nine tenths of what is free.
    pub memory_bytes: Option<u64>,
    /// Pages of KV for running sequences.
    pub pages: usize,
    /// Most rows of a block that goes through a layer.
    pub block_rows: usize,
    /// Most bytes of page-locked host memory; what does not fit lies in ordinary memory and is copied slower.
    pub pinned_bytes: u64,
    /// Copies and placement beside computation; off: in one stream with it.
    pub overlap: bool,
    /// Folder with NVRTC's and cuBLAS's libraries; none where the loader finds them.
    pub libraries: Option<PathBuf>,
    /// Folder in which compiled kernels are kept.
    pub kept: Option<PathBuf>,
}

/// Bytes of device memory a model needs, computed before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// All weights, bf16 (norms and biases f32).
    pub weights: u64,
    /// Paged KV.
    pub pages: u64,
    /// Activations of one block of rows, staging, angles, cuBLAS's workspace.
    pub workspace: u64,
}

/// A CUDA device: `cacheclip_model::Device`, bf16 weights, activations and pages, sums in f32. One thread uses it.
///
/// `load(&Source::Random { config, seed }, device)` makes random weights on the device, the same as on the CPU.
/// `decoder.device()` is the device again. All operations of the seam return `Result`; `Decoder::walk` and
/// `Decoder::logits` therefore do, too.
#[derive(Debug)]
pub struct Cuda(());

impl Cuda {
    /// Opens a device for a model, after checking that it fits.
    ///
    /// # Errors
    /// No driver, a device that kernels are not for, no cuBLAS, too little memory: one line each.
    pub fn open(_config: &Config, _options: &Options) -> Result<Self, Error> {
        todo!()
    }

    /// Waits until everything asked for is done.
    ///
    /// # Errors
    /// A device fault of anything before.
    pub fn finish(&self) -> Result<(), Error> {
        todo!()
    }

    /// Milliseconds that the device spent on what `work` asks for in the compute stream, by its own clock.
    ///
    /// # Errors
    /// Of `work`; a device fault.
    pub fn timed<T>(&self, _work: impl FnOnce() -> Result<T, Error>) -> Result<(T, f32), Error> {
        todo!()
    }

    /// Bytes per second of copying on the device, read and written counted, over `bytes` bytes.
    ///
    /// # Errors
    /// Out of memory; a device fault.
    pub fn copy_bandwidth(&self, _bytes: usize) -> Result<f64, Error> {
        todo!()
    }

    /// The device's name, multiprocessors, and compute capability.
    pub fn description(&self) -> String {
        todo!()
    }

    /// From now on notes when each layer was placed and computed, by the device's clock.
    ///
    /// # Errors
    /// A device fault.
    pub fn trace(&self) -> Result<(), Error> {
        todo!()
    }

    /// What was noted since [`trace`](Self::trace), and ends noting.
    ///
    /// # Errors
    /// A device fault.
    pub fn timeline(&self) -> Result<Vec<Noted>, Error> {
        todo!()
    }
}

/// A piece of work on the device's clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noted {
    /// `copy`, `place`, `attend` or `layer`.
    pub what: &'static str,
    /// Layer.
    pub layer: usize,
    /// Milliseconds since tracing began.
    pub start: f32,
    /// As `start`.
    pub end: f32,
}
