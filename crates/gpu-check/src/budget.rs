//! Time that is handed out.

use std::time::{Duration, Instant};

/// A moment by which something must be done.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// In so many seconds.
    pub fn within(seconds: f64) -> Self {
        Self(Instant::now() + Duration::from_secs_f64(seconds.max(0.0)))
    }

    /// Seconds until then; 0 when it is past.
    pub fn left(&self) -> f64 {
        self.0.saturating_duration_since(Instant::now()).as_secs_f64()
    }

    /// Whether it is past.
    pub fn passed(&self) -> bool {
        self.left() == 0.0
    }
}

/// What the first of `weights` gets of `left`; what it does not use is shared by those behind it.
pub fn share(left: f64, weights: &[f64]) -> f64 {
    let all: f64 = weights.iter().sum();
    weights.first().map_or(0.0, |first| left * first / all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_part_leaves_goes_to_those_behind_it() {
        assert_eq!(share(100.0, &[1.0, 3.0]), 25.0);
        // The first took 5 of its 25.
        assert_eq!(share(95.0, &[3.0]), 95.0);
        assert_eq!(share(95.0, &[]), 0.0);
    }

    #[test]
    fn a_deadline_that_is_past_leaves_nothing() {
        assert!(Deadline::within(-1.0).passed());
        assert!(!Deadline::within(60.0).passed());
    }
}
