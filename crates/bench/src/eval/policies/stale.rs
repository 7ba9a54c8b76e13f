//! Stale reuse at the right positions: what a position-free cache gives for nothing.

use super::{Error, Policy, View};

/// Nothing recomputed, keys rotated to where they stand.
#[derive(Debug)]
pub(super) struct Stale;

impl Policy for Stale {
    fn name(&self) -> &str {
        "stale"
    }
    fn about(&self) -> &str {
        "chunk KV reused as it is, keys at their positions in the prompt"
    }
    fn budgeted(&self) -> bool {
        false
    }
    fn select(&self, _: &View<'_>, _: f32) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }
}
