//! Whose turn it is to change a key's object in the bucket: keys that wait to be uploaded, that are being uploaded, and
//! that somebody holds to remove them. Bounded.

use cacheclip_chunk::ChunkKey;
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Notify;

/// What is done to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hand {
    Waits,
    Uploads,
    Holds,
}

/// Shared by the store, which offers, the uploaders, and whoever removes.
#[derive(Debug)]
pub(super) struct Uploads {
    most: usize,
    state: Mutex<State>,
    woken: Notify,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<ChunkKey>,
    hands: HashMap<ChunkKey, Hand>,
}

impl Uploads {
    pub(super) fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), woken: Notify::new(), freed: Condvar::new() }
    }

    /// Queues a key, unless something is done to it already; false where the queue is full.
    pub(super) fn offer(&self, key: ChunkKey) -> bool {
        let mut state = self.state.lock();
        if state.hands.contains_key(&key) {
            return true;
        }
        if state.queue.len() >= self.most {
            return false;
        }
        state.queue.push_back(key);
        state.hands.insert(key, Hand::Waits);
        self.woken.notify_one();
        true
    }

    /// The key whose turn has come; it is the caller's until [`Uploads::done`].
    pub(super) async fn next(&self) -> ChunkKey {
        loop {
            if let Some(key) = self.take() {
                return key;
            }
            self.woken.notified().await;
        }
    }

    fn take(&self) -> Option<ChunkKey> {
        let mut state = self.state.lock();
        let key = state.queue.pop_front()?;
        state.hands.insert(key, Hand::Uploads);
        if !state.queue.is_empty() {
            // Several that were offered at once woke one uploader.
            self.woken.notify_one();
        }
        Some(key)
    }

    /// An upload is over, well or not.
    pub(super) fn done(&self, key: &ChunkKey) {
        self.state.lock().hands.remove(key);
        self.freed.notify_all();
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.state.lock().hands.is_empty()
    }

    pub(super) fn waiting(&self) -> usize {
        self.state.lock().queue.len()
    }

    /// Takes keys in hand, all at once, so that two who want the same ones cannot wait for each other. What waits is
    /// not uploaded; what is being done is waited for, until then. Blocking.
    pub(super) fn hold(this: &Arc<Self>, keys: &[ChunkKey], until: Instant) -> Option<Hold> {
        let mut state = this.state.lock();
        let busy = |state: &State, key: &ChunkKey| state.hands.get(key).is_some_and(|it| *it != Hand::Waits);
        while keys.iter().any(|key| busy(&state, key)) {
            if this.freed.wait_until(&mut state, until).timed_out() {
                return None;
            }
        }
        for key in keys {
            if state.hands.insert(*key, Hand::Holds) == Some(Hand::Waits) {
                state.queue.retain(|it| it != key);
            }
        }
        Some(Hold { uploads: Arc::clone(this), keys: keys.to_vec() })
    }
}

/// Keys that nobody uploads meanwhile.
#[derive(Debug)]
pub(crate) struct Hold {
    uploads: Arc<Uploads>,
    keys: Vec<ChunkKey>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.uploads.state.lock();
        for key in &self.keys {
            state.hands.remove(key);
        }
        self.uploads.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn key(n: u8) -> ChunkKey {
        ChunkKey::from_bytes([n; 32])
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_takes_no_key_twice() {
        let uploads = Uploads::new(2);
        assert!(uploads.offer(key(1)) && uploads.offer(key(1)) && uploads.offer(key(2)));
        assert!(!uploads.offer(key(3)) && uploads.waiting() == 2);
        assert_eq!((uploads.next().await, uploads.next().await), (key(1), key(2)));
        assert!(uploads.offer(key(1)) && uploads.waiting() == 0, "it is being uploaded");
        uploads.done(&key(1));
        assert!(uploads.offer(key(1)) && uploads.waiting() == 1);
    }

    #[tokio::test]
    async fn who_removes_waits_for_an_upload_and_takes_its_turn_from_one_that_waits() {
        let uploads = Arc::new(Uploads::new(9));
        uploads.offer(key(1));
        uploads.offer(key(2));
        assert_eq!(uploads.next().await, key(1));
        let both = [key(1), key(2)];
        assert!(Uploads::hold(&uploads, &both, Instant::now()).is_none(), "the first is being uploaded");
        let far = Instant::now() + std::time::Duration::from_secs(60);
        let hold = thread::scope(|scope| {
            let holding = scope.spawn(|| Uploads::hold(&uploads, &both, far));
            uploads.done(&key(1));
            holding.join().unwrap().unwrap()
        });
        assert_eq!(uploads.waiting(), 0);
        assert!(uploads.offer(key(2)) && uploads.waiting() == 0, "it is held");
        drop(hold);
        assert!(uploads.offer(key(2)) && uploads.waiting() == 1);
    }
}
