//! What memory the services of this process are entitled to, beside what the process takes.

use super::measure::{peak_rss_bytes, reported};
use serde::Serialize;

/// What one process took at most, and the parts of which that should consist. Each part is as large as it has been, which
/// is no more than what is configured: the comparison is with less than was promised.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Memory {
    /// Highest resident bytes while it was watched.
    pub(crate) peak_rss_bytes: u64,
    /// Both models'.
    weights_bytes: u64,
    /// Pages of running sequences, of the chunk being computed and of scoring, at most so far: a page that was used once
    /// stays with the process.
    pages_bytes: u64,
    /// Chunk KV that the worker and the scorer keep in RAM.
    caches_bytes: u64,
    /// Chunk KV on its way to the worker's pages, at most so far.
    unplaced_bytes: u64,
    /// Of these parts.
    promised_bytes: u64,
    peak_over_promised: f64,
}

impl Memory {
    /// Of this process, in which one worker and one scorer run.
    ///
    /// # Errors
    /// A service does not report a part.
    pub(crate) fn here() -> anyhow::Result<Self> {
        let sum = |names: &[&str]| names.iter().map(|name| reported(name)).sum::<anyhow::Result<f64>>();
        let weights = sum(&["cacheclip_worker_weights_bytes", "cacheclip_scorer_weights_bytes"])?;
        let pages = sum(&["cacheclip_worker_pages_peak_bytes", "cacheclip_scorer_pages_peak_bytes"])?;
        let caches = sum(&["cacheclip_worker_ram_used_bytes", "cacheclip_scorer_cache_used_bytes"])?;
        let unplaced = reported("cacheclip_worker_unplaced_peak_bytes")?;
        let (promised, peak_rss_bytes) = (weights + pages + caches + unplaced, peak_rss_bytes());
        Ok(Self {
            peak_rss_bytes,
            weights_bytes: weights as u64,
            pages_bytes: pages as u64,
            caches_bytes: caches as u64,
            unplaced_bytes: unplaced as u64,
            promised_bytes: promised as u64,
            peak_over_promised: peak_rss_bytes as f64 / promised,
        })
    }

    /// The one with the highest peak.
    pub(crate) fn highest(all: impl Iterator<Item = Option<Self>>) -> Option<Self> {
        all.flatten().max_by_key(|memory| memory.peak_rss_bytes)
    }

    /// For a column "of promised": peak over promise.
    pub(crate) fn cell(memory: Option<&Self>) -> String {
        memory.map_or("-".into(), |memory| format!("{:.2}", memory.peak_over_promised))
    }
}
