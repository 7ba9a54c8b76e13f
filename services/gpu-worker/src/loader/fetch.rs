//! A read from the stores under way: layers are handed on as they come, and what does not come is computed.
//!
//! Nothing is asked for that the request's window has no room for. A larger request therefore asks piece by piece, as
//! fast as what came is placed; the stores are never kept waiting with an answer half sent, and the time between two
//! pieces is neither theirs nor the link's.

use super::pieces::pieces;
use super::{Loader, Wanted, Whose};
use crate::budget::Grant;
use crate::engine::{Error, Owed};
use crate::incoming::{Incoming, Layer};
use crate::link::Flight;
use cacheclip_chunk::ContainerHash;
use cacheclip_client::{Item, StoreClient};
use cacheclip_rpc::v1::{MissReason, Tier};
use futures::StreamExt as _;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Sections of one read; ends with the request that asked for it.
#[derive(Debug)]
pub(super) struct Fetch {
    /// As far as they have come by now: what comes later comes to the same KV.
    pub(super) sections: Vec<Arriving>,
    task: AbortOnDropHandle<Result<Vec<super::Found>, Error>>,
}

/// What is known of a section, at the time when its first layer had come or it was known not to come.
#[derive(Clone, Debug)]
pub(super) struct Arriving {
    pub(super) kv: Incoming,
    pub(super) rank: Option<Arc<[u8]>>,
    pub(super) container_bytes: u64,
    pub(super) tier: Tier,
    /// Why it does not come.
    pub(super) missing: Option<MissReason>,
    /// Whether who asked knows that, and computes it.
    pub(super) told: bool,
}

/// A section that a request lacks.
#[derive(Debug)]
pub(super) struct Lacking {
    pub(super) want: Wanted,
    /// What the engine owes for it, where it is not loaded by choice.
    pub(super) owed: Option<Owed>,
    pub(super) known: Arriving,
    /// Layers for the RAM tier, where it shall keep the section.
    pub(super) kept: Option<Vec<Layer>>,
    /// Bytes of one layer.
    size: u64,
    /// The container that its layers come from: two honest writers may differ in the last bits, and layers of both must
    /// not be mixed.
    container: Option<ContainerHash>,
}

impl Lacking {
    /// One that is to be loaded; or else why it is to be computed, and what the engine owes for that.
    pub(super) fn new(loader: &Loader, want: &Wanted, computed: Option<(MissReason, Owed)>) -> Self {
        let (missing, owed) = computed.unzip();
        let known = Arriving {
            kv: Incoming::default(),
            rank: None,
            container_bytes: 0,
            tier: Tier::Unspecified,
            missing,
            told: false,
        };
        let size = loader.layer_bytes(want.ids.len());
        Self { want: want.clone(), owed, known, kept: None, size, container: None }
    }

    /// Whether it is known to come, or not to.
    fn opened(&self) -> bool {
        self.known.missing.is_some() || self.known.kv.came() > 0
    }
}

impl Fetch {
    /// Begins a read of `sections` and waits until each of them has begun to come or is known not to, or until there is
    /// no room for more.
    pub(super) async fn begin(
        loader: &Loader,
        source: Option<(StoreClient, Flight)>,
        sections: Vec<Lacking>,
        whose: Whose,
    ) -> Result<Self, Error> {
        let (opened, known) = oneshot::channel();
        let loader = loader.clone();
        let task = async move {
            let reading = Reading::new(&loader, sections, &whose, opened);
            let sections = reading.run(source).await;
            loader.complete(sections, &whose).await
        };
        let task = AbortOnDropHandle::new(cacheclip_service::request_id::spawn(task));
        // The task says so before it does anything that can fail.
        let sections = known.await.map_err(|_| Error::Stopped)?;
        Ok(Self { sections, task })
    }

    /// Waits until every section is complete.
    pub(super) async fn finish(self) -> Result<Vec<super::Found>, Error> {
        self.task.await.map_err(|_| Error::Stopped)?
    }
}

/// A read, as far as it has come.
struct Reading<'a> {
    loader: &'a Loader,
    whose: &'a Whose,
    sections: Vec<Lacking>,
    /// Sections of which nothing is known yet.
    unopened: usize,
    opened: Option<oneshot::Sender<Vec<Arriving>>>,
}

impl<'a> Reading<'a> {
    fn new(
        loader: &'a Loader,
        mut sections: Vec<Lacking>,
        whose: &'a Whose,
        opened: oneshot::Sender<Vec<Arriving>>,
    ) -> Self {
        keep(&mut sections, whose, |bytes| loader.ram.holds(bytes), loader.layers());
        let unopened = sections.iter().filter(|section| !section.opened()).count();
        Self { loader, whose, sections, unopened, opened: Some(opened) }
    }

    /// Reads until everything has come or the time is up.
    async fn run(mut self, source: Option<(StoreClient, Flight)>) -> Vec<Lacking> {
        let late = match source {
            Some((stores, flight)) => self.read(&stores, flight).await,
            None => MissReason::NeverSeen,
        };
        self.lacks(0..self.sections.len(), self.loader.layers(), late);
        self.tell();
        self.sections
    }

    /// Reads piece by piece; why what has not come by then does not come.
    async fn read(&mut self, stores: &StoreClient, mut flight: Flight) -> MissReason {
        let loaded = self.sections.iter().filter(|section| section.known.missing.is_none());
        let sizes: Vec<u64> = loaded.map(|section| section.size).collect();
        let kept: u64 = if self.whose.whole { 0 } else { self.kept_bytes() };
        let room = self.whose.window.bytes().saturating_sub(kept);
        // The stores' time: what the window waits for is not.
        let mut patience = self.loader.timeout;
        for piece in pieces(self.loader.layers(), &sizes, room) {
            let comes = |&at: &usize| self.sections[at].known.missing.is_none();
            let asked: Vec<usize> = piece.sections.clone().filter(comes).collect();
            if asked.is_empty() {
                continue;
            }
            let layer: u64 = asked.iter().map(|&at| self.sections[at].size).sum();
            let mut grant = self.grant(layer * piece.layers.len() as u64, &mut flight).await;
            let began = Instant::now();
            let read = self.piece(stores, &asked, piece.layers.clone(), (&mut grant, &mut flight));
            let in_time = tokio::time::timeout(patience, read).await.is_ok();
            grant.put_off();
            if !in_time {
                let late = self.lacks(0..self.sections.len(), self.loader.layers(), MissReason::Timeout);
                cacheclip_client::metrics::overdue(late);
                break;
            }
            patience = patience.saturating_sub(began.elapsed());
            self.lacks(piece.sections, piece.layers.end, MissReason::Corrupt);
        }
        MissReason::Corrupt
    }

    /// Room for the next piece. Who asked may place what came meanwhile.
    async fn grant(&mut self, bytes: u64, flight: &mut Flight) -> Grant {
        if let Some(grant) = self.whose.window.try_grant(bytes) {
            return grant;
        }
        self.tell();
        flight.rest();
        let grant = self.whose.window.grant(bytes).await;
        flight.go_on();
        grant
    }

    async fn piece(
        &mut self,
        stores: &StoreClient,
        asked: &[usize],
        layers: Range<usize>,
        (grant, flight): (&mut Grant, &mut Flight),
    ) {
        let keys: Vec<_> = asked.iter().map(|&at| self.sections[at].want.key).collect();
        let layers = layers.start as u32..layers.end as u32;
        let mut stream = stores.get_layers(self.loader.layout.id, &keys, layers);
        while let Some(item) = stream.next().await {
            self.take(asked[item.chunk()], item, (&mut *grant, &mut *flight));
        }
    }

    fn take(&mut self, at: usize, item: Item, (grant, flight): (&mut Grant, &mut Flight)) {
        let section = &mut self.sections[at];
        if section.known.missing.is_some() {
            return;
        }
        let (was_opened, tokens) = (section.opened(), section.want.ids.len());
        let known = &mut section.known;
        match item {
            Item::Missing { reason, .. } => known.missing = Some(reason),
            Item::Head { head, tier, .. } => match section.container {
                None if head.tokens() as usize == tokens => {
                    section.container = Some(head.hash());
                    (known.container_bytes, known.tier) = (head.container_len(), tier);
                }
                Some(container) if container != head.hash() => known.missing = Some(MissReason::Unavailable),
                _ => {}
            },
            Item::Rank { version, ranks, .. } if version == crate::engine::RANK_VERSION => {
                known.rank = Some(ranks.into()).filter(|ranks: &Arc<[u8]>| ranks.len() == tokens);
            }
            Item::Layer(it) if section.container.is_some() && it.layer as usize == known.kv.came() => {
                let kv = Arc::new(self.loader.layer(&it.data, tokens));
                let layer = Layer::new(kv, grant.split(section.size));
                section.kept.iter_mut().for_each(|kept| kept.push(layer.clone()));
                known.kv.arrive(layer);
                flight.came(it.data.len() as u64);
                self.loader.engine.wake();
            }
            _ => {}
        }
        if !was_opened && self.sections[at].opened() {
            self.unopened -= 1;
            if self.unopened == 0 {
                self.tell();
            }
        }
    }

    /// Says of sections whose layers up to `end` have not come that they do not, and why; how many these are.
    fn lacks(&mut self, sections: Range<usize>, end: usize, why: MissReason) -> usize {
        let came = |section: &Lacking| section.known.kv.came() >= end;
        let lacking = self.sections[sections].iter_mut();
        let lacking = lacking.filter(|it| it.known.missing.is_none() && !came(it));
        lacking.map(|it| it.known.missing = Some(why)).count()
    }

    /// Bytes of the sections that the RAM tier shall keep.
    fn kept_bytes(&self) -> u64 {
        let kept = self.sections.iter().filter(|section| section.kept.is_some());
        kept.map(|section| section.size * self.loader.layers() as u64).sum()
    }

    fn tell(&mut self) {
        let Some(opened) = self.opened.take() else { return };
        // A larger request's sections are computed one by one as well, as there is room for them.
        let told = self.whose.whole;
        self.sections.iter_mut().for_each(|it| it.known.told = told && it.known.missing.is_some());
        // Who asked may be gone.
        let _ = opened.send(self.sections.iter().map(|section| section.known.clone()).collect());
    }
}

/// Chooses what the RAM tier shall keep. That is held until all of it has come: of a larger request no more than half of
/// its window, or none where that would leave no room for a layer of the others.
fn keep(sections: &mut [Lacking], whose: &Whose, holds: impl Fn(u64) -> bool, layers: usize) {
    let largest = sections.iter().map(|section| section.size).max().unwrap_or(0);
    let window = whose.window.bytes();
    let most = if whose.whole { u64::MAX } else { (window / 2).min(window.saturating_sub(largest)) };
    let mut sum = 0;
    for section in sections.iter_mut().filter(|section| section.known.missing.is_none()) {
        let bytes = section.size * layers as u64;
        if holds(bytes) && sum + bytes <= most {
            sum += bytes;
            section.kept = Some(Vec::with_capacity(layers));
        }
    }
}
