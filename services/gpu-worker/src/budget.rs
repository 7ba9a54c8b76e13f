//! A bound on the KV that requests hold before it is placed in pages.
//!
//! A request opens a window on the budget: all its KV, or for a larger request all there is. It asks for nothing, of
//! stores or of the engine, before its window has granted the bytes, and has them back when they are placed. No request
//! waits for what another one holds once its window is open, so that two of them cannot wait for each other. What a
//! window will not need any more goes to the others at once.

use crate::engine::Error;
use crate::metrics;
use parking_lot::Mutex;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Bytes that the budget is divided into.
const UNIT: u64 = 1 << 10;

/// What all requests together may hold. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// In units; who came first is served first.
    room: Arc<Semaphore>,
    units: u32,
    /// Requests that may wait for a window.
    queue: usize,
    waiting: AtomicUsize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    now: u64,
    most: u64,
}

impl Budget {
    /// Of so many bytes; at most `queue` requests wait for their windows.
    pub(crate) fn new(bytes: u64, queue: usize) -> Self {
        let units = units(bytes).max(1);
        metrics::unplaced(0, 0);
        Self(Arc::new(Shared {
            room: Arc::new(Semaphore::new(units as usize)),
            units,
            queue,
            waiting: AtomicUsize::new(0),
            held: Mutex::default(),
        }))
    }

    /// A window for a request of so many bytes; waits for those that came before.
    ///
    /// # Errors
    /// [`Error::Busy`] when too many wait.
    pub(crate) async fn open(&self, bytes: u64) -> Result<Window, Error> {
        let shared = &self.0;
        let _waiting = shared.enter()?;
        let units = units(bytes).min(shared.units);
        // It is never closed.
        let room = Arc::clone(&shared.room).acquire_many_owned(units).await.map_err(|_| Error::Stopped)?;
        let most = (u64::from(units) * UNIT).min(bytes);
        let state = Mutex::new(State { room, most, used: 0, left: bytes });
        Ok(Window(Arc::new(Inner { shared: Arc::clone(shared), state, freed: Notify::new() })))
    }
}

impl Shared {
    fn enter(&self) -> Result<Waiting<'_>, Error> {
        let waiting = Waiting(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.queue {
            return Err(Error::Busy);
        }
        Ok(waiting)
    }

    fn hold(&self, bytes: u64) {
        let mut held = self.held.lock();
        held.now += bytes;
        held.most = held.most.max(held.now);
        metrics::unplaced(held.now, held.most);
    }

    fn release(&self, bytes: u64) {
        let mut held = self.held.lock();
        held.now -= bytes;
        metrics::unplaced(held.now, held.most);
    }
}

/// Counts a waiting request until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

/// One request's part of the budget. Cheap to clone; goes with its last clone and grant.
#[derive(Clone, Debug)]
pub(crate) struct Window(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    room: OwnedSemaphorePermit,
    /// Bytes that may be in use at a time.
    most: u64,
    used: u64,
    /// Bytes that will still be asked for.
    left: u64,
}

impl State {
    /// Gives away what will not be needed any more.
    fn settle(&mut self) {
        self.most = self.most.min(self.used + self.left);
        let surplus = self.room.num_permits().saturating_sub(units(self.most) as usize);
        drop(self.room.split(surplus));
    }
}

impl Window {
    /// Whether all that will be asked for may be held together with what is.
    pub(crate) fn has_room(&self) -> bool {
        let state = self.0.state.lock();
        state.used + state.left <= state.most
    }

    /// Bytes that may be in use at a time.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.state.lock().most
    }

    /// So many bytes will not be asked for.
    pub(crate) fn skip(&self, bytes: u64) {
        let mut state = self.0.state.lock();
        state.left = state.left.saturating_sub(bytes);
        state.settle();
    }

    /// Leave to ask for so many bytes, if there is room. What is larger than the window has it when nothing else is in
    /// use.
    pub(crate) fn try_grant(&self, bytes: u64) -> Option<Grant> {
        let mut state = self.0.state.lock();
        if state.used > 0 && state.used + bytes > state.most {
            return None;
        }
        state.used += bytes;
        state.left = state.left.saturating_sub(bytes);
        drop(state);
        self.0.shared.hold(bytes);
        Some(Grant { window: self.clone(), bytes })
    }

    /// The same, as soon as there is room.
    pub(crate) async fn grant(&self, bytes: u64) -> Grant {
        loop {
            let mut freed = pin!(self.0.freed.notified());
            // From here on nothing that is given back goes unnoticed.
            freed.as_mut().enable();
            if let Some(grant) = self.try_grant(bytes) {
                return grant;
            }
            freed.await;
        }
    }

    fn back(&self, bytes: u64, again: bool) {
        let mut state = self.0.state.lock();
        state.used -= bytes;
        state.left += if again { bytes } else { 0 };
        state.settle();
        drop(state);
        self.0.shared.release(bytes);
        self.0.freed.notify_waiters();
    }
}

/// Bytes that may be held; given back when dropped.
#[derive(Debug)]
pub(crate) struct Grant {
    window: Window,
    bytes: u64,
}

impl Grant {
    /// A part of it.
    pub(crate) fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { window: self.window.clone(), bytes }
    }

    /// Gives back what did not come and will be asked for again.
    pub(crate) fn put_off(mut self) {
        self.window.back(std::mem::take(&mut self.bytes), true);
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.window.back(self.bytes, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const KIB: u64 = 1 << 10;

    async fn window(budget: &Budget, kib: u64) -> Window {
        budget.open(kib * KIB).await.expect("room to wait")
    }

    fn held(budget: &Budget) -> (u64, u64) {
        let held = budget.0.held.lock();
        (held.now / KIB, held.most / KIB)
    }

    #[tokio::test]
    async fn a_larger_request_passes_through_the_budget_piece_by_piece() {
        let budget = Budget::new(10 * KIB, 8);
        let larger = window(&budget, 100).await;
        assert!(!larger.has_room() && larger.bytes() == 10 * KIB);
        let mut unplaced = std::collections::VecDeque::new();
        for _ in 0..25 {
            let grant = match larger.grant(4 * KIB).now_or_never() {
                Some(grant) => grant,
                None => {
                    drop(unplaced.pop_front());
                    larger.grant(4 * KIB).await
                }
            };
            unplaced.push_back(grant);
        }
        assert_eq!(held(&budget), (8, 8));
        // Nothing is left to ask for: the others have what it does not use, and what it gives back.
        let other = budget.open(2 * KIB).now_or_never().expect("room").expect("room to wait");
        assert!(other.has_room() && budget.open(KIB).now_or_never().is_none());
        unplaced.clear();
        drop(larger);
        assert!(window(&budget, 8).await.has_room());
    }

    #[tokio::test]
    async fn what_did_not_come_has_room_to_be_asked_for_again() {
        let budget = Budget::new(10 * KIB, 8);
        let request = window(&budget, 10).await;
        let mut asked = request.grant(10 * KIB).await;
        drop(asked.split(6 * KIB));
        assert!(window(&budget, 6).await.has_room(), "what is placed is the others'");
        asked.put_off();
        assert_eq!(held(&budget).0, 0);
        let again = request.grant(4 * KIB).now_or_never();
        assert!(again.is_some() && budget.open(10 * KIB).now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_piece_larger_than_the_budget_goes_alone() {
        let budget = Budget::new(KIB, 8);
        let request = window(&budget, 6).await;
        let first = request.grant(3 * KIB).await;
        assert!(request.grant(3 * KIB).now_or_never().is_none());
        drop(first);
        assert!(request.grant(3 * KIB).now_or_never().is_some());
        assert_eq!(held(&budget), (0, 3));
    }

    #[tokio::test]
    async fn who_hangs_up_leaves_nothing_behind_and_too_many_who_wait_are_refused() {
        let budget = Budget::new(10 * KIB, 1);
        let holds = window(&budget, 10).await;
        let grant = holds.grant(10 * KIB).await;
        drop(holds);
        let mut waits = Box::pin(budget.open(5 * KIB));
        assert!(waits.as_mut().now_or_never().is_none());
        assert!(matches!(budget.open(KIB).await, Err(Error::Busy)));
        drop(waits);
        let next = budget.open(10 * KIB);
        drop(grant);
        assert!(next.await.expect("room to wait").has_room());
        assert_eq!(held(&budget), (0, 10));
    }
}
