//! Finds the KV of a request's sections: own RAM, else the stores, else computed canonically, kept and written
//! behind. Hits and misses give the same KV, so they give the same answer.
//!
//! What stores send is handed on layer by layer, so that a request is computed while its KV arrives.

mod document;
mod fetch;

use crate::engine::{Canonical, Engine, Error, Owed, Tenant};
use crate::layout::Layout;
use crate::link::{Flight, Link};
use crate::metrics;
use crate::options::{Loading, Options};
use crate::ram::{Mark, Ram, Section};
use crate::writer::Writer;
use cacheclip_chunk::{ByteSpan, ChunkKey};
use cacheclip_client::{Since, StoreClient, Terms};
use cacheclip_model::kv::{ChunkKv, HostPool, LayerKv};
use cacheclip_model::layout::layer_of;
use cacheclip_plan::{Cost, Server, Way, divide};
use cacheclip_rpc::v1::{MissReason, Tier};
use cacheclip_service::seconds;
use fetch::{Arriving, Fetch};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

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

/// What had been deleted when a request began: nothing of it comes back by what the request loads or computes.
#[derive(Clone, Debug)]
pub(crate) struct Began {
    /// From this process's RAM.
    mark: Mark,
    /// From the stores.
    since: Since,
}

/// A share of the KV that requests may hold before it is placed.
pub(crate) type Room = OwnedSemaphorePermit;

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
    /// What requests may hold before it is placed, in MiB.
    room: Arc<Semaphore>,
    most_mib: u32,
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
        let most_mib = (options.load_bytes >> 20).clamp(1, Semaphore::MAX_PERMITS as u64 >> 1);
        let most_mib = u32::try_from(most_mib).unwrap_or(u32::MAX);
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
            room: Arc::new(Semaphore::new(most_mib as usize)),
            most_mib,
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
    /// Only what keeps a section from being computed.
    pub(crate) async fn open(
        &self,
        wanted: &[Wanted],
        tenant: &Tenant,
        rows: usize,
    ) -> Result<(Opened, Owed), Error> {
        let room = self.admit(wanted).await;
        let (began, stores) = self.begin();
        let mut known: HashMap<ChunkKey, Found> = HashMap::new();
        let mut lacking: Vec<&Wanted> = Vec::new();
        let mut seen = HashSet::new();
        for want in wanted.iter().filter(|want| seen.insert(want.key)) {
            match self.ram.get(&want.key).filter(|section| section.kv.tokens() == want.ids.len()) {
                Some(section) => {
                    known.insert(want.key, Found { section, tier: Tier::WorkerRam, reason: None });
                }
                None => lacking.push(want),
            }
        }
        let Divided { asked, flight, computed, owed } = self.divide(lacking, rows);
        let fetch = async {
            match stores.as_ref().zip(flight) {
                Some((stores, flight)) => {
                    let asked = asked.iter().map(|&want| want.clone()).collect();
                    let whose = (Tenant::clone(tenant), began.clone());
                    Ok(Some(Fetch::begin(self, stores, flight, asked, whose).await?))
                }
                None => Ok(None),
            }
        };
        // What is computed by choice is computed while the rest is on its way.
        let (fetch, computed) = tokio::try_join!(fetch, self.compute(computed, tenant, &began))?;
        known.extend(computed);
        let mut missing = Vec::new();
        for (want, arriving) in asked.iter().zip(fetch.iter().flat_map(|fetch| &fetch.sections)) {
            match arriving.missing {
                None => {
                    let (section, tier) = (arriving.section.clone(), arriving.tier);
                    known.insert(want.key, Found { section, tier, reason: None });
                }
                Some(reason) => missing.push((*want, reason, self.owe(want))),
            }
        }
        if fetch.is_none() {
            missing.extend(asked.iter().map(|&want| (want, MissReason::NeverSeen, self.owe(want))));
        }
        known.extend(self.compute(missing, tenant, &began).await?);
        let found = wanted.iter().map(|want| known[&want.key].clone()).collect();
        let opened = Opened {
            found,
            keys: wanted.iter().map(|want| want.key).collect(),
            asked: asked.iter().map(|want| want.key).collect(),
            fetch,
            room,
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

    /// Room for a request's KV, or for as much of it as there can be; waits for that of others.
    async fn admit(&self, wanted: &[Wanted]) -> Option<Room> {
        let bytes: u64 = wanted.iter().map(|want| self.bytes(want.ids.len())).sum();
        let mib = (bytes >> 20).clamp(1, self.most_mib.into()) as u32;
        // Never closed.
        Arc::clone(&self.room).acquire_many_owned(mib).await.ok()
    }

    /// Bytes of a section's KV in memory.
    fn bytes(&self, tokens: usize) -> u64 {
        let shape = &self.layout.spec.shape;
        u64::from(shape.layers * shape.kv_heads * shape.head_dim)
            * 2
            * self.layout.spec.dtype.size() as u64
            * tokens as u64
    }

    /// A layer of a section from the bytes of its segment.
    fn layer(&self, bytes: &[u8], tokens: usize) -> LayerKv {
        layer_of(self.layout.spec.dtype, bytes, tokens, &self.host)
    }

    fn layers(&self) -> usize {
        self.layout.spec.shape.layers as usize
    }

    /// Keeps what a read brought and computes the rest.
    async fn complete(
        &self,
        wanted: &[Wanted],
        arriving: Vec<Arriving>,
        tenant: Tenant,
        began: &Began,
    ) -> Result<Vec<Found>, Error> {
        let mut found = Vec::with_capacity(wanted.len());
        for (want, Arriving { section, tier, missing, told, .. }) in wanted.iter().zip(arriving) {
            let Some(reason) = missing else {
                self.ram.insert(want.key, section.clone(), began.mark);
                found.push(Found { section, tier, reason: None });
                continue;
            };
            tracing::debug!(reason = reason.label(), "chunk not served by the stores");
            if !told {
                let computed = self.computed(want, &tenant, self.owe(want), began).await?;
                computed.kv.layers().enumerate().for_each(|(at, layer)| section.kv.arrive(at, layer.clone()));
                self.engine.wake();
            }
            found.push(Found { section, tier: Tier::Computed, reason: Some(reason) });
        }
        Ok(found)
    }

    async fn compute(
        &self,
        wanted: Vec<(&Wanted, MissReason, Owed)>,
        tenant: &Tenant,
        began: &Began,
    ) -> Result<Vec<(ChunkKey, Found)>, Error> {
        let mut found = Vec::with_capacity(wanted.len());
        for (want, reason, owed) in wanted {
            let section = self.computed(want, tenant, owed, began).await?;
            found.push((want.key, Found { section, tier: Tier::Computed, reason: Some(reason) }));
        }
        Ok(found)
    }

    /// Computes a section, keeps it and offers it to the stores.
    async fn computed(
        &self,
        want: &Wanted,
        tenant: &Tenant,
        owed: Owed,
        began: &Began,
    ) -> Result<Section, Error> {
        let canonical = self.canonical(want, tenant, owed, began.mark).await?;
        let section = Section::of(&canonical);
        if let Some(writer) = &self.writer {
            let terms = Terms { hold: None, since: began.since.clone() };
            writer.write_behind(want.key, terms, want.spans.clone(), canonical);
        }
        Ok(section)
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
    fetch: Option<Fetch>,
    /// Of all KV of the request, until it is placed.
    pub room: Option<Room>,
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
                *found = late.clone();
            }
        }
        Ok(())
    }

    /// Lets go of the KV; how it was had stays known.
    pub(crate) fn let_go(&mut self) {
        self.found.iter_mut().for_each(|found| found.section.kv = ChunkKv::new(Vec::new()));
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
