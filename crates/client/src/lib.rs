//! Store client: connections, layer-major reads that verify, retries.
//!
//! A store is a cache: nothing it does or fails to do may fail a request. Reads therefore never return errors.
//! A store that is down, slow or sends damaged bytes yields [`Item::Missing`] with the reason, per chunk, and the
//! caller computes that chunk.
//!
//! ```no_run
//! # async fn read(layout: cacheclip_chunk::LayoutId, keys: &[cacheclip_chunk::ChunkKey]) -> Result<(), cacheclip_client::Error> {
//! use cacheclip_client::{Item, StoreClient};
//! use futures::StreamExt as _;
//!
//! let store = StoreClient::connect("http://127.0.0.1:7070", &Default::default())?;
//! let mut items = store.get_layers(layout, keys, 0..30);
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

mod chunk;
mod client;
mod fetch;
mod layers;
pub mod metrics;
mod options;

pub use cacheclip_rpc::v1::put_response::Outcome;
pub use client::{Deleted, Located, StoreClient};
pub use layers::{Item, LayerKv, LayerStream};
pub use options::Options;

/// Why a write or delete did not happen, or a client could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No store was named, or one cannot be dialled.
    #[error(transparent)]
    Endpoint(#[from] cacheclip_service::Error),
    /// What should be stored is not a container; encode it again.
    #[error("not stored: {0}")]
    Container(#[from] cacheclip_chunk::FormatError),
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
