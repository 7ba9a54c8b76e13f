//! Kernels over paged KV: those of the CPU, and the text and launches of those of a CUDA device ([`cuda`]).
//!
//! Everything but [`cuda`] works on plain `f32` slices: no tensors, no I/O; what a thread keeps between calls is scratch
//! memory. [`page`] says where a token's key and value live; [`attend`], [`place`] and [`probe`] read and write there;
//! [`matrix`] and [`ops`] are the rest of a decoder layer. Shapes are row-major and written as `[rows, width]`.
#![expect(
    unsafe_code,
    reason = "threads write disjoint parts of one result; a bounds check in an inner loop costs its registers"
)]
#![allow(clippy::needless_range_loop, reason = "arrays of registers are addressed by constant indices")]

pub mod attend;
pub mod cuda;
mod inner;
pub mod matrix;
pub mod ops;
pub mod page;
mod panel;
pub mod place;
pub mod probe;
pub mod random;
pub mod rope;
mod simd;
mod tile;

pub use simd::vectors;
