//! What can go wrong, by what the caller can do about it.

use cacheclip_kernels::cuda::DeviceError;
use std::path::PathBuf;

/// An error of the model crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model directory asks for something this build does not do; choose another model.
    #[error("{field} in config.json: {why}")]
    Unsupported {
        /// Field of `config.json`.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Random weights were asked for of a shape that has no name here; choose one that has.
    #[error("random_shape: unknown shape {name:?}; known: {:?}", crate::config::Config::SHAPES)]
    UnknownShape {
        /// What was asked for.
        name: String,
    },
    /// A file is missing or unreadable; check the model directory.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The weights do not fit the configuration; the directory is damaged or mixed.
    #[error("weights: {0}")]
    Weights(String),
    /// The instance computes something else than full prefill; it must not reuse KV.
    #[error("certificate {check} failed: relative error {error:.1e}, limit {limit:.1e}")]
    Certificate {
        /// Name of the check.
        check: &'static str,
        /// Relative error found.
        error: f32,
        /// What it must stay below (for controls: above).
        limit: f32,
    },
    /// No pages left; retry when other sequences have ended.
    #[error("{wanted} pages wanted, {free} free of {total}")]
    OutOfPages {
        /// Pages the sequence needs.
        wanted: usize,
        /// Pages free now.
        free: usize,
        /// Pages there are.
        total: usize,
    },
    /// The model gave no number: its weights are damaged or too large for the arithmetic.
    #[error("the logit of token {token} is not a number")]
    NoNumber {
        /// Whose logit it is.
        token: usize,
    },
    /// A CUDA device refused, ran out of memory, or was lost.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device's memory is too small for what was asked of it.
    #[error(transparent)]
    TooLarge(#[from] crate::cuda::TooLarge),
    /// A tensor operation failed; a bug or a device fault.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
