//! What end-to-end tests over real processes share: starting them, asking them, and doing things to them.

pub mod ask;
pub mod fleet;
pub mod process;

use std::time::{Duration, Instant};

/// No test waits longer than this for anything that should come about.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Whether a condition comes about within [`PATIENCE`], for those who have more to say than its name when it does not.
pub async fn comes_about(mut holds: impl AsyncFnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(POLL).await;
    }
    true
}

/// Waits for a condition.
///
/// # Panics
/// When it does not come about in [`PATIENCE`].
pub async fn until(what: &str, holds: impl AsyncFnMut() -> bool) {
    assert!(comes_about(holds).await, "not in time: {what}");
}
