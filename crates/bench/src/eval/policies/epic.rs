//! EPIC / LegoLink (arXiv 2410.15332): the first k tokens of every chunk but the first.

use super::{Error, Policy, View};

/// Chunk heads, k as the budget allows.
#[derive(Debug)]
pub(super) struct Epic;

impl Policy for Epic {
    fn name(&self) -> &str {
        "epic"
    }
    fn about(&self) -> &str {
        "EPIC-k: the first k tokens of every chunk but the first, k from the budget"
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        let later: Vec<_> = view.assembly.candidates().filter(|(index, _)| *index > 0).collect();
        let budget = view.budget(ratio);
        let longest = later.iter().map(|(_, rows)| rows.len()).max().unwrap_or_default();
        // Token by token over all chunks: k is the same for all up to one.
        let by_depth = (0..longest).flat_map(|k| {
            later.iter().filter(move |(_, rows)| k < rows.len()).map(move |(_, rows)| rows.start + k)
        });
        let mut rows: Vec<u32> = by_depth.take(budget).map(|row| row as u32).collect();
        rows.sort_unstable();
        Ok(rows)
    }
}
