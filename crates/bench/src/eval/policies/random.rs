//! Windows by lot: what any budget buys without knowing anything.

use super::{Error, Policy, View};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

const WINDOW: usize = 8;

/// Windows of eight rows inside chunks, drawn without replacement.
#[derive(Debug)]
pub(super) struct Random;

impl Policy for Random {
    fn name(&self) -> &str {
        "random"
    }
    fn about(&self) -> &str {
        "windows of 8 tokens drawn by lot"
    }
    fn select(&self, view: &View<'_>, ratio: f32) -> Result<Vec<u32>, Error> {
        let chunks = view.assembly.candidates().map(|(_, rows)| rows);
        let mut windows: Vec<Vec<u32>> = chunks
            .flat_map(|rows| {
                let rows: Vec<u32> = rows.map(|row| row as u32).collect();
                rows.chunks(WINDOW).map(<[u32]>::to_vec).collect::<Vec<_>>()
            })
            .collect();
        windows.shuffle(&mut StdRng::seed_from_u64(view.seed));
        let mut rows: Vec<u32> = windows.into_iter().flatten().take(view.budget(ratio)).collect();
        rows.sort_unstable();
        Ok(rows)
    }
}
