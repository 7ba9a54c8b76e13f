//! How fast KV comes from the stores, measured on what is loaded anyhow, and how much of it is on its way.

use cacheclip_plan::Server;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time with loads under way that makes a sample.
const SAMPLE: Duration = Duration::from_millis(250);
/// Fewest bytes that say something about a link.
const LEAST: u64 = 256 << 10;
/// Weight of a new sample in the moving average.
const NEW: f64 = 0.3;
/// Age at which what was measured is no longer believed: the next request tries the link again.
const STALE: Duration = Duration::from_secs(60);

/// The way from the stores. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Bytes asked for that have not come.
    under_way: u64,
    loads: usize,
    /// Since when the current sample is taken; none while nothing is under way.
    since: Option<Instant>,
    /// Bytes of the current sample.
    bytes: u64,
    bytes_per_second: Option<f64>,
    measured: Option<Instant>,
}

impl Link {
    /// A load of `bytes` (as they are in memory) begins.
    pub(crate) fn begin(&self, bytes: u64) -> Flight {
        let mut state = self.0.lock();
        state.under_way += bytes;
        state.loads += 1;
        state.since.get_or_insert_with(Instant::now);
        Flight { link: self.clone(), left: bytes, rests: false }
    }

    /// What a further load would wait for and cost; `None` while that is not known, or not any more.
    pub(crate) fn server(&self) -> Option<Server> {
        let state = self.0.lock();
        let known = state.measured.is_some_and(|at| at.elapsed() < STALE) || state.loads > 0;
        let rate = state.bytes_per_second.filter(|_| known)?;
        Some(Server { backlog: state.under_way as f64 / rate, per_unit: 1.0 / rate })
    }
}

impl State {
    fn came(&mut self, bytes: u64, now: Instant) {
        self.under_way = self.under_way.saturating_sub(bytes);
        self.bytes += bytes;
        let Some(since) = self.since else { return };
        if now - since >= SAMPLE {
            self.sample(now - since, now);
        }
    }

    /// A load ended, or does not ask for anything at the moment.
    fn paused(&mut self, now: Instant) {
        self.loads -= 1;
        if self.loads == 0 {
            if let Some(since) = self.since {
                self.sample(now - since, now);
            }
            self.since = None;
        }
    }

    fn sample(&mut self, took: Duration, now: Instant) {
        let seconds = took.as_secs_f64();
        if self.bytes >= LEAST && seconds > 0.0 {
            let sample = self.bytes as f64 / seconds;
            self.bytes_per_second =
                Some(self.bytes_per_second.map_or(sample, |rate| rate + NEW * (sample - rate)));
            self.measured = Some(now);
            (self.bytes, self.since) = (0, Some(now));
        } else if self.loads == 0 {
            self.bytes = 0;
        }
    }
}

/// One load under way.
#[derive(Debug)]
pub(crate) struct Flight {
    link: Link,
    left: u64,
    /// Whether it asks for nothing at the moment.
    rests: bool,
}

impl Flight {
    /// So many bytes of it have come.
    pub(crate) fn came(&mut self, bytes: u64) {
        let bytes = bytes.min(self.left);
        self.left -= bytes;
        self.link.0.lock().came(bytes, Instant::now());
    }

    /// It asks for nothing until it goes on: that time says nothing about the link.
    pub(crate) fn rest(&mut self) {
        if !std::mem::replace(&mut self.rests, true) {
            self.link.0.lock().paused(Instant::now());
        }
    }

    /// It asks for more.
    pub(crate) fn go_on(&mut self) {
        if std::mem::take(&mut self.rests) {
            let mut state = self.link.0.lock();
            state.loads += 1;
            state.since.get_or_insert_with(Instant::now);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.rest();
        let mut state = self.link.0.lock();
        state.under_way = state.under_way.saturating_sub(self.left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn the_rate_is_that_of_all_loads_together_while_there_are_any() {
        let start = Instant::now();
        let mut state = State { under_way: 40 * MB, loads: 2, since: Some(start), ..State::default() };
        state.came(10 * MB, after(start, 100));
        assert_eq!(state.bytes_per_second, None, "too early to tell");
        state.came(10 * MB, after(start, 500));
        assert_eq!(state.bytes_per_second, Some(40.0 * MB as f64));
        assert_eq!(state.under_way, 20 * MB);
        state.came(15 * MB, after(start, 600));
        state.paused(after(start, 650));
        state.paused(after(start, 750));
        let want = 40.0 + NEW * (60.0 - 40.0);
        assert!((state.bytes_per_second.unwrap() / MB as f64 - want).abs() < 1e-6);
        assert_eq!((state.under_way, state.since), (5 * MB, None), "what rests is still to come");
    }

    #[test]
    fn nothing_is_claimed_about_a_link_that_was_never_used() {
        let link = Link::default();
        assert_eq!(link.server(), None);
        let mut flight = link.begin(MB);
        assert_eq!(link.server(), None);
        flight.came(2 * MB);
        drop(flight);
        assert!(link.server().is_some_and(|server| server.backlog == 0.0));
    }

    #[test]
    fn a_load_that_waits_for_its_own_request_is_no_slow_link() {
        let link = Link::default();
        let mut flight = link.begin(4 * MB);
        flight.came(MB);
        flight.rest();
        let rate = link.0.lock().bytes_per_second.expect("measured when it rested");
        assert_eq!(link.0.lock().since, None, "no clock runs");
        let backlog = link.server().expect("known").backlog;
        assert!((backlog - 3.0 * MB as f64 / rate).abs() < 1e-9, "the rest is still ahead of others");
        flight.go_on();
        assert!(link.0.lock().since.is_some());
        flight.rest();
        drop(flight);
        let state = link.0.lock();
        assert_eq!((state.under_way, state.loads, state.bytes_per_second), (0, 0, Some(rate)));
    }
}
