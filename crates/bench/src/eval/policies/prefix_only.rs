//! Prefix caching: only what stands at the head of the prompt is reused.

use super::{Error, Policy, View};

/// Prefix and first chunk reused where they are exact; all other rows computed.
#[derive(Debug)]
pub(super) struct PrefixOnly;

impl Policy for PrefixOnly {
    fn name(&self) -> &str {
        "prefix-only"
    }
    fn about(&self) -> &str {
        "prefix caching: all rows computed but the exact ones at the head"
    }
    fn budgeted(&self) -> bool {
        false
    }
    fn select(&self, view: &View<'_>, _: f32) -> Result<Vec<u32>, Error> {
        Ok(view.assembly.candidates().flat_map(|(_, rows)| rows).map(|row| row as u32).collect())
    }
}
