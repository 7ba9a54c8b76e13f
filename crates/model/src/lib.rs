//! Decoder forward over paged KV with rows at arbitrary positions; loading, sampling, certificates.
//!
//! ```text
//! Decoder (families, written once)        config · load · decoder · certificate
//!    │  project · place · scatter · attend_rows · probe
//! Device (the seam)                       device
//!    │
//! Cpu (pages of f32)      cpu
//! Cuda (pages of bf16)    cuda
//!    │
//! cacheclip-kernels
//! ```
//!
//! Keys leave and enter a decoder **before** rotation ([`kv::ChunkKv`]), so that one chunk's KV serves at
//! any position.

mod buffers;
pub mod certificate;
pub mod closure;
pub mod config;
pub mod cpu;
pub mod cuda;
pub mod decoder;
pub mod device;
mod error;
pub mod kv;
pub mod layout;
pub mod load;
pub mod pages;
pub mod sample;
pub mod walk;
pub mod weights;

pub use cacheclip_kernels::probe::Reduce;
pub use cacheclip_kernels::vectors;
pub use cpu::Cpu;
pub use decoder::{Decoder, Logits, Pass, Probe};
pub use device::Device;
pub use error::Error;
pub use walk::{Batch, Collect, Walk};
