//! The worker's own tier: decoded, verified chunk KV in RAM under a byte cap.

use crate::engine::Canonical;
use cacheclip_chunk::ChunkKey;
use cacheclip_model::kv::ChunkKv;
use cacheclip_service::residency;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;

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

impl Weighter<ChunkKey, Section> for ByBytes {
    fn weight(&self, _: &ChunkKey, section: &Section) -> u64 {
        crate::engine::weight(&section.kv) + section.rank.as_ref().map_or(0, |rank| rank.len() as u64) + 128
    }
}

/// Sections by key; eviction resists scans. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Ram(Arc<Cache<ChunkKey, Section, ByBytes>>);

impl Ram {
    /// Keeps at most `bytes`.
    pub(crate) fn new(bytes: u64) -> Self {
        // The estimate sizes bookkeeping only: a megabyte per section.
        let sections = usize::try_from(bytes >> 20).unwrap_or(usize::MAX).clamp(64, 1 << 20);
        Self(Arc::new(Cache::with_weighter(sections, bytes, ByBytes)))
    }

    /// A section, if it is here.
    pub(crate) fn get(&self, key: &ChunkKey) -> Option<Section> {
        self.0.get(key)
    }

    /// What is here, in announcements' short form.
    pub(crate) fn held(&self) -> Vec<u64> {
        self.0.iter().map(|(key, _)| residency::short(key.as_bytes())).collect()
    }

    /// Keeps a section, evicting others; a section larger than the tier is not kept.
    pub(crate) fn insert(&self, key: ChunkKey, section: Section) {
        self.0.insert(key, section);
        crate::metrics::ram(self.0.weight());
    }
}
