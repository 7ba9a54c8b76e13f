//! What the worker remembers in RAM: decoded, verified chunk KV under a byte cap, and importance sets of questions that
//! may come again.
//!
//! What was deleted must not come back by a load or a computation that was under way meanwhile. Whoever will remember
//! something takes a mark before it begins; what was begun before the last deletion is not remembered, whatever it
//! is. That is rare, and costs one more load.

use crate::engine::Canonical;
use cacheclip_chunk::ChunkKey;
use cacheclip_model::kv::ChunkKv;
use cacheclip_plan::Scored;
use cacheclip_rpc::v1::{Tier, TierDeletion};
use cacheclip_service::lifetime::{Held, Lifetime};
use cacheclip_service::residency;
use parking_lot::RwLock;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, Weighter};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::Arc;

/// Importance sets kept for repeated questions.
const SETS: usize = 1024;

/// Scored spans per chunk, as kept for the next time the same question meets the same chunks.
pub(crate) type Set = Arc<Vec<Vec<Scored>>>;

/// A section's KV as the worker keeps it.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// Position-free KV.
    pub kv: ChunkKv,
    /// Static rank per token, where one of the current version is known.
    pub rank: Option<Arc<[u8]>>,
    /// Size of its container; 0 while it was never encoded.
    pub container_bytes: u64,
}

impl Section {
    /// A section that was computed here.
    pub(crate) fn of(canonical: &Canonical) -> Self {
        Self { kv: canonical.kv.clone(), rank: Some(canonical.rank.clone().into()), container_bytes: 0 }
    }
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<ChunkKey, Held<Section>> for ByBytes {
    fn weight(&self, _: &ChunkKey, held: &Held<Section>) -> u64 {
        let section = &held.value;
        crate::engine::weight(&section.kv) + section.rank.as_ref().map_or(0, |rank| rank.len() as u64) + 128
    }
}

/// What requests read is not evicted: as long as they hold it, it takes its room here and nowhere else.
#[derive(Clone, Debug)]
struct UntilPlaced;

impl Lifecycle<ChunkKey, Held<Section>> for UntilPlaced {
    type RequestState = ();

    fn is_pinned(&self, _: &ChunkKey, held: &Held<Section>) -> bool {
        held.value.kv.in_use()
    }
}

/// How many deletions there had been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark(u64);

/// The tier; eviction resists scans. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Ram(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    sections: Cache<ChunkKey, Held<Section>, ByBytes, DefaultHashBuilder, UntilPlaced>,
    bytes: u64,
    lifetime: Lifetime,
    /// With the chunks they are about.
    sets: Cache<[u8; 32], (Arc<[ChunkKey]>, Set)>,
    /// Written to while something is deleted, read while something is remembered.
    deletions: RwLock<u64>,
}

impl Ram {
    /// Keeps at most `bytes` of KV, each section for its lifetime at most.
    pub(crate) fn new(bytes: u64, lifetime: Lifetime) -> Self {
        crate::metrics::ram(0);
        // The estimate sizes bookkeeping only: a megabyte per section.
        let sections = usize::try_from(bytes >> 20).unwrap_or(usize::MAX).clamp(64, 1 << 20);
        Self(Arc::new(Inner {
            sections: Cache::with(sections, bytes, ByBytes, DefaultHashBuilder::default(), UntilPlaced),
            bytes,
            lifetime,
            sets: Cache::new(SETS),
            deletions: RwLock::new(0),
        }))
    }

    /// Something begins that may be remembered.
    pub(crate) fn mark(&self) -> Mark {
        Mark(*self.0.deletions.read())
    }

    /// Whether a section of so many bytes of KV may be kept at all.
    pub(crate) fn holds(&self, bytes: u64) -> bool {
        bytes < self.0.bytes
    }

    /// A section, if it is here. It stays as long as its KV is in use.
    pub(crate) fn get(&self, key: &ChunkKey) -> Option<Section> {
        let Inner { sections, lifetime, .. } = &*self.0;
        let alive = lifetime.alive(sections.get(key)?);
        if alive.is_none() {
            // Somebody may have put it in again meanwhile.
            sections.remove_if(key, |held| lifetime.is_over(held));
            crate::metrics::ram(sections.weight());
        }
        alive
    }

    /// What is here, in announcements' short form.
    pub(crate) fn held(&self) -> Vec<u64> {
        let alive = self.0.sections.iter().filter(|(_, held)| !self.0.lifetime.is_over(held));
        alive.map(|(key, _)| residency::short(key.as_bytes())).collect()
    }

    /// Keeps a section that was begun at `mark`, evicting others; a section larger than the tier is not kept.
    pub(crate) fn insert(&self, key: ChunkKey, section: Section, mark: Mark) {
        let deletions = self.0.deletions.read();
        // One that is in use is not evicted, not even where it is too large: it must not come in.
        let held = Held::from(section);
        if *deletions == mark.0 && self.holds(ByBytes.weight(&key, &held)) {
            self.0.sections.insert(key, held);
            crate::metrics::ram(self.0.sections.weight());
        }
    }

    /// The importance set of a question that came before.
    pub(crate) fn set(&self, question: &[u8; 32]) -> Option<Set> {
        self.0.sets.get(question).map(|(_, set)| set)
    }

    /// Keeps the importance set of a question over these chunks that was begun at `mark`.
    pub(crate) fn keep_set(&self, question: [u8; 32], chunks: Arc<[ChunkKey]>, set: Set, mark: Mark) {
        let deletions = self.0.deletions.read();
        if *deletions == mark.0 {
            self.0.sets.insert(question, (chunks, set));
        }
    }

    /// Forgets chunks and what was scored over them; what went.
    pub(crate) fn forget(&self, keys: &[ChunkKey]) -> TierDeletion {
        let keys: HashSet<&ChunkKey> = keys.iter().collect();
        self.delete(|key| keys.contains(key))
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) -> TierDeletion {
        self.delete(|_| true)
    }

    fn delete(&self, goes: impl Fn(&ChunkKey) -> bool) -> TierDeletion {
        let mut deletions = self.0.deletions.write();
        *deletions += 1;
        let (objects, bytes) = (Cell::new(0), Cell::new(0));
        self.0.sections.retain(|key, held| {
            let goes = goes(key);
            if goes {
                objects.set(objects.get() + 1);
                bytes.set(bytes.get() + ByBytes.weight(key, held));
            }
            !goes
        });
        let (objects, bytes) = (objects.get(), bytes.get());
        self.0.sets.retain(|_, (chunks, _)| !chunks.iter().any(&goes));
        crate::metrics::ram(self.0.sections.weight());
        crate::metrics::forgotten(objects);
        TierDeletion::of(Tier::WorkerRam, objects, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_model::kv::LayerKv;

    fn key(n: u8) -> ChunkKey {
        ChunkKey::from_bytes([n; 32])
    }

    fn section() -> Section {
        Section { kv: ChunkKv::new(Vec::new()), rank: Some([1, 2, 3].into()), container_bytes: 0 }
    }

    fn ram() -> Ram {
        let ram = Ram::new(1 << 20, Lifetime::seconds(0));
        (1..=3).for_each(|n| ram.insert(key(n), section(), ram.mark()));
        ram
    }

    fn here(ram: &Ram) -> Vec<u8> {
        (1..=9).filter(|n| ram.get(&key(*n)).is_some()).collect()
    }

    #[test]
    fn what_is_under_way_during_a_deletion_is_not_remembered_and_what_begins_after_it_is() {
        let ram = ram();
        let before = ram.mark();
        let went = ram.forget(&[key(1), key(9)]);
        assert_eq!((went.tier(), went.objects), (Tier::WorkerRam, 1));
        assert!(went.bytes > 0);
        assert_eq!(here(&ram), [2, 3]);
        ram.insert(key(1), section(), before);
        ram.keep_set([0; 32], [key(1)].into(), Set::default(), before);
        assert!(here(&ram) == [2, 3] && ram.set(&[0; 32]).is_none());
        ram.insert(key(1), section(), ram.mark());
        assert_eq!(here(&ram), [1, 2, 3]);
    }

    #[test]
    fn what_has_been_here_for_its_time_is_not_served_and_not_announced() {
        let ram = Ram::new(1 << 20, std::time::Duration::ZERO.into());
        (1..=3).for_each(|n| ram.insert(key(n), section(), ram.mark()));
        assert!(ram.held().is_empty() && here(&ram).is_empty());
        assert_eq!(ram.0.sections.weight(), 0, "what was asked for in vain takes no room");
    }

    #[test]
    fn a_tier_without_room_keeps_nothing_not_even_what_is_in_use() {
        let layer = LayerKv::new(vec![0.0; 16], 1);
        let section = Section { kv: ChunkKv::new(vec![layer]), rank: None, container_bytes: 0 };
        let ram = Ram::new(0, Lifetime::seconds(0));
        ram.insert(key(1), section.clone(), ram.mark());
        assert!(ram.get(&key(1)).is_none() && section.kv.tokens() == 1);
    }

    #[test]
    fn what_is_read_stays_and_what_is_not_makes_room() {
        const BYTES: u64 = 1 << 20;
        let section = || {
            let layer = LayerKv::new(vec![0.0; 16 << 10], 1);
            Section { kv: ChunkKv::new(vec![layer]), rank: None, container_bytes: 0 }
        };
        let ram = Ram::new(BYTES, Lifetime::seconds(0));
        assert!(ram.holds(64 << 10) && !ram.holds(BYTES));
        // Each is asked for often enough to take the place of one that is not.
        let keep = |keys: std::ops::RangeInclusive<u8>| {
            for n in keys {
                ram.insert(key(n), section(), ram.mark());
                (0..3).for_each(|_| drop(ram.get(&key(n))));
            }
        };
        keep(1..=30);
        let read: Vec<(u8, Section)> = (1..=30).filter_map(|n| Some((n, ram.get(&key(n))?))).collect();
        let here = |n: &u8| ram.0.sections.peek(&key(*n)).is_some();
        keep(31..=90);
        assert!(read.len() > 4 && read.iter().all(|(n, _)| here(n)));
        let were: Vec<u8> = read.iter().map(|(n, _)| *n).collect();
        drop(read);
        keep(91..=200);
        assert!(!were.iter().all(here) && ram.0.sections.weight() <= BYTES);
    }

    #[test]
    fn sets_over_a_deleted_chunk_go_and_others_stay() {
        let ram = ram();
        for n in 1..=2 {
            let chunks = [key(n), key(n + 1)].into();
            ram.keep_set([n; 32], chunks, Set::default(), ram.mark());
        }
        ram.forget(&[key(1)]);
        assert!(ram.set(&[1; 32]).is_none() && ram.set(&[2; 32]).is_some());
        assert_eq!(ram.clear().objects, 2);
        assert!(here(&ram).is_empty() && ram.set(&[2; 32]).is_none());
    }
}
