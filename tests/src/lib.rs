//! What end-to-end tests over real processes share: starting them, asking them, and doing things to them.

pub mod ask;
pub mod fleet;
pub mod process;

use std::future::Future;
use std::time::{Duration, Instant};

/// No test waits longer than this for anything that should come about.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `what` is true, looking often.
///
/// # Panics
/// When it does not come about in [`PATIENCE`].
pub async fn until<F: Future<Output = bool>>(what: &str, mut test: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !test().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
