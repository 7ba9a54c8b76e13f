//! The RAM tier: verified segments of the objects that are read again.
//!
//! Scan-resistant by three queues (as in S3-FIFO): what is new waits in a small queue and leaves it unseen if
//! nobody asks again; what was asked for again, or comes back soon after it left, goes to the main queue. A sweep
//! over many chunks thus passes through the small queue and leaves the main one alone.
//!
//! The budget is for all segments in memory: what readers hold of objects that are not here takes room from those that
//! are.

use crate::held::Held;
use crate::metrics;
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, ContainerHash, Head};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

/// Share of the capacity that new objects may fill.
const SMALL_PERCENT: u64 = 10;
/// Uses that are counted; more add nothing.
const MOST_USES: u8 = 3;
/// Keys remembered after they left the small queue.
const GHOSTS: usize = 4096;

/// An object with those of its segments that have been read; each is verified once, when it is read.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) head: Head,
    segments: Box<[Mutex<Option<Bytes>>]>,
}

impl Resident {
    pub(crate) fn new(head: Head) -> Self {
        let segments = head.segments().iter().map(|_| Mutex::default()).collect();
        Self { head, segments }
    }

    /// A segment's verified stored bytes, if it has been read.
    pub(crate) fn segment(&self, index: usize) -> Option<Bytes> {
        self.segments.get(index)?.lock().clone()
    }

    /// Whether all of these segments have been read.
    pub(crate) fn has(&self, mut segments: impl Iterator<Item = usize>) -> bool {
        segments.all(|index| self.segments.get(index).is_some_and(|slot| slot.lock().is_some()))
    }

    /// Lets go of the segments: a reader that is slow keeps its object, but not the bytes of one that left the tier. How
    /// many bytes that were.
    fn empty(&self) -> u64 {
        let bytes = |stored: Bytes| stored.len() as u64;
        self.segments.iter().map(|slot| slot.lock().take().map_or(0, bytes)).sum()
    }

    /// What it is charged: its whole container, though segments come one by one.
    fn bytes(&self) -> u64 {
        self.head.container_len()
    }
}

#[derive(Debug)]
struct Entry {
    object: Arc<Resident>,
    uses: u8,
    in_main: bool,
}

/// Objects within a byte budget.
#[derive(Debug)]
pub(crate) struct Ram {
    entries: HashMap<ChunkKey, Entry>,
    small: VecDeque<ChunkKey>,
    main: VecDeque<ChunkKey>,
    ghosts: VecDeque<ChunkKey>,
    known_ghosts: HashSet<ChunkKey>,
    used: u64,
    small_used: u64,
    capacity: u64,
    held: Held,
    /// Those of the bytes held that are here.
    filled: u64,
}

impl Ram {
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            entries: HashMap::new(),
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            known_ghosts: HashSet::new(),
            used: 0,
            small_used: 0,
            capacity,
            held: Held::default(),
            filled: 0,
        }
    }

    /// The object, which thereby counts as used.
    pub(crate) fn get(&mut self, key: &ChunkKey) -> Option<Arc<Resident>> {
        let entry = self.entries.get_mut(key)?;
        entry.uses = MOST_USES.min(entry.uses + 1);
        Some(Arc::clone(&entry.object))
    }

    /// The object, if it is here; not a use.
    pub(crate) fn peek(&self, key: &ChunkKey) -> Option<&Arc<Resident>> {
        self.entries.get(key).map(|entry| &entry.object)
    }

    /// The object with this container hash, if it is here; not a use.
    pub(crate) fn peek_at(&self, key: &ChunkKey, container: ContainerHash) -> Option<&Arc<Resident>> {
        self.peek(key).filter(|object| object.head.hash() == container)
    }

    /// Where bytes of segments are counted as they are read.
    pub(crate) fn held(&self) -> Held {
        self.held.clone()
    }

    /// Keeps a segment's verified bytes if their object is here: others are the reader's alone.
    pub(crate) fn fill(&mut self, key: &ChunkKey, container: ContainerHash, index: usize, stored: Bytes) {
        let bytes = stored.len() as u64;
        let slot = self.peek_at(key, container).and_then(|object| object.segments.get(index));
        if slot.is_some_and(|slot| slot.lock().replace(stored).is_none()) {
            self.filled += bytes;
        }
        self.make_room(0);
    }

    /// Bytes that readers hold of segments that are not here.
    fn beside(&self) -> u64 {
        self.held.bytes().saturating_sub(self.filled)
    }

    /// Evicts until so many bytes more are within the budget; whether they are.
    fn make_room(&mut self, bytes: u64) -> bool {
        loop {
            if self.used + self.beside() + bytes <= self.capacity {
                return true;
            }
            if self.entries.is_empty() {
                return false;
            }
            self.evict();
        }
    }

    /// Takes an object in, evicting others. Objects larger than the tier stay out, and others where readers hold too
    /// much.
    pub(crate) fn insert(&mut self, object: Arc<Resident>) {
        let (key, bytes) = (object.head.key(), object.bytes());
        self.remove(&key);
        // Nobody has to go for what finds no room all the same.
        if self.beside() + bytes > self.capacity || !self.make_room(bytes) {
            return;
        }
        let in_main = self.known_ghosts.remove(&key);
        if in_main {
            self.ghosts.retain(|ghost| *ghost != key);
            self.main.push_back(key);
        } else {
            self.small.push_back(key);
            self.small_used += bytes;
        }
        self.used += bytes;
        self.entries.insert(key, Entry { object, uses: 0, in_main });
    }

    /// Removes an object, say because it was deleted or is damaged.
    pub(crate) fn remove(&mut self, key: &ChunkKey) {
        if let Some(entry) = self.entries.remove(key) {
            let queue = if entry.in_main { &mut self.main } else { &mut self.small };
            queue.retain(|queued| queued != key);
            self.forget(&entry);
        }
    }

    /// Removes this very object, not one that has taken its place.
    pub(crate) fn remove_this(&mut self, object: &Arc<Resident>) {
        let key = object.head.key();
        if self.peek(&key).is_some_and(|it| Arc::ptr_eq(it, object)) {
            self.remove(&key);
        }
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    fn forget(&mut self, entry: &Entry) {
        self.filled -= entry.object.empty();
        self.used -= entry.object.bytes();
        if !entry.in_main {
            self.small_used -= entry.object.bytes();
        }
    }

    /// One step towards room: an eviction, a promotion or a second chance. Queues hold only keys with entries,
    /// and uses are finite, so repeated steps end with an eviction.
    fn evict(&mut self) {
        let small_is_full = self.small_used * 100 >= self.capacity * SMALL_PERCENT;
        let from_small = !self.small.is_empty() && (small_is_full || self.main.is_empty());
        let queue = if from_small { &mut self.small } else { &mut self.main };
        let Some(key) = queue.pop_front() else { return };
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if entry.uses > 0 {
            entry.uses = if from_small { 0 } else { entry.uses - 1 };
            if from_small {
                entry.in_main = true;
                self.small_used -= entry.object.bytes();
            }
            self.main.push_back(key);
            return;
        }
        if let Some(entry) = self.entries.remove(&key) {
            self.forget(&entry);
        }
        metrics::evicted(metrics::RAM, "capacity");
        if from_small && self.known_ghosts.insert(key) {
            self.ghosts.push_back(key);
            if self.ghosts.len() > GHOSTS
                && let Some(oldest) = self.ghosts.pop_front()
            {
                self.known_ghosts.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_chunk::{Codec, Dtype, KvShape, LayoutId, Parts, encode};

    fn object(n: u32) -> Arc<Resident> {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 8 };
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_le_bytes());
        let layer = vec![0; shape.layer_bytes(4, Dtype::F32) as usize];
        let parts = Parts {
            layout: LayoutId::from_bytes([1; 32]),
            key: ChunkKey::from_bytes(key),
            shape,
            tokens: 4,
            dtype: Dtype::F32,
            layers: vec![&layer],
            spans: None,
            rank: None,
        };
        Arc::new(Resident::new(Head::parse(&encode(&parts, Codec::Raw).unwrap()).unwrap()))
    }

    #[test]
    fn what_is_used_again_survives_a_sweep() {
        let size = object(0).bytes();
        let mut ram = Ram::new(size * 20);
        for n in 0..5 {
            ram.insert(object(n));
            assert!(ram.get(&object(n).head.key()).is_some());
        }
        for n in 100..1000 {
            ram.insert(object(n));
            assert!(ram.used() <= ram.capacity());
        }
        for n in 0..5 {
            assert!(ram.peek(&object(n).head.key()).is_some(), "object {n} was swept out");
        }
    }

    #[test]
    fn the_budget_holds_whatever_comes_and_goes() {
        let size = object(0).bytes();
        let mut ram = Ram::new(size * 7 + 1);
        for n in 0..2000u32 {
            let at = n.wrapping_mul(2_654_435_761) >> 24;
            match at % 4 {
                0 => ram.remove(&object(at).head.key()),
                1 => drop(ram.get(&object(at).head.key())),
                _ => ram.insert(object(at)),
            }
            let held: u64 = ram.entries.values().map(|entry| entry.object.bytes()).sum();
            assert_eq!(held, ram.used());
            assert!(held <= ram.capacity());
            assert_eq!(ram.small.len() + ram.main.len(), ram.entries.len());
        }
    }

    #[test]
    fn what_left_the_tier_holds_no_bytes_and_takes_none_though_a_reader_has_it() {
        let (first, second) = (object(1), object(2));
        let (key, hash) = (first.head.key(), first.head.hash());
        let mut ram = Ram::new(first.bytes());
        ram.insert(Arc::clone(&first));
        ram.fill(&key, hash, 0, Bytes::from_static(b"x"));
        ram.fill(&key, ContainerHash::from_bytes([9; 32]), 0, Bytes::from_static(b"y"));
        assert_eq!(first.segment(0).unwrap(), "x");
        ram.insert(second);
        assert_eq!(first.segment(0), None);
        ram.fill(&key, hash, 0, Bytes::from_static(b"x"));
        assert!(!first.has([0].into_iter()));
    }

    #[test]
    fn what_readers_hold_takes_room_from_the_tier() {
        let size = object(0).bytes();
        let mut ram = Ram::new(size * 4);
        let read = |ram: &mut Ram, n| {
            let object = object(n);
            ram.insert(Arc::clone(&object));
            let stored = ram.held().count(Bytes::from(vec![0; size as usize]));
            ram.fill(&object.head.key(), object.head.hash(), 0, stored.clone());
            stored
        };
        let mut readers: Vec<Bytes> = (0..4).map(|n| read(&mut ram, n)).collect();
        assert_eq!((ram.used(), ram.beside()), (4 * size, 0), "what is here counts once");
        drop(readers.split_off(2));
        readers.push(read(&mut ram, 4));
        assert!(ram.used() + ram.beside() <= ram.capacity());
        assert_eq!(ram.beside(), 2 * size, "two readers hold what has left the tier");
        readers.extend((5..9).map(|n| read(&mut ram, n)));
        assert_eq!(ram.used(), 0, "readers hold as much as the tier may keep");
        drop(readers);
        drop(read(&mut ram, 9));
        assert_eq!((ram.used(), ram.beside()), (size, 0));
    }

    #[test]
    fn an_object_larger_than_the_tier_stays_out() {
        let mut ram = Ram::new(10);
        ram.insert(object(1));
        assert_eq!((ram.used(), ram.entries.len()), (0, 0));
    }
}
