//! Reads under way: whoever asks for what is just being read waits for that read instead of reading, too.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, OnceLock};

/// Reads under way, by what is read. Holds no more of them than threads are reading.
#[derive(Debug)]
pub(crate) struct Flights<I, T> {
    under_way: Mutex<HashMap<I, Arc<OnceLock<T>>>>,
}

impl<I, T> Default for Flights<I, T> {
    fn default() -> Self {
        Self { under_way: Mutex::default() }
    }
}

impl<I: Copy + Eq + Hash, T: Clone> Flights<I, T> {
    /// What `read` brings, or another caller's `read` that has begun and not ended. Blocking.
    pub(crate) fn share(&self, what: I, read: impl FnOnce() -> T) -> T {
        let flight = Arc::clone(self.under_way.lock().entry(what).or_default());
        // Whatever happens in `read`: where it panics, one of those who wait reads itself.
        let _landing = Landing { flights: self, what, flight: &flight };
        flight.get_or_init(read).clone()
    }

    /// How many callers read this or wait for it.
    #[cfg(test)]
    pub(crate) fn aboard(&self, what: &I) -> usize {
        self.under_way.lock().get(what).map_or(0, |flight| Arc::strong_count(flight) - 1)
    }
}

/// Takes a read out of the list when the first of its callers is done.
struct Landing<'a, I: Copy + Eq + Hash, T> {
    flights: &'a Flights<I, T>,
    what: I,
    flight: &'a Arc<OnceLock<T>>,
}

impl<I: Copy + Eq + Hash, T> Drop for Landing<'_, I, T> {
    fn drop(&mut self) {
        let mut under_way = self.flights.under_way.lock();
        // A later read of the same may be there already.
        if under_way.get(&self.what).is_some_and(|it| Arc::ptr_eq(it, self.flight)) {
            under_way.remove(&self.what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    fn all_aboard(flights: &Flights<u32, usize>, callers: usize) {
        while flights.aboard(&7) < callers {
            thread::yield_now();
        }
    }

    #[test]
    fn callers_that_overlap_share_one_read_and_later_ones_read_anew() {
        let (flights, reads) = (Flights::default(), AtomicUsize::new(0));
        let read = || {
            all_aboard(&flights, 5);
            reads.fetch_add(1, Ordering::Relaxed) + 1
        };
        thread::scope(|scope| {
            let callers: Vec<_> = (0..5).map(|_| scope.spawn(|| flights.share(7, read))).collect();
            for caller in callers {
                assert_eq!(caller.join().unwrap(), 1);
            }
        });
        assert_eq!(reads.load(Ordering::Relaxed), 1);
        assert_eq!(flights.share(7, || 9), 9);
        assert!(flights.under_way.lock().is_empty());
    }

    #[test]
    fn a_read_that_panics_leaves_the_others_to_read_themselves() {
        let (flights, reads) = (Flights::default(), AtomicUsize::new(0));
        let read = || {
            if reads.load(Ordering::Relaxed) == 0 {
                all_aboard(&flights, 3);
            }
            assert!(reads.fetch_add(1, Ordering::Relaxed) > 0, "the first read is to fail");
            42
        };
        let call = || catch_unwind(AssertUnwindSafe(|| flights.share(7, read))).ok();
        let ended: Vec<Option<usize>> = thread::scope(|scope| {
            let callers: Vec<_> = (0..3).map(|_| scope.spawn(call)).collect();
            callers.into_iter().map(|it| it.join().unwrap()).collect()
        });
        assert_eq!(ended.iter().filter(|it| it.is_none()).count(), 1);
        assert_eq!(ended.iter().filter(|it| **it == Some(42)).count(), 2);
        assert!(flights.under_way.lock().is_empty());
    }
}
