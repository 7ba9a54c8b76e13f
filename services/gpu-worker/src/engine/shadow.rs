//! What reuse gained and what it cost in quality, measured beside real requests.
//!
//! *Gained*: the seconds that prefilling the same prompt would have taken at this worker's own recent rate, less
//! what was spent. The rate counts rows alike, so the quadratic part of attention is left out: a lower bound.
//! *Cost*: every so many greedy requests the prompt is also computed in context, after the caller has its first
//! token, and the two first tokens are compared.

use super::Generation;
use std::time::Duration;

/// Rows from which a pass says something about the rate: smaller ones are bound by latency.
const ROWS: usize = 64;
/// Weight of a new sample in the moving average.
const NEW: f64 = 0.2;

/// Seconds per row after a pass of `rows`, as a moving average.
pub(super) fn per_row(known: Option<f64>, rows: usize, took: Duration) -> Option<f64> {
    if rows < ROWS {
        return known;
    }
    let sample = took.as_secs_f64() / rows as f64;
    Some(known.map_or(sample, |rate| rate + NEW * (sample - rate)))
}

/// Seconds per row of this worker's own prefills.
#[derive(Debug, Default)]
pub(super) struct Rate {
    per_row: Option<f64>,
    /// What was saved and not counted yet: counters are whole numbers.
    rest: f64,
}

impl Rate {
    /// Takes a pass of `rows` in context into account.
    pub(super) fn saw(&mut self, rows: usize, took: Duration) {
        self.per_row = per_row(self.per_row, rows, took);
    }

    /// Adds what a request of `rows` saved that spent `spent` on its first token (nothing while no rate is known)
    /// and takes out the whole seconds.
    pub(super) fn saved(&mut self, rows: usize, spent: Duration) -> u64 {
        self.rest += self.per_row.map_or(0.0, |rate| (rate * rows as f64 - spent.as_secs_f64()).max(0.0));
        let whole = self.rest.floor();
        self.rest -= whole;
        whole as u64
    }
}

/// Which requests are shadowed: a share of those that can be, evenly spread.
#[derive(Debug)]
pub(super) struct Shadow {
    ratio: f64,
    due: f64,
}

impl Shadow {
    pub(super) fn new(ratio: f64) -> Self {
        Self { ratio: if ratio.is_finite() { ratio.clamp(0.0, 1.0) } else { 0.0 }, due: 0.0 }
    }

    /// Whether this request is computed again. A sampled token says nothing about quality.
    pub(super) fn turn(&mut self, generation: &Generation) -> bool {
        if self.ratio == 0.0 || generation.in_context() || generation.sampling.temperature != 0.0 {
            return false;
        }
        self.due += self.ratio;
        let due = self.due >= 1.0;
        self.due -= f64::from(due);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_measured_at_the_workers_own_rate() {
        let mut rate = Rate::default();
        assert_eq!(rate.saved(1000, Duration::ZERO), 0, "nothing is claimed before anything was measured");
        rate.saw(ROWS - 1, Duration::from_secs(9));
        rate.saw(128, Duration::from_secs(1));
        assert_eq!(rate.saved(1280, Duration::from_millis(2500)), 7);
        assert_eq!(rate.saved(128, Duration::from_secs(2)), 0, "a loss is no gain");
        assert_eq!(rate.saved(128, Duration::from_millis(500)), 1, "halves add up");
    }
}
