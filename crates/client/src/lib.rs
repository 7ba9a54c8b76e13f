//! Store client: placement over the live stores, layer-major reads that verify, retries.
//!
//! A store is a cache: nothing it does or fails to do may fail a request. Reads therefore never return errors.
//! A store that is down, slow or sends damaged bytes yields [`Item::Missing`] with the reason, per chunk, and the
//! caller computes that chunk.
//!
//! Every chunk has one store that keeps it, by [`placement`] over the names of the stores that are live. A store
//! that joins or leaves changes the place of its share of the chunks and of no others; a store that dies costs the
//! computing of its chunks. A chunk that its keeper does not have, but another store does, is read there and copied
//! to its keeper behind the read.
//!
//! What is deleted stays deleted: [`StoreClient::begin`] is a client for one request, and what that request writes is
//! refused where the chunk was deleted after the request learnt that it is missing.
//!
//! ```no_run
//! # async fn read(layout: cacheclip_chunk::LayoutId, keys: &[cacheclip_chunk::ChunkKey]) -> Result<(), cacheclip_client::Error> {
//! use cacheclip_client::{Item, StoreClient};
//! use futures::StreamExt as _;
//!
//! let stores = StoreClient::connect(&["dns+http://cache-store:7073"], &Default::default())?;
//! let mut items = stores.get_layers(layout, keys, 0..30);
//! while let Some(item) = items.next().await {
//!     match item {
//!         Item::Layer(layer) => println!("chunk {} layer {}: {} bytes", layer.chunk, layer.layer, layer.data.len()),
//!         Item::Missing { chunk, reason } => println!("chunk {chunk} must be computed: {reason:?}"),
//!         _ => {}
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! ```text
//! StoreClient ── fetch: layers from all stores ── read: from one store ── chunk: one chunk's frames
//!    │           whole: containers    find: which store has a chunk    calls: one call at one store
//!    ├── document: claims on chunks, deletion at all stores         since: what stores had deleted
//!    ├── fleet: the live stores, who keeps what ── placement
//!    │     └─ membership (task): asks who is there      node: one store's connections and standing
//!    ├── moves (task): copies to the keeper
//!    └── publisher (task): encodes and puts behind the caller
//! ```

mod calls;
mod chunk;
mod client;
mod document;
mod fetch;
mod find;
mod fleet;
#[doc(hidden)]
pub mod fuzz;
mod layers;
mod membership;
pub mod metrics;
mod moves;
mod node;
mod options;
pub mod placement;
mod publisher;
mod read;
mod since;
mod whole;

pub use cacheclip_rpc::v1::put_response::Outcome;
pub use cacheclip_rpc::v1::{Hold, TierDeletion};
pub use client::{Deleted, Located, StoreClient, Terms};
pub use document::DocumentDeletion;
pub use layers::{Item, LayerKv, LayerStream};
pub use options::Options;
pub use publisher::{Publisher, Written};
pub use since::Since;
pub use whole::Containers;

/// Why a write or delete did not happen, or a client could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No store was named at all.
    #[error("stores: name at least one, as http://host:port or dns+http://host:port")]
    NoSeeds,
    /// A store that was named cannot be dialled.
    #[error("stores: {0}")]
    Endpoint(#[from] cacheclip_service::Error),
    /// What should be stored is not a container; encode it again.
    #[error("not stored: {0}")]
    Container(#[from] cacheclip_chunk::FormatError),
    /// No store is live; the same call may be made again.
    #[error("no store is live; try again later")]
    NoStore,
    /// The store did not answer in time; the same call may be made again.
    #[error("store did not answer within {seconds} s; try again later")]
    Timeout {
        /// The deadline.
        seconds: f64,
    },
    /// The store refused or could not be reached; its status says what to do.
    #[error("store: {}", .0.message())]
    Status(#[from] Box<tonic::Status>),
}
