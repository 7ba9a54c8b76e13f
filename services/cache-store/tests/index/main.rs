//! The index: what every implementation promises, and what a store promises whatever its index does.
//!
//! Redis servers are started here, on free ports; where none is installed, these tests say so and pass.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[path = "../common/mod.rs"]
mod common;

mod configuration;
mod conformance;
mod failover;
mod failures;
mod fleet;
mod process;
mod servers;

use std::time::{Duration, Instant};

/// Waits for a condition, with a deadline that a busy machine keeps too.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
