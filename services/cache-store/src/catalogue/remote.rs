//! What the catalogue knows of the bucket: which objects have copies there, and which are nowhere else.

use super::{Catalogue, Record, Slot};
use crate::journal::NEVER;
use cacheclip_chunk::{ChunkKey, ContainerHash};
use cacheclip_rpc::v1::MissReason;
use std::collections::HashSet;

/// What is known of an object's copy in the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remote {
    /// There is none.
    No,
    /// There may be one, because it is being uploaded, or an upload failed, or the bucket has not been listed yet: not
    /// counted upon, and removed where the object is.
    Unsure,
    /// There is one, whole.
    Yes,
}

/// How much the bucket holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
}

impl Held {
    pub(super) fn count(&mut self, before: Remote, now: Remote, bytes: u64) {
        if before == Remote::Yes {
            self.objects -= 1;
            self.bytes -= bytes;
        }
        if now == Remote::Yes {
            self.objects += 1;
            self.bytes += bytes;
        }
    }
}

impl Catalogue {
    /// Adds a record of what is in the bucket and unknown yet.
    pub(crate) fn insert_remote(&mut self, key: ChunkKey, record: Record) {
        if !self.slots.contains_key(&key) {
            self.gone.forget(&key);
            self.uses += 1;
            let slot = Slot {
                record,
                on_disk: false,
                remote: Remote::Yes,
                used_at: self.uses,
                expires: NEVER,
                pinned: 0,
            };
            self.add(key, slot);
        }
    }

    /// A file goes: takes the record out, unless its object is in the bucket, too. Its bytes stay used until
    /// [`Catalogue::release`]; none where it is not on disk.
    pub(crate) fn leave_disk(&mut self, key: &ChunkKey, reason: MissReason) -> Option<u64> {
        let record = self.on_disk(key)?;
        self.unpin(key);
        if let Some(slot) = self.slots.get_mut(key) {
            slot.on_disk = false;
            self.by_use.remove(&slot.used_at);
            match slot.remote {
                Remote::No => drop(self.take(key, reason)),
                Remote::Unsure => self.gone.remember(*key, reason),
                Remote::Yes => {}
            }
        }
        Some(record.bytes)
    }

    /// What was in the bucket alone has a file again, whose bytes are reserved already.
    pub(crate) fn arrive(&mut self, key: &ChunkKey) {
        if let Some(slot) = self.slots.get_mut(key).filter(|slot| !slot.on_disk) {
            self.uses += 1;
            slot.on_disk = true;
            slot.used_at = self.uses;
            self.by_use.insert(self.uses, *key);
            self.gone.forget(key);
        }
    }

    /// Whether a key's object is served now.
    pub(crate) fn is_served(&self, key: &ChunkKey) -> bool {
        self.slots.get(key).is_some_and(|slot| slot.is_here() && !self.is_over(slot))
    }

    /// The record of a key of which there may be anything anywhere.
    pub(crate) fn known(&self, key: &ChunkKey) -> Option<Record> {
        self.slots.get(key).map(|slot| slot.record)
    }

    /// The container of that record.
    pub(crate) fn known_as(&self, key: &ChunkKey) -> Option<ContainerHash> {
        self.known(key).map(|record| record.hash)
    }

    /// What is known of a key's copy in the bucket.
    pub(crate) fn remote(&self, key: &ChunkKey) -> Remote {
        self.slots.get(key).map_or(Remote::No, |slot| slot.remote)
    }

    /// Says what is known of a key's copy in the bucket. What is then nowhere is taken out, and why it is gone stays as
    /// it was told.
    pub(crate) fn set_remote(&mut self, key: &ChunkKey, remote: Remote) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        let (before, bytes) = (std::mem::replace(&mut slot.remote, remote), slot.record.bytes);
        let nowhere = !slot.on_disk && remote == Remote::No;
        self.bucket.count(before, remote, bytes);
        if nowhere {
            self.remove(key);
        }
    }

    /// Nothing is known of the bucket yet: it may hold any of what is on disk.
    pub(crate) fn doubt(&mut self) {
        self.slots.values_mut().for_each(|slot| slot.remote = Remote::Unsure);
    }

    /// Keys whose copies in the bucket are not known to be there or not.
    pub(crate) fn unsure(&self) -> HashSet<ChunkKey> {
        let unsure = self.slots.iter().filter(|(_, slot)| slot.remote == Remote::Unsure);
        unsure.map(|(key, _)| *key).collect()
    }

    /// Keys on disk that are not surely in the bucket, the least recently used first: they go first.
    pub(crate) fn to_upload(&self) -> Vec<ChunkKey> {
        let waiting = |key: &&ChunkKey| {
            self.slots.get(*key).is_some_and(|slot| slot.remote != Remote::Yes && !self.is_over(slot))
        };
        let pinned = self.by_pin.iter().map(|(_, key)| key);
        self.by_use.values().chain(pinned).filter(waiting).copied().collect()
    }

    /// Keys of which the bucket may have something that nobody is served, not more than so many.
    pub(crate) fn strays(&self, most: usize) -> Vec<ChunkKey> {
        let strays = self.slots.iter().filter(|(_, slot)| !slot.is_here());
        strays.map(|(key, _)| *key).take(most).collect()
    }

    pub(crate) fn bucket(&self) -> Held {
        self.bucket
    }
}
