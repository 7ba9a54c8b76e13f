//! Cache store: content-addressed chunk KV in RAM and on disk behind gRPC.
//!
//! The files are the truth: every object is one self-describing container, verified before it is published and
//! again whenever it is read. All else — the catalogue in memory, the index, the RAM tier — is rebuilt from them.
//! Nothing that goes wrong here fails a reader's request: a chunk that cannot be served is *missing*, for a
//! reason, and its reader computes it.

mod catalogue;
mod core;
mod disk;
mod error;
mod grpc;
pub mod index;
pub mod metrics;
mod options;
mod ram;
mod read;
mod upload;

pub use error::Error;
pub use grpc::Service;
pub use options::Options;

use crate::core::Core;
use cacheclip_rpc::v1::StatResponse;
use cacheclip_rpc::v1::cache_server::CacheServer;
use cacheclip_service::{Running, Server};
use std::sync::Arc;
use tonic::service::Routes;

/// Full gRPC name of the service.
pub const SERVICE: &str = "cacheclip.v1.Cache";

/// An opened store that does not serve yet.
#[derive(Debug)]
pub struct Store {
    core: Arc<Core>,
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

/// Opens the data directory, rebuilds the catalogue from its files and brings the index up to date.
///
/// # Errors
/// A directory that cannot be written or that another store uses.
pub async fn open(options: Options) -> Result<Store, Error> {
    let core = Core::open(&options).await?;
    Ok(Store { core, options })
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

    /// The gRPC service, with message limits that fit frames of KV.
    pub fn into_service(self) -> CacheServer<Service> {
        let message_bytes = self.options.service.max_message_bytes;
        CacheServer::new(Service::new(self.core, &self.options))
            .max_decoding_message_size(message_bytes)
            .max_encoding_message_size(message_bytes)
    }
}

/// Opens a store and serves it. Ready when this returns.
///
/// # Errors
/// As [`open`]; an address in use.
pub async fn start(options: Options) -> anyhow::Result<Running> {
    cacheclip_service::telemetry::install_recorder();
    Store::describe_metrics();
    let service_options = options.service.clone();
    let service = open(options).await?.into_service();
    let running = Server::new("cache-store", service_options).serve(Routes::new(service), &[SERVICE]).await?;
    running.readiness().set(true, "");
    Ok(running)
}
