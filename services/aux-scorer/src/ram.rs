//! Auxiliary chunk KV in RAM, under a byte cap.
//!
//! What was deleted must not come back by a load or a computation that was under way meanwhile. Whoever will keep
//! something takes a mark before it begins; what was begun before the last deletion is not kept, whatever it is. That
//! is rare, and costs one more load.

use crate::auxiliary::Chunk;
use crate::identity::Digest;
use crate::metrics;
use cacheclip_rpc::v1::{Tier, TierDeletion};
use cacheclip_service::lifetime::{Held, Lifetime};
use cacheclip_service::residency;
use parking_lot::RwLock;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::cell::Cell;

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<Digest, Held<Chunk>> for ByBytes {
    fn weight(&self, _: &Digest, held: &Held<Chunk>) -> u64 {
        let chunk = &held.value;
        (chunk.kv.bytes() + chunk.spans.len() * 12 + 128) as u64
    }
}

/// How many deletions there had been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark(u64);

/// The tier; eviction resists scans.
#[derive(Debug)]
pub(crate) struct Ram {
    chunks: Cache<Digest, Held<Chunk>, ByBytes>,
    lifetime: Lifetime,
    /// Written to while something is deleted, read while something is kept.
    deletions: RwLock<u64>,
}

impl Ram {
    /// Keeps at most `bytes`, each chunk for its lifetime at most.
    pub(crate) fn new(bytes: u64, lifetime: Lifetime) -> Self {
        metrics::cache(0);
        // The estimate sizes bookkeeping only: a quarter of a megabyte per chunk.
        let chunks = usize::try_from(bytes >> 18).unwrap_or(usize::MAX).clamp(64, 1 << 20);
        let chunks = Cache::with_weighter(chunks, bytes, ByBytes);
        Self { chunks, lifetime, deletions: RwLock::new(0) }
    }

    /// Something begins that may be kept.
    pub(crate) fn mark(&self) -> Mark {
        Mark(*self.deletions.read())
    }

    /// A chunk, if it is here.
    pub(crate) fn get(&self, digest: &Digest) -> Option<Chunk> {
        let alive = self.lifetime.alive(self.chunks.get(digest)?);
        if alive.is_none() {
            // Somebody may have put it in again meanwhile.
            self.chunks.remove_if(digest, |held| self.lifetime.is_over(held));
            metrics::cache(self.chunks.weight());
        }
        alive
    }

    /// What is here, in announcements' short form.
    pub(crate) fn held(&self) -> Vec<u64> {
        let alive = self.chunks.iter().filter(|(_, held)| !self.lifetime.is_over(held));
        alive.map(|(digest, _)| residency::short(&digest)).collect()
    }

    /// Keeps a chunk that was begun at `mark`, evicting others.
    pub(crate) fn insert(&self, digest: Digest, chunk: Chunk, mark: Mark) {
        let deletions = self.deletions.read();
        if *deletions == mark.0 {
            self.chunks.insert(digest, chunk.into());
            metrics::cache(self.chunks.weight());
        }
    }

    /// Forgets the chunks that `goes` names; what went.
    pub(crate) fn forget(&self, goes: impl Fn(&Digest) -> bool) -> TierDeletion {
        let mut deletions = self.deletions.write();
        *deletions += 1;
        let (objects, bytes) = (Cell::new(0), Cell::new(0));
        self.chunks.retain(|digest, held| {
            let goes = goes(digest);
            if goes {
                objects.set(objects.get() + 1);
                bytes.set(bytes.get() + ByBytes.weight(digest, held));
            }
            !goes
        });
        metrics::cache(self.chunks.weight());
        metrics::forgotten(objects.get());
        TierDeletion::of(Tier::ScorerRam, objects.get(), bytes.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_model::kv::ChunkKv;

    fn chunk() -> Chunk {
        Chunk { kv: ChunkKv::new(Vec::new()), spans: [].into(), ids: [].into() }
    }

    #[test]
    fn what_has_been_here_for_its_time_is_not_served_and_not_announced() {
        let ram = Ram::new(1 << 20, std::time::Duration::ZERO.into());
        ram.insert([1; 32], chunk(), ram.mark());
        assert!(ram.held().is_empty() && ram.get(&[1; 32]).is_none());
        assert_eq!(ram.chunks.weight(), 0, "what was asked for in vain takes no room");
    }

    #[test]
    fn what_is_under_way_during_a_deletion_is_not_kept_and_what_begins_after_it_is() {
        let ram = Ram::new(1 << 20, Lifetime::seconds(0));
        let before = ram.mark();
        (1..=2).for_each(|n| ram.insert([n; 32], chunk(), before));
        let went = ram.forget(|digest| digest[0] == 1);
        assert_eq!((went.tier(), went.objects), (Tier::ScorerRam, 1));
        assert!(went.bytes > 0);
        ram.insert([1; 32], chunk(), before);
        assert!(ram.get(&[1; 32]).is_none() && ram.get(&[2; 32]).is_some());
        ram.insert([1; 32], chunk(), ram.mark());
        assert!(ram.get(&[1; 32]).is_some());
    }
}
