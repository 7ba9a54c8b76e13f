//! Finds the KV of a request's sections: own RAM, else the stores, else computed canonically, kept and written
//! behind. Hits and misses give the same KV, so they give the same answer.

use crate::engine::{Canonical, Engine};
use crate::layout::Layout;
use crate::metrics;
use crate::ram::{Ram, Section};
use crate::writer::Writer;
use cacheclip_chunk::{ByteSpan, ChunkKey};
use cacheclip_client::{Item, Located, StoreClient};
use cacheclip_model::kv::{ChunkKv, LayerKv};
use cacheclip_model::layout::layer;
use cacheclip_rpc::v1::{MissReason, Tier};
use futures::StreamExt as _;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// A section to find.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Content key.
    pub key: ChunkKey,
    /// Token ids, for the case that it must be computed.
    pub ids: Vec<u32>,
    /// Byte spans of the tokens, stored beside the KV.
    pub spans: Vec<ByteSpan>,
    /// Whether it is encoded behind the anchor (chunks) or starts the prompt itself (prefixes).
    pub anchored: bool,
}

/// A section that was found or computed.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Its KV.
    pub section: Section,
    /// Where it was.
    pub tier: Tier,
    /// Why it was in no cache.
    pub reason: Option<MissReason>,
}

/// Finds sections. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Loader {
    ram: Ram,
    stores: Option<StoreClient>,
    engine: Engine,
    writer: Option<Writer>,
    layout: Arc<Layout>,
    anchor: Arc<[u32]>,
    timeout: Duration,
}

impl Loader {
    /// Looks in `ram`, then in `stores`, then asks `engine`; what was computed goes to `writer`.
    pub(crate) fn new(
        ram: Ram,
        stores: Option<StoreClient>,
        engine: Engine,
        writer: Option<Writer>,
        layout: Arc<Layout>,
        anchor: Arc<[u32]>,
        timeout: Duration,
    ) -> Self {
        Self { ram, stores, engine, writer, layout, anchor, timeout }
    }

    /// What RAM holds, in announcements' short form.
    pub(crate) fn held(&self) -> Vec<u64> {
        self.ram.held()
    }

    /// All sections, in order; the same key twice is found once.
    ///
    /// # Errors
    /// Only what keeps a section from being computed.
    pub(crate) async fn load(&self, wanted: &[Wanted]) -> Result<Vec<Found>, crate::engine::Error> {
        let mut found: HashMap<ChunkKey, Found> = HashMap::new();
        let mut missing: Vec<&Wanted> = Vec::new();
        let mut seen = HashSet::new();
        for want in wanted.iter().filter(|want| seen.insert(want.key)) {
            match self.ram.get(&want.key).filter(|section| section.kv.tokens() == want.ids.len()) {
                Some(section) => {
                    found.insert(want.key, Found { section, tier: Tier::WorkerRam, reason: None });
                }
                None => missing.push(want),
            }
        }
        let mut reasons = HashMap::new();
        if let Some(stores) = self.stores.as_ref().filter(|_| !missing.is_empty()) {
            reasons = self.fetch(stores, &missing, &mut found).await;
        }
        for want in missing.iter().filter(|want| !found.contains_key(&want.key)).collect::<Vec<_>>() {
            let reason = reasons.get(&want.key).copied().unwrap_or(MissReason::NeverSeen);
            let section = self.compute(want).await?;
            found.insert(want.key, Found { section, tier: Tier::Computed, reason: Some(reason) });
        }
        Ok(wanted.iter().map(|want| found[&want.key].clone()).collect())
    }

    /// Makes sure the sections are stored; true for those that had to be computed. Ends when the stores have
    /// acknowledged them (or refused: a full store is no error).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub(crate) async fn precompute(&self, wanted: &[Wanted]) -> Result<Vec<bool>, crate::engine::Error> {
        let keys: Vec<ChunkKey> = wanted.iter().map(|want| want.key).collect();
        let stored = match &self.stores {
            Some(stores) => {
                let located = stores.lookup(self.layout.id, &keys).await;
                // Stores that cannot be asked must not make ingest compute again what RAM holds.
                let kept = |(entry, key): (&Located, &ChunkKey)| match entry {
                    Located::Found { .. } => true,
                    Located::Missing(MissReason::Unavailable | MissReason::Timeout) => {
                        self.ram.get(key).is_some()
                    }
                    Located::Missing(_) => false,
                };
                located.iter().zip(&keys).map(kept).collect()
            }
            None => keys.iter().map(|key| self.ram.get(key).is_some()).collect::<Vec<_>>(),
        };
        let mut computed = Vec::with_capacity(wanted.len());
        for (index, (want, stored)) in wanted.iter().zip(stored).enumerate() {
            let earlier = keys[..index].contains(&want.key);
            computed.push(!stored && !earlier);
            if stored || earlier {
                continue;
            }
            let canonical = self.canonical(want).await?;
            if let Some(writer) = &self.writer {
                writer.write(want.key, want.spans.clone(), canonical).await;
            }
        }
        Ok(computed)
    }

    async fn compute(&self, want: &Wanted) -> Result<Section, crate::engine::Error> {
        let canonical = self.canonical(want).await?;
        let section = Section {
            kv: canonical.kv.clone(),
            rank: Some(canonical.rank.clone().into()),
            container_bytes: 0,
        };
        if let Some(writer) = &self.writer {
            writer.write_behind(want.key, want.spans.clone(), canonical);
        }
        Ok(section)
    }

    /// Computes a section and keeps it in RAM.
    async fn canonical(&self, want: &Wanted) -> Result<Canonical, crate::engine::Error> {
        let behind = if want.anchored { Arc::clone(&self.anchor) } else { Arc::from([]) };
        let canonical = self.engine.canonical(behind, want.ids.clone()).await?;
        let section = Section {
            kv: canonical.kv.clone(),
            rank: Some(canonical.rank.clone().into()),
            container_bytes: 0,
        };
        self.ram.insert(want.key, section);
        Ok(canonical)
    }

    /// Fetches from the stores what they have; returns why the rest was not there.
    async fn fetch(
        &self,
        stores: &StoreClient,
        missing: &[&Wanted],
        found: &mut HashMap<ChunkKey, Found>,
    ) -> HashMap<ChunkKey, MissReason> {
        let keys: Vec<ChunkKey> = missing.iter().map(|want| want.key).collect();
        let mut partial: Vec<Partial> = (0..keys.len()).map(|_| Partial::default()).collect();
        let mut reasons = HashMap::new();
        let stream = stores.get_layers(self.layout.id, &keys, 0..self.layout.spec.shape.layers);
        let collect = async {
            let mut stream = stream;
            while let Some(item) = stream.next().await {
                match item {
                    Item::Missing { chunk, reason } => {
                        reasons.insert(keys[chunk], reason);
                    }
                    item => {
                        let chunk = item.chunk();
                        partial[chunk].take(item, missing[chunk]);
                    }
                }
            }
        };
        let complete = tokio::time::timeout(self.timeout, collect).await.is_ok();
        let mut overdue = 0;
        for (want, partial) in missing.iter().zip(partial) {
            if reasons.contains_key(&want.key) {
                continue;
            }
            match partial.finish(self.layout.spec.shape.layers as usize) {
                Some((section, tier)) => {
                    self.ram.insert(want.key, section.clone());
                    found.insert(want.key, Found { section, tier, reason: None });
                }
                None => {
                    overdue += usize::from(!complete);
                    let reason = if complete { MissReason::Corrupt } else { MissReason::Timeout };
                    reasons.insert(want.key, reason);
                }
            }
        }
        cacheclip_client::metrics::overdue(overdue);
        for reason in reasons.values() {
            tracing::debug!(reason = reason.label(), "chunk not served by the stores");
        }
        reasons
    }
}

/// What has arrived of one chunk.
#[derive(Debug, Default)]
struct Partial {
    tier: Tier,
    bytes: u64,
    fits: bool,
    layers: Vec<LayerKv>,
    rank: Option<Arc<[u8]>>,
}

impl Partial {
    fn take(&mut self, item: Item, want: &Wanted) {
        match item {
            Item::Head { head, tier, .. } => {
                self.fits = head.tokens() as usize == want.ids.len();
                self.bytes = head.container_len();
                self.tier = tier;
            }
            Item::Layer(it) if it.layer as usize == self.layers.len() => {
                self.layers.push(layer(&it.data, want.ids.len()));
            }
            Item::Rank { version, ranks, .. } if version == crate::engine::RANK_VERSION => {
                self.rank = Some(ranks.into()).filter(|ranks: &Arc<[u8]>| ranks.len() == want.ids.len());
            }
            _ => {}
        }
    }

    fn finish(self, layers: usize) -> Option<(Section, Tier)> {
        let complete = self.fits && self.layers.len() == layers;
        let section = Section { kv: ChunkKv::new(self.layers), rank: self.rank, container_bytes: self.bytes };
        complete.then_some((section, self.tier))
    }
}

/// Counts how each chunk of a request was had; the prefix, first in both, is no chunk.
pub(crate) fn count(wanted: &[Wanted], found: &[Found]) {
    for (want, found) in wanted.iter().zip(found).skip(1) {
        metrics::lookup(found.reason);
        if found.reason.is_some() {
            metrics::recomputed("miss", want.ids.len());
        }
    }
}
