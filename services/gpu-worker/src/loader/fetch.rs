//! A read from the stores under way: layers are handed on as they come, and what does not come is computed.

use super::{Began, Found, Loader, Wanted};
use crate::engine::{Error, Tenant};
use crate::link::Flight;
use crate::ram::Section;
use cacheclip_client::{Item, StoreClient};
use cacheclip_model::kv::ChunkKv;
use cacheclip_rpc::v1::{MissReason, Tier};
use futures::StreamExt as _;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Sections of one read; ends with the request that asked for it.
#[derive(Debug)]
pub(super) struct Fetch {
    /// As far as they have come by now: what comes later comes to the same KV.
    pub(super) sections: Vec<Arriving>,
    task: AbortOnDropHandle<Result<Vec<Found>, Error>>,
}

/// One section, at the time when its first layer had come or it was known not to come.
#[derive(Clone, Debug)]
pub(super) struct Arriving {
    pub(super) section: Section,
    pub(super) tier: Tier,
    /// Why it does not come.
    pub(super) missing: Option<MissReason>,
    /// Whether who asked knows that, and computes it.
    pub(super) told: bool,
    /// Layers that came.
    layers: usize,
    /// Whether the head says what was asked for.
    fits: bool,
}

impl Fetch {
    /// Begins a read of `wanted` and waits until each of them has begun to come or is known not to.
    pub(super) async fn begin(
        loader: &Loader,
        stores: &StoreClient,
        flight: Flight,
        wanted: Vec<Wanted>,
        (tenant, began): (Tenant, Began),
    ) -> Result<Self, Error> {
        let deadline = Instant::now() + loader.timeout;
        let (opened, sections) = oneshot::channel();
        let (loader, stores) = (loader.clone(), stores.clone());
        let task = async move {
            let reading = Reading::new(&loader, &wanted);
            let arriving = reading.run(&loader, &stores, flight, &wanted, deadline, opened).await;
            loader.complete(&wanted, arriving, tenant, &began).await
        };
        let task = AbortOnDropHandle::new(cacheclip_service::request_id::spawn(task));
        // The task says so before it does anything that can fail.
        let sections = sections.await.map_err(|_| Error::Stopped)?;
        Ok(Self { sections, task })
    }

    /// Waits until every section is complete.
    pub(super) async fn finish(self) -> Result<Vec<Found>, Error> {
        self.task.await.map_err(|_| Error::Stopped)?
    }
}

/// The stream of a read, as far as it has come.
struct Reading {
    sections: Vec<Arriving>,
    /// Sections of which nothing is known yet.
    unopened: usize,
    opened: Option<oneshot::Sender<Vec<Arriving>>>,
}

impl Reading {
    fn new(loader: &Loader, wanted: &[Wanted]) -> Self {
        let layers = loader.layers();
        let arriving = |want: &Wanted| Arriving {
            section: Section {
                kv: ChunkKv::arriving(layers, want.ids.len()),
                rank: None,
                container_bytes: 0,
            },
            tier: Tier::Unspecified,
            missing: None,
            told: false,
            layers: 0,
            fits: false,
        };
        Self { sections: wanted.iter().map(arriving).collect(), unopened: wanted.len(), opened: None }
    }

    /// Reads until everything has come or the time is up.
    async fn run(
        mut self,
        loader: &Loader,
        stores: &StoreClient,
        mut flight: Flight,
        wanted: &[Wanted],
        deadline: Instant,
        opened: oneshot::Sender<Vec<Arriving>>,
    ) -> Vec<Arriving> {
        self.opened = Some(opened);
        let read = async {
            let keys: Vec<_> = wanted.iter().map(|want| want.key).collect();
            let layers = 0..loader.layers() as u32;
            let mut stream = stores.get_layers(loader.layout.id, &keys, layers);
            while let Some(item) = stream.next().await {
                self.take(item, loader, &mut flight);
            }
        };
        let complete = tokio::time::timeout_at(deadline, read).await.is_ok();
        let late = if complete { MissReason::Corrupt } else { MissReason::Timeout };
        let layers = loader.layers();
        let lacking =
            self.sections.iter_mut().filter(|it| it.missing.is_none() && !(it.fits && it.layers == layers));
        let lacking = lacking.map(|it| it.missing = Some(late)).count();
        cacheclip_client::metrics::overdue(if complete { 0 } else { lacking });
        self.tell();
        self.sections
    }

    fn take(&mut self, item: Item, loader: &Loader, flight: &mut Flight) {
        let at = &mut self.sections[item.chunk()];
        let before = at.layers > 0 || at.missing.is_some();
        match item {
            Item::Missing { reason, .. } => at.missing = Some(reason),
            Item::Head { head, tier, .. } => {
                at.fits = head.tokens() as usize == at.section.kv.tokens();
                (at.section.container_bytes, at.tier) = (head.container_len(), tier);
            }
            Item::Rank { version, ranks, .. } if version == crate::engine::RANK_VERSION => {
                let tokens = at.section.kv.tokens();
                at.section.rank = Some(ranks.into()).filter(|ranks: &Arc<[u8]>| ranks.len() == tokens);
            }
            Item::Layer(it) if at.fits && it.layer as usize == at.layers => {
                at.section.kv.arrive(at.layers, loader.layer(&it.data, at.section.kv.tokens()));
                at.layers += 1;
                flight.came(it.data.len() as u64);
                loader.engine.wake();
            }
            _ => {}
        }
        if !before && (at.layers > 0 || at.missing.is_some()) {
            self.unopened -= 1;
            if self.unopened == 0 {
                self.tell();
            }
        }
    }

    fn tell(&mut self) {
        if let Some(opened) = self.opened.take() {
            self.sections.iter_mut().for_each(|it| it.told = it.missing.is_some());
            // Who asked may be gone.
            let _ = opened.send(self.sections.clone());
        }
    }
}
