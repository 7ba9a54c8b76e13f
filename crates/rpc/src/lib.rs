//! Generated protocol code, conversions, streams of KV that copy none of it, and the mapping of errors to gRPC status.

pub mod convert;
pub mod deletion;
mod frames;
#[doc(hidden)]
pub mod fuzz;
pub mod status;
pub mod stream;

/// Messages, clients and servers of `cacheclip.v1`, as generated from `proto/`.
pub mod v1 {
    #![allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::all)]
    tonic::include_proto!("cacheclip.v1");
}

/// The encoded descriptors of `cacheclip.v1`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
