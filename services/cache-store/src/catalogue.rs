//! What is on disk and in the bucket, as known in memory: records, their order of use and their time, bytes, and why
//! others are gone.

mod gone;
mod remote;

pub(crate) use remote::{Held, Remote};

use crate::clock::Clock;
use crate::disk;
use crate::journal::NEVER;
use cacheclip_chunk::{ChunkKey, ContainerHash, Head, LayoutId};
use cacheclip_rpc::v1::MissReason;
use gone::Gone;
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

/// What was taken out of the catalogue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) record: Record,
    /// It has a file, whose bytes stay used until [`Catalogue::release`].
    pub(crate) on_disk: bool,
    /// It was served from somewhere.
    pub(crate) here: bool,
}

/// A record, where its object is, when it was last used, and its time. What is not on disk and surely not in the
/// bucket has none.
#[derive(Clone, Copy, Debug)]
struct Slot {
    record: Record,
    on_disk: bool,
    remote: Remote,
    used_at: u64,
    /// From then on it is not served.
    expires: u64,
    /// Until then it is not evicted from disk; 0: it has no pin.
    pinned: u64,
}

impl Slot {
    /// Whether it can be served.
    fn is_here(&self) -> bool {
        self.on_disk || self.remote == Remote::Yes
    }
}

/// The catalogue. Bytes count as used from reservation until their file is gone, so that the cap holds at
/// every moment and not just between operations.
#[derive(Debug)]
pub(crate) struct Catalogue {
    clock: Clock,
    slots: HashMap<ChunkKey, Slot>,
    /// What may be evicted from disk; what is pinned is not here.
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
    bucket: Held,
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
            bucket: Held::default(),
            gone: Gone::default(),
        }
    }

    /// The record of a key, if its layout is the one asked for and its time is not over.
    pub(crate) fn find(&self, layout: LayoutId, key: &ChunkKey) -> Result<Record, MissReason> {
        match self.slots.get(key).filter(|slot| slot.is_here()) {
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

    /// The record of a key that is on disk or in the bucket, whether or not its time is over.
    pub(crate) fn record(&self, key: &ChunkKey) -> Option<Record> {
        self.slots.get(key).filter(|slot| slot.is_here()).map(|slot| slot.record)
    }

    /// The record of a key that is on disk.
    pub(crate) fn on_disk(&self, key: &ChunkKey) -> Option<Record> {
        self.slots.get(key).filter(|slot| slot.on_disk).map(|slot| slot.record)
    }

    /// All that is on disk or in the bucket.
    pub(crate) fn records(&self) -> impl Iterator<Item = (ChunkKey, Record)> + '_ {
        self.slots.iter().filter(|(_, slot)| slot.is_here()).map(|(key, slot)| (*key, slot.record))
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

    /// Adds a record of a file whose bytes are reserved already. The key must not be on disk; in the bucket it may be.
    pub(crate) fn insert(&mut self, key: ChunkKey, record: Record) {
        self.gone.forget(&key);
        let before = self.remove(&key);
        let remote = match before {
            None => Remote::No,
            Some(before) if before.record.hash == record.hash && !self.is_over(&before) => before.remote,
            // Another container, or one whose time began earlier: the upload of this one takes its place.
            Some(before) => match before.remote {
                Remote::No => Remote::No,
                Remote::Unsure | Remote::Yes => Remote::Unsure,
            },
        };
        self.uses += 1;
        self.by_use.insert(self.uses, key);
        let slot = Slot { record, on_disk: true, remote, used_at: self.uses, expires: NEVER, pinned: 0 };
        self.add(key, slot);
    }

    fn add(&mut self, key: ChunkKey, slot: Slot) {
        self.bucket.count(Remote::No, slot.remote, slot.record.bytes);
        self.slots.insert(key, slot);
    }

    fn remove(&mut self, key: &ChunkKey) -> Option<Slot> {
        self.unpin(key);
        let slot = self.slots.remove(key)?;
        if slot.on_disk {
            self.by_use.remove(&slot.used_at);
        }
        self.by_expiry.remove(&(slot.expires, *key));
        self.bucket.count(slot.remote, Remote::No, slot.record.bytes);
        Some(slot)
    }

    /// Takes a record out, wherever its object is.
    pub(crate) fn take(&mut self, key: &ChunkKey, reason: MissReason) -> Option<Taken> {
        let slot = self.remove(key)?;
        self.gone.remember(*key, reason);
        Some(Taken { record: slot.record, on_disk: slot.on_disk, here: slot.is_here() })
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

    /// As [`Catalogue::expire_at`], unless its time is over earlier.
    pub(crate) fn expire_by(&mut self, key: &ChunkKey, expires: u64) {
        if self.slots.get(key).is_some_and(|slot| slot.expires > expires) {
            self.expire_at(key, expires);
        }
    }

    /// Keys whose time is over by `now`, not more than so many.
    pub(crate) fn expired(&self, now: u64, most: usize) -> Vec<ChunkKey> {
        let over = self.by_expiry.iter().take_while(|(expires, _)| *expires <= now);
        over.map(|(_, key)| *key).take(most).collect()
    }

    /// Keeps a key from eviction until then; false where it is not on disk.
    pub(crate) fn pin(&mut self, key: &ChunkKey, until: u64) -> bool {
        self.unpin(key);
        let Some(slot) = self.slots.get_mut(key).filter(|slot| slot.on_disk) else { return false };
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

    /// Takes from the disk's books what should go first, if anything may.
    pub(crate) fn victim(&mut self) -> Option<Victim> {
        if let Some((path, bytes)) = self.quarantined.pop_front() {
            return Some(Victim::Quarantined(path, bytes));
        }
        self.end_pins();
        let key = *self.by_use.values().next()?;
        let bytes = self.leave_disk(&key, MissReason::Evicted)?;
        Some(Victim::Object(key, bytes))
    }

    /// How many objects are on disk.
    pub(crate) fn len(&self) -> usize {
        self.by_use.len() + self.by_pin.len()
    }

    /// How many objects are on disk or in the bucket.
    pub(crate) fn records_len(&self) -> usize {
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

#[cfg(test)]
mod tests;
