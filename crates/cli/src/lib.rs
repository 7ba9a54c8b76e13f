//! The embedded fleet: all four services in one process. The binary's commands and the end-to-end tests
//! stand on it.

pub mod fleet;
pub mod metrics;
