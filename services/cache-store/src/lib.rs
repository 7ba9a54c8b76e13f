//! Cache store: content-addressed chunk KV in RAM and on disk behind gRPC.
//!
//! The files are the truth: every object is one self-describing container, verified before it is published and
//! again whenever it is read; a journal beside them says which documents claim them, what was deleted and what is
//! pinned. All else — the catalogue in memory, the index, the RAM tier — is rebuilt from them.
//! Nothing that goes wrong here fails a reader's request: a chunk that cannot be served is *missing*, for a
//! reason, and its reader computes it.

mod answer;
mod bucket;
mod catalogue;
mod changes;
mod clock;
mod core;
mod disk;
mod error;
mod fleet;
mod flight;
#[doc(hidden)]
pub mod fuzz;
mod grpc;
mod held;
pub mod index;
mod inspect;
mod journal;
mod keeper;
mod lifecycle;
pub mod metrics;
mod options;
mod ram;
mod read;
mod scan;
mod scrub;
mod surface;
#[cfg(test)]
mod testing;
mod upload;
mod verifier;
pub mod verify;

pub use clock::Clock;
pub use error::Error;
pub use grpc::Service;
pub use options::Options;

use crate::core::Core;
use crate::fleet::Fleet;
use crate::index::{Embedded, Index, Kind, Redis};
use crate::keeper::Keeper;
use crate::surface::Surface;
use cacheclip_rpc::v1::StatResponse;
use cacheclip_service::{Drain, Running, Server, seconds};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::Routes;

/// Full gRPC name of the service.
pub const SERVICE: &str = "cacheclip.v1.Cache";

/// Shortest time between two turns of the sweeper.
const LEAST_SWEEP: Duration = Duration::from_millis(10);

/// Renewals of a lease in its time: two may fail.
const RENEWALS: f64 = 3.0;

/// An opened store that does not serve yet.
#[derive(Debug)]
pub struct Store {
    core: Arc<Core>,
    fleet: Arc<Fleet>,
    options: Options,
}

/// Looks into a store from the same process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Core>);

impl Handle {
    /// What the store holds now, as `Cache.Stat` tells it.
    pub fn stat(&self) -> StatResponse {
        self.0.stat()
    }
}

/// Opens the data directory, rebuilds the catalogue from its files and brings an embedded index up to date. One in
/// Redis is not connected to yet.
///
/// # Errors
/// A directory that cannot be written or that another store uses; options that cannot work.
pub async fn open(options: Options) -> Result<Store, Error> {
    open_at(options, Clock::system()).await
}

async fn open_at(options: Options, clock: Clock) -> Result<Store, Error> {
    options.index.check()?;
    // What can be refused at once is refused before the files are read.
    let redis = match options.index.kind {
        Kind::Redis => Some(Redis::open(&options.node, &options.index).await?),
        Kind::Embedded => None,
    };
    let core = Core::open_at(&options, clock).await?;
    let index: Arc<dyn Index> = match redis {
        Some(redis) => Arc::new(redis),
        None => {
            let (disk, entries) = (&core.disk, core.entries());
            Arc::new(Embedded::open(disk.index(), &options.node, entries, Some(disk.lock())).await?)
        }
    };
    let timeout = seconds(options.index.timeout_seconds);
    let fleet = Arc::new(Fleet::new(&options.node, index, Arc::clone(&core.announce), timeout));
    Ok(Store { core, fleet, options })
}

impl Store {
    /// Registers descriptions of this crate's metrics with the process's recorder.
    pub fn describe_metrics() {
        metrics::describe();
    }

    /// A handle that stays valid while the store serves.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.core))
    }

    /// Starts to remove what expires, to keep the bucket up to date, and to read the objects again, for as long as the
    /// store is there. The receiver hears when the bucket has been asked once.
    fn look_after(&self) -> oneshot::Receiver<()> {
        let every = seconds(self.options.sweep_seconds).max(LEAST_SWEEP);
        let core = Arc::downgrade(&self.core);
        tokio::spawn(lifecycle::run(core, self.core.closed.clone(), every));
        let (listed, asked) = oneshot::channel();
        let core = Arc::downgrade(&self.core);
        tokio::spawn(bucket::run(core, self.core.closed.clone(), every, listed));
        let (core, rate) = (Arc::downgrade(&self.core), self.options.scrub_bytes_per_second);
        tokio::spawn(scrub::run(core, self.core.closed.clone(), rate));
        asked
    }

    /// The gRPC service, with message limits that fit frames of KV.
    fn service(&self) -> Surface {
        let service = Service::new(Arc::clone(&self.core), &self.options, Arc::clone(&self.fleet));
        Surface::new(service, self.options.service.max_message_bytes)
    }

    /// Starts to keep the index for as long as `running` serves. The receiver hears when it has been asked once.
    fn keep(self, running: &Running) -> (JoinHandle<()>, oneshot::Receiver<()>) {
        let readiness = running.readiness();
        let keeper = Keeper {
            every: seconds(self.options.index.lease_seconds / RENEWALS),
            catalogue: Arc::clone(&self.core.catalogue),
            // Ready whatever the index does: the files are here.
            report: Box::new(move |words| readiness.set(true, words)),
            draining: running.shutdown(),
            closed: self.core.closed.clone(),
            fleet: self.fleet,
        };
        let (contact, contacted) = oneshot::channel();
        (tokio::spawn(keeper.run(contact)), contacted)
    }
}

/// A store that serves, with what it does behind its requests.
#[derive(Debug)]
pub struct Serving {
    running: Running,
    keeper: JoinHandle<()>,
    patience: Duration,
}

impl Drain for Serving {
    /// Drains the server and waits, not for long, until the index has been told what there is to tell.
    async fn drain(self) {
        self.running.drain().await;
        if tokio::time::timeout(self.patience, self.keeper).await.is_err() {
            tracing::info!("the index was not told everything");
        }
    }
}

/// Opens a store and serves it. Ready when this returns, whether or not the index could be asked.
///
/// # Errors
/// As [`open`]; an address in use.
pub async fn serve(options: Options) -> anyhow::Result<Serving> {
    serve_at(options, Clock::system()).await
}

async fn serve_at(options: Options, clock: Clock) -> anyhow::Result<Serving> {
    cacheclip_service::telemetry::install_recorder();
    Store::describe_metrics();
    let timeout = seconds(options.index.timeout_seconds);
    let bucket_timeout = seconds(options.bucket_timeout_seconds);
    let (server, advertise) =
        (Server::new("cache-store", options.service.clone()), options.advertise.clone());
    let shared = options.index.kind == Kind::Redis;
    let store = open_at(options, clock).await?;
    let running = server.serve(Routes::new(store.service()), &[SERVICE]).await?;
    if shared && advertise.is_none() && running.grpc().ip().is_unspecified() {
        tracing::warn!(
            endpoint = running.endpoint(),
            "only this machine can dial this store: set `advertise`"
        );
    }
    store.fleet.is_at(advertise.unwrap_or_else(|| running.endpoint()));
    let asked = store.look_after();
    let (keeper, contacted) = store.keep(&running);
    // Usually the fleet is known when this returns, and what the bucket has; it is no condition.
    let _ = tokio::time::timeout(timeout, contacted).await;
    let _ = tokio::time::timeout(bucket_timeout, asked).await;
    Ok(Serving { running, keeper, patience: timeout + Duration::from_secs(1) })
}

/// As [`serve`], for a process that has more than a store in it and goes on: there the index is told what is left
/// to tell while others drain.
///
/// # Errors
/// As [`serve`].
pub async fn start(options: Options) -> anyhow::Result<Running> {
    Ok(serve(options).await?.running)
}

/// As [`start`], with claims, pins and deletions by another clock.
///
/// # Errors
/// As [`serve`].
pub async fn start_at(options: Options, clock: Clock) -> anyhow::Result<Running> {
    Ok(serve_at(options, clock).await?.running)
}
