//! What is on disk, as known in memory: records, their order of use and their time, bytes, and why others are gone.

use crate::clock::Clock;
use crate::disk;
use crate::journal::NEVER;
use cacheclip_chunk::{ChunkKey, ContainerHash, Head, LayoutId};
use cacheclip_rpc::v1::MissReason;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::path::PathBuf;

/// Keys remembered after their object went; older ones count as never seen.
pub(crate) const REMEMBERED: usize = 64 << 10;

/// One published object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) layout: LayoutId,
    pub(crate) hash: ContainerHash,
    /// Bytes of the container, which are those of its file.
    pub(crate) bytes: u64,
    /// Bytes of its header and segment table.
    pub(crate) head_len: usize,
}

impl From<&Head> for Record {
    fn from(head: &Head) -> Self {
        Self {
            layout: head.layout(),
            hash: head.hash(),
            bytes: head.container_len(),
            head_len: head.bytes().len(),
        }
    }
}

/// Something whose file may be removed to make room.
#[derive(Debug)]
pub(crate) enum Victim {
    /// A damaged container that was kept to be looked at.
    Quarantined(PathBuf, u64),
    /// The object that was not used for longest.
    Object(ChunkKey, u64),
}

/// A record, when it was last used, and its time.
#[derive(Clone, Copy, Debug)]
struct Slot {
    record: Record,
    used_at: u64,
    /// From then on it is not served.
    expires: u64,
    /// Until then it is not evicted; 0: it has no pin.
    pinned: u64,
}

/// The catalogue. Bytes count as used from reservation until their file is gone, so that the cap holds at
/// every moment and not just between operations.
#[derive(Debug)]
pub(crate) struct Catalogue {
    clock: Clock,
    slots: HashMap<ChunkKey, Slot>,
    /// What may be evicted; what is pinned is not here.
    by_use: BTreeMap<u64, ChunkKey>,
    /// What expires, by when.
    by_expiry: BTreeSet<(u64, ChunkKey)>,
    /// What is pinned, by how long.
    by_pin: BTreeSet<(u64, ChunkKey)>,
    pinned_bytes: u64,
    uses: u64,
    used: u64,
    capacity: u64,
    quarantined: VecDeque<(PathBuf, u64)>,
    gone: Gone,
}

impl Catalogue {
    pub(crate) fn new(capacity: u64, clock: Clock) -> Self {
        Self {
            clock,
            slots: HashMap::new(),
            by_use: BTreeMap::new(),
            by_expiry: BTreeSet::new(),
            by_pin: BTreeSet::new(),
            pinned_bytes: 0,
            uses: 0,
            used: 0,
            capacity,
            quarantined: VecDeque::new(),
            gone: Gone::default(),
        }
    }

    /// The record of a key, if its layout is the one asked for and its time is not over.
    pub(crate) fn find(&self, layout: LayoutId, key: &ChunkKey) -> Result<Record, MissReason> {
        match self.slots.get(key) {
            Some(slot) if slot.record.layout != layout => Err(MissReason::Layout),
            Some(slot) if self.is_over(slot) => Err(MissReason::Expired),
            Some(slot) => Ok(slot.record),
            None => Err(self.gone.reason(key)),
        }
    }

    fn is_over(&self, slot: &Slot) -> bool {
        slot.expires != NEVER && slot.expires <= self.clock.now()
    }

    /// Whether a key is here though its time is over.
    pub(crate) fn has_expired(&self, key: &ChunkKey) -> bool {
        self.slots.get(key).is_some_and(|slot| self.is_over(slot))
    }

    /// Why a key without a record has none.
    pub(crate) fn reason(&self, key: &ChunkKey) -> MissReason {
        self.gone.reason(key)
    }

    /// The record of a key, whether or not its time is over.
    pub(crate) fn record(&self, key: &ChunkKey) -> Option<Record> {
        self.slots.get(key).map(|slot| slot.record)
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = (ChunkKey, Record)> + '_ {
        self.slots.iter().map(|(key, slot)| (*key, slot.record))
    }

    /// Marks a key as just used.
    pub(crate) fn touch(&mut self, key: &ChunkKey) {
        if let Some(slot) = self.slots.get_mut(key) {
            self.uses += 1;
            if self.by_use.remove(&slot.used_at).is_some() {
                self.by_use.insert(self.uses, *key);
            }
            slot.used_at = self.uses;
        }
    }

    /// Adds a record whose bytes are reserved already. The key must not be there.
    pub(crate) fn insert(&mut self, key: ChunkKey, record: Record) {
        self.gone.forget(&key);
        self.uses += 1;
        self.by_use.insert(self.uses, key);
        self.slots.insert(key, Slot { record, used_at: self.uses, expires: NEVER, pinned: 0 });
    }

    /// Takes a record out; its bytes stay used until [`Catalogue::release`].
    pub(crate) fn take(&mut self, key: &ChunkKey, reason: MissReason) -> Option<Record> {
        self.unpin(key);
        let slot = self.slots.remove(key)?;
        self.by_use.remove(&slot.used_at);
        self.by_expiry.remove(&(slot.expires, *key));
        self.gone.remember(*key, reason);
        Some(slot.record)
    }

    /// Says when a key's time is over, [`NEVER`] included.
    pub(crate) fn expire_at(&mut self, key: &ChunkKey, expires: u64) {
        if let Some(slot) = self.slots.get_mut(key) {
            self.by_expiry.remove(&(slot.expires, *key));
            slot.expires = expires;
            if expires != NEVER {
                self.by_expiry.insert((expires, *key));
            }
        }
    }

    /// Keys whose time is over by `now`, not more than so many.
    pub(crate) fn expired(&self, now: u64, most: usize) -> Vec<ChunkKey> {
        let over = self.by_expiry.iter().take_while(|(expires, _)| *expires <= now);
        over.map(|(_, key)| *key).take(most).collect()
    }

    /// Keeps a key from eviction until then; false where it is not here.
    pub(crate) fn pin(&mut self, key: &ChunkKey, until: u64) -> bool {
        self.unpin(key);
        let Some(slot) = self.slots.get_mut(key) else { return false };
        slot.pinned = until;
        self.by_use.remove(&slot.used_at);
        self.by_pin.insert((until, *key));
        self.pinned_bytes += slot.record.bytes;
        true
    }

    /// Ends a key's pin; false where it is not here or has none.
    pub(crate) fn unpin(&mut self, key: &ChunkKey) -> bool {
        let Some(slot) = self.slots.get_mut(key).filter(|slot| slot.pinned != 0) else { return false };
        self.by_pin.remove(&(slot.pinned, *key));
        slot.pinned = 0;
        self.by_use.insert(slot.used_at, *key);
        self.pinned_bytes -= slot.record.bytes;
        true
    }

    /// Ends the pins whose time is over.
    pub(crate) fn end_pins(&mut self) {
        let now = self.clock.now();
        while let Some((_, key)) = self.by_pin.first().copied().filter(|(until, _)| *until <= now) {
            self.unpin(&key);
        }
    }

    /// Remembers why a key that has no record is gone.
    pub(crate) fn remember(&mut self, key: ChunkKey, reason: MissReason) {
        self.gone.remember(key, reason);
    }

    /// Reserves bytes if they fit.
    pub(crate) fn reserve(&mut self, bytes: u64) -> bool {
        let fits = self.used.checked_add(bytes).is_some_and(|used| used <= self.capacity);
        if fits {
            self.used += bytes;
        }
        fits
    }

    /// Counts bytes that are on disk whether they fit or not.
    pub(crate) fn occupy(&mut self, bytes: u64) {
        self.used = self.used.saturating_add(bytes);
    }

    /// Gives bytes back whose file is gone.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.used = self.used.saturating_sub(bytes);
    }

    /// Counts a file that was set aside.
    pub(crate) fn set_aside(&mut self, path: PathBuf, bytes: u64) {
        self.occupy(bytes);
        self.quarantined.push_back((path, bytes));
    }

    /// Takes out the damaged files of these keys.
    pub(crate) fn take_damaged(&mut self, keys: &HashSet<ChunkKey>) -> Vec<(PathBuf, u64)> {
        let (taken, left) = std::mem::take(&mut self.quarantined)
            .into_iter()
            .partition(|(path, _)| disk::name(path).is_some_and(|key| keys.contains(&key)));
        self.quarantined = left;
        Vec::from(taken)
    }

    /// Takes out what should go first, if anything may.
    pub(crate) fn victim(&mut self) -> Option<Victim> {
        if let Some((path, bytes)) = self.quarantined.pop_front() {
            return Some(Victim::Quarantined(path, bytes));
        }
        self.end_pins();
        let key = *self.by_use.values().next()?;
        let record = self.take(&key, MissReason::Evicted)?;
        Some(Victim::Object(key, record.bytes))
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(crate) fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    pub(crate) fn quarantined(&self) -> usize {
        self.quarantined.len()
    }
}

/// Why recent keys are gone; bounded, first in, first out.
#[derive(Debug, Default)]
struct Gone {
    reasons: HashMap<ChunkKey, (MissReason, u64)>,
    order: VecDeque<(ChunkKey, u64)>,
    clock: u64,
}

impl Gone {
    fn reason(&self, key: &ChunkKey) -> MissReason {
        self.reasons.get(key).map_or(MissReason::NeverSeen, |(reason, _)| *reason)
    }

    fn forget(&mut self, key: &ChunkKey) {
        self.reasons.remove(key);
    }

    fn remember(&mut self, key: ChunkKey, reason: MissReason) {
        self.clock += 1;
        self.reasons.insert(key, (reason, self.clock));
        self.order.push_back((key, self.clock));
        while self.order.len() > REMEMBERED {
            if let Some((key, at)) = self.order.pop_front()
                && self.reasons.get(&key).is_some_and(|(_, latest)| *latest == at)
            {
                self.reasons.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn key(n: u32) -> ChunkKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        ChunkKey::from_bytes(bytes)
    }

    const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);

    fn record(bytes: u64) -> Record {
        Record { layout: LAYOUT, hash: ContainerHash::from_bytes([2; 32]), bytes, head_len: 192 }
    }

    #[test]
    fn the_least_recently_used_goes_first_and_damaged_files_before_it() {
        let mut catalogue = Catalogue::new(100, Clock::system());
        for n in 0..3 {
            assert!(catalogue.reserve(30));
            catalogue.insert(key(n), record(30));
        }
        catalogue.touch(&key(0));
        catalogue.set_aside("x".into(), 5);
        assert!(!catalogue.reserve(6));
        assert!(matches!(catalogue.victim(), Some(Victim::Quarantined(_, 5))));
        assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 30)) if gone == key(1)));
        assert_eq!(catalogue.find(LAYOUT, &key(1)), Err(MissReason::Evicted));
        assert_eq!(catalogue.used(), 95, "bytes count until their file is gone");
        catalogue.release(35);
        assert!(catalogue.reserve(40));
    }

    #[test]
    fn reasons_are_told_and_their_memory_is_bounded() {
        let mut catalogue = Catalogue::new(100, Clock::system());
        catalogue.insert(key(1), record(1));
        assert_eq!(catalogue.find(LayoutId::from_bytes([9; 32]), &key(1)), Err(MissReason::Layout));
        assert_eq!(catalogue.find(LAYOUT, &key(2)), Err(MissReason::NeverSeen));
        catalogue.take(&key(1), MissReason::Deleted);
        assert_eq!(catalogue.find(LAYOUT, &key(1)), Err(MissReason::Deleted));
        for n in 0..REMEMBERED as u32 {
            catalogue.remember(key(n + 10), MissReason::Corrupt);
        }
        assert_eq!(catalogue.find(LAYOUT, &key(1)), Err(MissReason::NeverSeen));
        assert_eq!(catalogue.gone.reasons.len(), REMEMBERED);
    }

    #[test]
    fn what_is_over_is_not_found_and_what_is_pinned_is_no_victim() {
        let time = Arc::new(AtomicU64::new(100));
        let mut catalogue = Catalogue::new(100, Clock::manual(Arc::clone(&time)));
        for n in 0..3 {
            assert!(catalogue.reserve(10));
            catalogue.insert(key(n), record(10));
        }
        catalogue.expire_at(&key(1), 110);
        assert!(catalogue.pin(&key(0), 110) && !catalogue.pin(&key(7), 110));
        catalogue.touch(&key(0));
        assert_eq!((catalogue.pinned_bytes(), catalogue.expired(109, 9)), (10, vec![]));
        assert!(catalogue.find(LAYOUT, &key(1)).is_ok());
        assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 10)) if gone == key(1)));
        assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 10)) if gone == key(2)));
        assert!(catalogue.victim().is_none(), "all that is left is pinned");
        assert!(catalogue.expired(1000, 9).is_empty(), "what was evicted does not expire");

        catalogue.expire_at(&key(0), 120);
        time.store(120, Ordering::Relaxed);
        assert_eq!(catalogue.find(LAYOUT, &key(0)), Err(MissReason::Expired));
        assert_eq!(catalogue.expired(120, 9), [key(0)]);
        catalogue.expire_at(&key(0), NEVER);
        assert!(catalogue.find(LAYOUT, &key(0)).is_ok() && catalogue.expired(1000, 9).is_empty());
        assert!(
            matches!(catalogue.victim(), Some(Victim::Object(gone, 10)) if gone == key(0)),
            "its pin ended"
        );
        assert_eq!(catalogue.pinned_bytes(), 0);
    }

    #[test]
    fn the_damaged_files_of_a_key_are_found_by_their_names() {
        let mut catalogue = Catalogue::new(100, Clock::system());
        for (n, serial) in [(1, 0), (2, 0), (1, 1)] {
            catalogue.set_aside(format!("quarantine/{}.{serial}", key(n)).into(), 5);
        }
        let taken = catalogue.take_damaged(&HashSet::from([key(1)]));
        assert_eq!((taken.len(), catalogue.quarantined(), catalogue.used()), (2, 1, 15));
    }
}
