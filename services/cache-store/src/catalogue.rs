//! What is on disk, as known in memory: records, their order of use, bytes, and why others are gone.

use cacheclip_chunk::{ChunkKey, ContainerHash, LayoutId};
use cacheclip_rpc::v1::MissReason;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;

/// Keys remembered after their object went; older ones count as never seen.
const REMEMBERED: usize = 64 << 10;

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

/// Something whose file may be removed to make room.
#[derive(Debug)]
pub(crate) enum Victim {
    /// A damaged container that was kept to be looked at.
    Quarantined(PathBuf, u64),
    /// The object that was not used for longest.
    Object(ChunkKey, u64),
}

/// The catalogue. Bytes count as used from reservation until their file is gone, so that the cap holds at
/// every moment and not just between operations.
#[derive(Debug)]
pub(crate) struct Catalogue {
    records: HashMap<ChunkKey, (Record, u64)>,
    by_use: BTreeMap<u64, ChunkKey>,
    clock: u64,
    used: u64,
    capacity: u64,
    quarantined: VecDeque<(PathBuf, u64)>,
    gone: Gone,
}

impl Catalogue {
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            records: HashMap::new(),
            by_use: BTreeMap::new(),
            clock: 0,
            used: 0,
            capacity,
            quarantined: VecDeque::new(),
            gone: Gone::default(),
        }
    }

    /// The record of a key, if its layout is the one asked for.
    pub(crate) fn find(&self, layout: LayoutId, key: &ChunkKey) -> Result<Record, MissReason> {
        match self.records.get(key) {
            Some((record, _)) if record.layout == layout => Ok(*record),
            Some(_) => Err(MissReason::Layout),
            None => Err(self.gone.reason(key)),
        }
    }

    /// Why a key without a record has none.
    pub(crate) fn reason(&self, key: &ChunkKey) -> MissReason {
        self.gone.reason(key)
    }

    pub(crate) fn record(&self, key: &ChunkKey) -> Option<Record> {
        self.records.get(key).map(|(record, _)| *record)
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = (ChunkKey, Record)> + '_ {
        self.records.iter().map(|(key, (record, _))| (*key, *record))
    }

    /// Marks a key as just used.
    pub(crate) fn touch(&mut self, key: &ChunkKey) {
        if let Some((_, used_at)) = self.records.get_mut(key) {
            self.by_use.remove(used_at);
            self.clock += 1;
            *used_at = self.clock;
            self.by_use.insert(self.clock, *key);
        }
    }

    /// Adds a record whose bytes are reserved already. The key must not be there.
    pub(crate) fn insert(&mut self, key: ChunkKey, record: Record) {
        self.gone.forget(&key);
        self.clock += 1;
        self.by_use.insert(self.clock, key);
        self.records.insert(key, (record, self.clock));
    }

    /// Takes a record out; its bytes stay used until [`Catalogue::release`].
    pub(crate) fn take(&mut self, key: &ChunkKey, reason: MissReason) -> Option<Record> {
        let (record, used_at) = self.records.remove(key)?;
        self.by_use.remove(&used_at);
        self.gone.remember(*key, reason);
        Some(record)
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

    /// Takes out what should go first.
    pub(crate) fn victim(&mut self) -> Option<Victim> {
        if let Some((path, bytes)) = self.quarantined.pop_front() {
            return Some(Victim::Quarantined(path, bytes));
        }
        let key = *self.by_use.values().next()?;
        let record = self.take(&key, MissReason::Evicted)?;
        Some(Victim::Object(key, record.bytes))
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
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
        let mut catalogue = Catalogue::new(100);
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
        let mut catalogue = Catalogue::new(100);
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
}
