//! Who has which chunk: a cache of the stores' catalogues that the whole fleet may ask.
//!
//! Records are per chunk and node, and each node announces and withdraws its own. Every answer may be out of date;
//! a store that is asked for what it no longer has says so, and that costs a round trip. All calls take many keys,
//! because one call may be one round trip.

mod embedded;
mod epoch;
mod link;
mod options;
mod redis;

pub use self::redis::Redis;
pub use embedded::Embedded;
pub use options::{Kind, Options};

use cacheclip_chunk::{ChunkKey, ContainerHash, LayoutId};
use futures::future::BoxFuture;
use std::time::Duration;

/// What one node says of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Layout of its KV.
    pub layout: LayoutId,
    /// Hash of its container.
    pub container: ContainerHash,
    /// Bytes of its container.
    pub bytes: u64,
}

/// A node that has a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Name of the node.
    pub node: String,
    /// What it has.
    pub entry: Entry,
}

/// Another node whose lease is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Where clients dial it.
    pub endpoint: String,
    /// How long its lease still runs.
    pub lease: Duration,
}

/// Whether a node should announce everything it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// The index has what was announced.
    No,
    /// This node has announced nothing here yet.
    New,
    /// What was announced would expire.
    Refresh,
    /// The index has lost what was announced.
    Lost,
}

/// What a node learns when it renews its lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// The other nodes, by name.
    pub peers: Vec<Peer>,
    /// What there is to announce.
    pub again: Again,
    /// Endpoint of another process that uses this node's name.
    pub twin: Option<String>,
}

/// An index that could not be asked or told; whoever gets this goes on without it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("index: {0}")]
pub struct Unavailable(pub String);

/// What an index promises to do, now or not at all: every call has a deadline of its own.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, Unavailable>>;

/// The index as one node sees it. Implementations are checked by one conformance suite.
pub trait Index: Send + Sync + std::fmt::Debug {
    /// Who has these keys, in their order: nodes with a valid lease, this one too, by name.
    fn locate<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, Vec<Vec<Holder>>>;

    /// Makes chunks of this node known; a later entry of a key replaces an earlier one.
    fn publish<'a>(&'a self, entries: &'a [(ChunkKey, Entry)]) -> Answer<'a, ()>;

    /// Makes chunks of this node unknown; unknown ones are fine.
    fn withdraw<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, ()>;

    /// Makes all chunks of this node unknown.
    fn clear(&self) -> Answer<'_, ()>;

    /// Connects where there is no connection, and says for the length of a lease that this node is there. No other
    /// call connects, so that none but the lease's keeper ever waits for a connection.
    fn renew<'a>(&'a self, endpoint: &'a str) -> Answer<'a, Renewal>;

    /// Takes this node's lease back.
    fn leave(&self) -> Answer<'_, ()>;
}

/// Bytes of a packed entry: layout (32), container hash (32), bytes (8, little-endian).
const PACKED: usize = 72;

impl Entry {
    fn pack(&self) -> [u8; PACKED] {
        let mut packed = [0; PACKED];
        packed[..32].copy_from_slice(self.layout.as_bytes());
        packed[32..64].copy_from_slice(self.container.as_bytes());
        packed[64..].copy_from_slice(&self.bytes.to_le_bytes());
        packed
    }

    fn unpack(packed: &[u8; PACKED]) -> Self {
        let id = |at: usize| std::array::from_fn(|i| packed[at + i]);
        Self {
            layout: LayoutId::from_bytes(id(0)),
            container: ContainerHash::from_bytes(id(32)),
            bytes: u64::from_le_bytes(std::array::from_fn(|i| packed[64 + i])),
        }
    }
}

/// Whether these bytes are a record or a lease of the index in Redis, where others may write, too.
pub(crate) fn decodes(bytes: &[u8]) -> bool {
    let lease = std::str::from_utf8(bytes).ok().and_then(redis::parse_lease);
    redis::unpack(bytes).is_some() || lease.is_some()
}

/// A number that no other process draws.
fn random() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    // Each half has a few bits that are always the same; together they have none.
    high ^ low.rotate_left(32)
}
