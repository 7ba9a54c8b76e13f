//! Full prefill: what all others are measured against.

use super::{Attention, Error, Policy, View};

/// Nothing reused.
#[derive(Debug)]
pub(super) struct Full;

impl Policy for Full {
    fn name(&self) -> &str {
        super::FULL
    }
    fn about(&self) -> &str {
        "full prefill: nothing is reused"
    }
    fn attention(&self) -> Attention {
        Attention::InContext
    }
    fn budgeted(&self) -> bool {
        false
    }
    fn select(&self, view: &View<'_>, _: f32) -> Result<Vec<u32>, Error> {
        Ok(view.assembly.reused().map(|row| row as u32).collect())
    }
}
