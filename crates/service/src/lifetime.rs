//! How long a RAM tier may serve what it holds before the stores are asked again.
//!
//! Stores know what has expired, and nobody else does: a bound on what is served without asking them bounds how long a
//! document outlives its time.

use std::time::{Duration, Instant};

/// A bound, or none.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime(Option<Duration>);

/// A value, and since when it is held.
#[derive(Clone, Debug)]
pub struct Held<T> {
    /// The value.
    pub value: T,
    since: Instant,
}

impl Lifetime {
    /// So many seconds; 0: no bound.
    pub fn seconds(seconds: u64) -> Self {
        Self((seconds > 0).then(|| Duration::from_secs(seconds)))
    }

    /// The value, if its time is not over.
    pub fn alive<T>(self, held: Held<T>) -> Option<T> {
        (!self.is_over(&held)).then_some(held.value)
    }

    /// Whether its time is over.
    pub fn is_over<T>(self, held: &Held<T>) -> bool {
        self.0.is_some_and(|bound| held.since.elapsed() >= bound)
    }
}

impl From<Duration> for Lifetime {
    fn from(bound: Duration) -> Self {
        Self(Some(bound))
    }
}

impl<T> From<T> for Held<T> {
    fn from(value: T) -> Self {
        Self { value, since: Instant::now() }
    }
}
