//! Stale reuse without moving keys: each chunk's stay where they were computed, right behind the anchor.

use super::{Attention, Error, Policy, View};

/// Nothing recomputed, nothing rotated.
#[derive(Debug)]
pub(super) struct StaleLocal;

impl Policy for StaleLocal {
    fn name(&self) -> &str {
        "stale-local"
    }
    fn about(&self) -> &str {
        "chunk KV reused as it is, keys at the positions they were computed at"
    }
    fn attention(&self) -> Attention {
        Attention::LocalPositions
    }
    fn budgeted(&self) -> bool {
        false
    }
    fn select(&self, _: &View<'_>, _: f32) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }
}
