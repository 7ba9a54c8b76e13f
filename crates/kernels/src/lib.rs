//! CPU kernels over paged KV, with the index arithmetic they share with a device.
//!
//! Everything here works on plain `f32` slices: no tensors, no I/O, no allocation that outlives a call.
//! [`page`] says where a token's key and value live; [`attend`], [`place`] and [`probe`] read and write
//! there; [`matrix`] and [`ops`] are the rest of a decoder layer. Shapes are row-major and written as
//! `[rows, width]`.
#![expect(
    unsafe_code,
    reason = "vector units are reached through target_feature functions, GEMM through pointers"
)]

pub mod attend;
mod lanes;
pub mod matrix;
pub mod ops;
pub mod page;
pub mod place;
pub mod probe;
pub mod rope;
