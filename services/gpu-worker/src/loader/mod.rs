//! Finds the KV of a request's sections: own RAM, else the stores, else computed canonically, kept and written
//! behind. Hits and misses give the same KV, so they give the same answer.
//!
//! What stores send is handed on layer by layer, so that a request is computed while its KV arrives. What requests hold
//! until it is placed in pages is bounded by [`Budget`]: a request that fits it is loaded and computed as fast as that
//! goes, a larger one as fast as what it has got is placed.

mod document;
mod fetch;
mod pieces;

use crate::budget::{Budget, Window};
use crate::engine::{Canonical, Engine, Error, Owed, Tenant};
use crate::incoming::{Incoming, Kv, Layer};
use crate::layout::Layout;
use crate::link::{Flight, Link};
use crate::metrics;
use crate::options::{Loading, Options};
use crate::ram::{Mark, Ram, Section};
use crate::writer::Writer;
use cacheclip_chunk::{ByteSpan, ChunkKey, LayoutSpec};
use cacheclip_client::{Since, StoreClient, Terms};
use cacheclip_model::kv::{ChunkKv, HostPool, LayerKv};
use cacheclip_model::layout::layer_of;
use cacheclip_plan::{Cost, Server, Way, divide};
use cacheclip_rpc::v1::{MissReason, Tier};
use cacheclip_service::seconds;
use fetch::{Arriving, Fetch, Lacking};
use parking_lot::Mutex;
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

/// A section that was found or computed, or is on its way.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Its KV, for who places it; gone when it has been handed over.
    pub kv: Option<Kv>,
    /// Static rank per token, where one of the current version is known.
    pub rank: Option<Arc<[u8]>>,
    /// Size of its container; 0 where that is not known.
    pub container_bytes: u64,
    /// Where it was.
    pub tier: Tier,
    /// Why it was in no cache.
    pub reason: Option<MissReason>,
}

/// What had been deleted when a request began: nothing of it comes back by what the request loads or computes.
#[derive(Clone, Debug)]
pub(crate) struct Began {
    /// From this process's RAM.
    mark: Mark,
    /// From the stores.
    since: Since,
}

impl Found {
    fn in_ram(section: Section) -> Self {
        let Section { kv, rank, container_bytes } = section;
        Self { kv: Some(Kv::Here(kv)), rank, container_bytes, tier: Tier::WorkerRam, reason: None }
    }

    fn arriving(known: Arriving) -> Self {
        let Arriving { kv, rank, container_bytes, tier, .. } = known;
        Self { kv: Some(Kv::Coming(kv)), rank, container_bytes, tier, reason: None }
    }

    fn computed(kv: Incoming, rank: Arc<[u8]>, reason: MissReason) -> Self {
        let (kv, rank) = (Some(Kv::Coming(kv)), Some(rank));
        Self { kv, rank, container_bytes: 0, tier: Tier::Computed, reason: Some(reason) }
    }
}

/// Whose sections these are.
#[derive(Clone, Debug)]
struct Whose {
    tenant: Tenant,
    began: Began,
    window: Window,
    /// Whether all that is lacking may be held before anything is placed.
    whole: bool,
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
    /// Where KV that comes is kept.
    host: HostPool,
    loading: Loading,
    link: Link,
    /// Held while a request decides: the next one shall know what it asked for.
    deciding: Arc<Mutex<()>>,
    budget: Budget,
    timeout: Duration,
}

impl Loader {
    /// Looks in `ram`, then in `stores`, whose KV is kept in `host`'s bytes, then asks `engine`; what was computed goes to
    /// `writer`.
    pub(crate) fn new(
        (ram, host): (Ram, HostPool),
        stores: Option<StoreClient>,
        engine: Engine,
        writer: Option<Writer>,
        layout: Arc<Layout>,
        anchor: Arc<[u32]>,
        options: &Options,
    ) -> Self {
        Self {
            ram,
            stores,
            engine,
            writer,
            layout,
            anchor,
            host,
            loading: options.loading,
            link: Link::default(),
            deciding: Arc::default(),
            budget: Budget::new(options.load_bytes, options.queue),
            timeout: seconds(options.load_timeout_seconds),
        }
    }

    /// What RAM holds, in announcements' short form.
    pub(crate) fn held(&self) -> Vec<u64> {
        self.ram.held()
    }

    /// All sections, in order, each of them found, computed or on its way; the same key twice is found once. The
    /// engine owes `rows` for the request from its admission on: those that wait for room are ahead of nobody.
    ///
    /// # Errors
    /// [`Error::Busy`] when too many wait for room; else only what keeps a section from being computed.
    pub(crate) async fn open(
        &self,
        wanted: &[Wanted],
        tenant: &Tenant,
        rows: usize,
    ) -> Result<(Opened, Owed), Error> {
        let mut seen = HashSet::new();
        let distinct: Vec<&Wanted> = wanted.iter().filter(|want| seen.insert(want.key)).collect();
        let bytes = distinct.iter().map(|want| self.bytes(want.ids.len())).sum();
        let window = self.budget.open(bytes).await?;
        let (began, stores) = self.begin();
        let mut known: HashMap<ChunkKey, Found> = HashMap::new();
        let mut lacking: Vec<&Wanted> = Vec::new();
        for want in distinct {
            match self.ram.get(&want.key).filter(|section| section.kv.tokens() == want.ids.len()) {
                Some(section) => {
                    // What RAM holds stays within RAM's own bound.
                    window.skip(self.bytes(want.ids.len()));
                    known.insert(want.key, Found::in_ram(section));
                }
                None => lacking.push(want),
            }
        }
        let whole = window.has_room();
        let whose = Whose { tenant: Tenant::clone(tenant), began, window, whole };
        let Divided { mut asked, flight, mut computed, owed } = self.divide(lacking, rows);
        let mut sections: Vec<Lacking> = asked.iter().map(|want| Lacking::new(self, want, None)).collect();
        if !whole {
            for (want, reason, owed) in computed.drain(..) {
                asked.push(want);
                sections.push(Lacking::new(self, want, Some((reason, owed))));
            }
        }
        let fetch = async {
            match sections.is_empty() {
                true => Ok(None),
                false => Fetch::begin(self, stores.zip(flight), sections, whose.clone()).await.map(Some),
            }
        };
        let computed =
            computed.into_iter().map(|(want, reason, owed)| (want, Incoming::default(), reason, owed));
        // What is computed by choice is computed while the rest is on its way.
        let (fetch, computed) = tokio::try_join!(fetch, self.compute(computed.collect(), &whose))?;
        known.extend(computed);
        let mut missing = Vec::new();
        for (want, arriving) in asked.iter().zip(fetch.iter().flat_map(|fetch| &fetch.sections)) {
            match arriving.missing.filter(|_| arriving.told) {
                Some(reason) => missing.push((*want, arriving.kv.clone(), reason, self.owe(want))),
                None => drop(known.insert(want.key, Found::arriving(arriving.clone()))),
            }
        }
        known.extend(self.compute(missing, &whose).await?);
        let found = wanted.iter().map(|want| known[&want.key].clone()).collect();
        let opened = Opened {
            found,
            keys: wanted.iter().map(|want| want.key).collect(),
            asked: asked.iter().map(|want| want.key).collect(),
            whole,
            fetch,
        };
        Ok((opened, owed))
    }

    /// A request begins; a client of the stores for it.
    fn begin(&self) -> (Began, Option<StoreClient>) {
        let stores = self.stores.as_ref().map(StoreClient::begin);
        let since = stores.as_ref().map(StoreClient::since).unwrap_or_default();
        (Began { mark: self.ram.mark(), since }, stores)
    }

    /// What is to be asked of the stores, and what is computed without asking them. Link and engine have both to do
    /// from here on.
    fn divide<'a>(&self, lacking: Vec<&'a Wanted>, rows: usize) -> Divided<'a> {
        let _turn = self.deciding.lock();
        let owed = self.engine.owe(rows);
        let cost = |want: &&Wanted| Cost { bytes: self.bytes(want.ids.len()), rows: self.rows(want) };
        let costs: Vec<Cost> = lacking.iter().map(cost).collect();
        let engine = self.engine.backlog().map(|(backlog, per_unit)| Server { backlog, per_unit });
        let ways = match self.loading {
            Loading::Auto if self.stores.is_some() => divide(&costs, self.link.server(), engine),
            Loading::Never => vec![Way::Compute; costs.len()],
            Loading::Auto | Loading::Always => vec![Way::Load; costs.len()],
        };
        let (asked, computed): (Vec<_>, Vec<_>) =
            lacking.into_iter().zip(ways).partition(|(_, way)| *way == Way::Load);
        cacheclip_client::metrics::dear(computed.len());
        let asked: Vec<&Wanted> = asked.into_iter().map(|(want, _)| want).collect();
        let computed =
            computed.into_iter().map(|(want, _)| (want, MissReason::Cost, self.owe(want))).collect();
        let bytes = asked.iter().map(|want| self.bytes(want.ids.len())).sum();
        let flight = (self.stores.is_some() && !asked.is_empty()).then(|| self.link.begin(bytes));
        Divided { asked, flight, computed, owed }
    }

    /// A section that is to be computed.
    fn owe(&self, want: &Wanted) -> Owed {
        self.engine.owe(self.rows(want))
    }

    /// Rows of computing a section: the anchor's come with those of chunks.
    fn rows(&self, want: &Wanted) -> usize {
        if want.anchored { self.anchor.len() + want.ids.len() } else { want.ids.len() }
    }

    /// Bytes of a section's KV in memory.
    fn bytes(&self, tokens: usize) -> u64 {
        self.layer_bytes(tokens) * self.layers() as u64
    }

    /// The same of one layer.
    fn layer_bytes(&self, tokens: usize) -> u64 {
        let LayoutSpec { shape, dtype, .. } = &self.layout.spec;
        shape.layer_bytes(tokens as u32, *dtype)
    }

    /// A layer of a section from the bytes of its segment.
    fn layer(&self, bytes: &[u8], tokens: usize) -> LayerKv {
        layer_of(self.layout.spec.dtype, bytes, tokens, &self.host)
    }

    fn layers(&self) -> usize {
        self.layout.spec.shape.layers as usize
    }

    /// Keeps what a read brought and computes what nobody else does of the rest.
    async fn complete(&self, mut sections: Vec<Lacking>, whose: &Whose) -> Result<Vec<Found>, Error> {
        // First of all, for nothing can be computed while there is no room for it.
        for Lacking { want, known, kept, .. } in &mut sections {
            let Some(kept) = kept.take().filter(|_| known.missing.is_none()) else { continue };
            let kv = ChunkKv::shared(kept.iter().map(|layer| Arc::clone(&layer.kv)).collect());
            let (rank, container_bytes) = (known.rank.clone(), known.container_bytes);
            self.ram.insert(want.key, Section { kv, rank, container_bytes }, whose.began.mark);
        }
        let mut found = Vec::with_capacity(sections.len());
        for Lacking { want, owed, known, .. } in sections {
            let Some(reason) = known.missing else {
                found.push(Found::arriving(known));
                continue;
            };
            tracing::debug!(reason = reason.label(), "chunk not served by the stores");
            if !known.told {
                let owed = owed.unwrap_or_else(|| self.owe(&want));
                self.computed(&want, &known.kv, owed, whose).await?;
                self.engine.wake();
            }
            found.push(Found { reason: Some(reason), tier: Tier::Computed, ..Found::arriving(known) });
        }
        Ok(found)
    }

    async fn compute(
        &self,
        wanted: Vec<(&Wanted, Incoming, MissReason, Owed)>,
        whose: &Whose,
    ) -> Result<Vec<(ChunkKey, Found)>, Error> {
        let mut found = Vec::with_capacity(wanted.len());
        for (want, kv, reason, owed) in wanted {
            let rank = self.computed(want, &kv, owed, whose).await?;
            found.push((want.key, Found::computed(kv, rank, reason)));
        }
        Ok(found)
    }

    /// Computes a section, hands on the layers that have not come, keeps it and offers it to the stores; its rank.
    async fn computed(
        &self,
        want: &Wanted,
        kv: &Incoming,
        owed: Owed,
        whose: &Whose,
    ) -> Result<Arc<[u8]>, Error> {
        let (layer, came) = (self.layer_bytes(want.ids.len()), kv.came());
        let mut grant = whose.window.grant(layer * (self.layers() - came) as u64).await;
        let canonical = self.canonical(want, &whose.tenant, owed, whose.began.mark).await?;
        for share in canonical.kv.shares().skip(came) {
            kv.arrive(Layer::new(share, grant.split(layer)));
        }
        let rank = Arc::from(&canonical.rank[..]);
        if let Some(writer) = &self.writer {
            let terms = Terms { hold: None, since: whose.began.since.clone() };
            writer.write_behind(want.key, terms, want.spans.clone(), canonical);
        }
        Ok(rank)
    }

    /// Computes a section and keeps it in RAM.
    async fn canonical(
        &self,
        want: &Wanted,
        tenant: &Tenant,
        owed: Owed,
        mark: Mark,
    ) -> Result<Canonical, Error> {
        let behind = if want.anchored { Arc::clone(&self.anchor) } else { Arc::from([]) };
        let canonical = self.engine.canonical(behind, want.ids.clone(), Tenant::clone(tenant), owed).await?;
        self.ram.insert(want.key, Section::of(&canonical), mark);
        Ok(canonical)
    }
}

/// What a request decided.
struct Divided<'a> {
    asked: Vec<&'a Wanted>,
    /// Of what was asked for; none where nothing was.
    flight: Option<Flight>,
    computed: Vec<(&'a Wanted, MissReason, Owed)>,
    /// The request's own rows.
    owed: Owed,
}

/// A request's sections, some of which may still be on their way.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// As they are known now, in the order of the request.
    pub found: Vec<Found>,
    keys: Vec<ChunkKey>,
    /// What the stores were asked for.
    asked: Vec<ChunkKey>,
    /// Whether all of its KV may be held before it is placed.
    whole: bool,
    fetch: Option<Fetch>,
}

impl Opened {
    /// Waits until everything has come; what did not come is computed, and said to be so.
    ///
    /// # Errors
    /// As [`Loader::open`].
    pub(crate) async fn complete(&mut self) -> Result<(), Error> {
        let Some(fetch) = self.fetch.take() else { return Ok(()) };
        let late: HashMap<ChunkKey, Found> = self.asked.drain(..).zip(fetch.finish().await?).collect();
        for (key, found) in self.keys.iter().zip(&mut self.found) {
            // What was computed by who asked is known better here.
            if let Some(late) = late.get(key).filter(|_| found.reason.is_none()) {
                *found = Found { kv: found.kv.take(), ..late.clone() };
            }
        }
        Ok(())
    }

    /// Waits until everything has come, if it can come before anything is placed.
    ///
    /// # Errors
    /// As [`Loader::open`].
    pub(crate) async fn come(&mut self) -> Result<(), Error> {
        if self.whole { self.complete().await } else { Ok(()) }
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
