//! Chunks that came or went and that the index has not been told of; bounded.
//!
//! Only keys are kept: whoever announces them looks into the catalogue at that moment, so that the order in which
//! changes are announced cannot matter. When there are too many, all of them are forgotten, and everything has to
//! be announced anew.

use cacheclip_chunk::ChunkKey;
use parking_lot::Mutex;
use std::collections::HashMap;
use tokio::sync::Notify;

/// Changes that are kept, at most: about 4 MiB of keys.
pub(crate) const MOST: usize = 64 << 10;

/// Shared by the store, which tells, and the keeper, which announces. Telling never waits.
#[derive(Debug)]
pub(crate) struct Changes {
    most: usize,
    state: Mutex<State>,
    woken: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Whether the chunk came or went, by what was told last.
    keys: HashMap<ChunkKey, bool>,
    /// How many of them came.
    came: usize,
    overflowed: bool,
    doubted: bool,
}

/// How many changes wait to be announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) came: usize,
    pub(crate) went: usize,
    /// There were too many, and these are the later ones only.
    pub(crate) overflowed: bool,
}

impl Changes {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), woken: Notify::new() }
    }

    /// A chunk came or went.
    pub(crate) fn tell(&self, key: ChunkKey, came: bool) {
        self.state.lock().insert(key, came, self.most);
        self.woken.notify_one();
    }

    /// Somebody could not ask the index: it should be looked after.
    pub(crate) fn doubt(&self) {
        self.state.lock().doubted = true;
        self.woken.notify_one();
    }

    /// Takes some changes, in no order.
    pub(crate) fn take(&self, most: usize) -> Vec<(ChunkKey, bool)> {
        let mut state = self.state.lock();
        let taken: Vec<_> = state.keys.iter().take(most).map(|(key, came)| (*key, *came)).collect();
        for (key, came) in &taken {
            state.keys.remove(key);
            state.came -= usize::from(*came);
        }
        taken
    }

    /// Gives back what could not be announced; what was told meanwhile is newer.
    pub(crate) fn put_back(&self, taken: Vec<(ChunkKey, bool)>) {
        let mut state = self.state.lock();
        for (key, came) in taken {
            if !state.keys.contains_key(&key) {
                state.insert(key, came, self.most);
            }
        }
    }

    /// Whether there were too many changes since this was last asked.
    pub(crate) fn take_overflow(&self) -> bool {
        std::mem::take(&mut self.state.lock().overflowed)
    }

    /// Forgets the changes: everything has to be announced anew.
    pub(crate) fn overflow(&self) {
        self.state.lock().overflow();
    }

    /// Whether somebody doubted the index since this was last asked.
    pub(crate) fn take_doubt(&self) -> bool {
        std::mem::take(&mut self.state.lock().doubted)
    }

    pub(crate) fn waiting(&self) -> Waiting {
        let state = self.state.lock();
        Waiting { came: state.came, went: state.keys.len() - state.came, overflowed: state.overflowed }
    }

    /// Waits until something was told or doubted; at once if that was since the last wait.
    pub(crate) async fn woken(&self) {
        self.woken.notified().await;
    }
}

impl State {
    fn insert(&mut self, key: ChunkKey, came: bool, most: usize) {
        if self.overflowed {
            return;
        }
        if self.keys.len() >= most && !self.keys.contains_key(&key) {
            return self.overflow();
        }
        let before = self.keys.insert(key, came);
        self.came += usize::from(came);
        self.came -= usize::from(before == Some(true));
    }

    fn overflow(&mut self) {
        *self = Self { overflowed: true, doubted: self.doubted, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> ChunkKey {
        ChunkKey::from_bytes([n; 32])
    }

    fn waiting(came: usize, went: usize, overflowed: bool) -> Waiting {
        Waiting { came, went, overflowed }
    }

    #[test]
    fn the_last_word_on_a_chunk_counts() {
        let changes = Changes::new(10);
        changes.tell(key(1), true);
        changes.tell(key(2), true);
        changes.tell(key(1), false);
        assert_eq!(changes.waiting(), waiting(1, 1, false));
        let mut taken = changes.take(10);
        taken.sort();
        assert_eq!(taken, [(key(1), false), (key(2), true)]);
        assert_eq!(changes.waiting(), waiting(0, 0, false));
        changes.tell(key(2), false);
        changes.put_back(taken);
        assert_eq!(changes.waiting(), waiting(0, 2, false), "what was told meanwhile is newer");
    }

    #[test]
    fn too_many_changes_are_forgotten_and_that_is_remembered() {
        let changes = Changes::new(3);
        for n in 0..3 {
            changes.tell(key(n), true);
        }
        changes.tell(key(2), false);
        assert_eq!(changes.waiting(), waiting(2, 1, false), "a known key needs no more room");
        changes.tell(key(3), true);
        changes.tell(key(4), true);
        assert_eq!(changes.waiting(), waiting(0, 0, true));
        assert!(changes.take_overflow());
        assert!(!changes.take_overflow());
        changes.tell(key(5), true);
        assert_eq!(changes.waiting(), waiting(1, 0, false));
    }

    #[tokio::test]
    async fn nothing_that_is_told_before_the_wait_is_slept_through() {
        let changes = Changes::new(3);
        changes.doubt();
        changes.woken().await;
        assert!(changes.take_doubt());
        assert!(!changes.take_doubt());
    }
}
