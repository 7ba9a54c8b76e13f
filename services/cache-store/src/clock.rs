//! Wall-clock time: what expires has to expire after a restart, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Tells the time in whole seconds since 1970. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Clock(Option<Arc<AtomicU64>>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(None)
    }

    /// A clock that shows what it is set to, so that nobody has to wait for a time to come.
    pub fn manual(seconds: Arc<AtomicU64>) -> Self {
        Self(Some(seconds))
    }

    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        self.0.as_ref().map_or_else(|| seconds(SystemTime::now()), |it| it.load(Ordering::Relaxed))
    }
}

/// A file's time as this clock tells it; what lies before 1970 is 1970.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
