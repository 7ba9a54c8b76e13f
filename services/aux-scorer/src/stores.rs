//! Auxiliary KV in the stores: fetched where RAM has none, and published behind whoever had it computed.
//!
//! Stores are a cache here, too. Whatever they do, scoring goes on: with text, after a bounded wait.

use crate::auxiliary::Chunk;
use crate::identity::{Digest, Identity};
use crate::{Options, metrics};
use cacheclip_chunk::{ChunkKey, Container, DocumentId};
use cacheclip_client::{DocumentDeletion, Located, Publisher, Since, StoreClient, Terms};
use cacheclip_rpc::v1::{Hold, MissReason};
use cacheclip_service::seconds;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Longest wait of an ingest for one chunk to be stored; then it goes on, and the chunk stays in the queue.
const STORED: Duration = Duration::from_secs(30);

/// Handle to the stores. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    client: StoreClient,
    identity: Arc<Identity>,
    timeout: Duration,
    publisher: Publisher,
}

impl Stores {
    /// Dials `options.stores`, and starts the writing task; None where there are none.
    ///
    /// # Errors
    /// An endpoint that cannot be dialled.
    pub(crate) fn start(
        options: &Options,
        identity: Identity,
    ) -> Result<Option<Self>, cacheclip_client::Error> {
        if options.stores.is_empty() {
            return Ok(None);
        }
        let wait = options.load_timeout_seconds;
        // A call that is given up half-way teaches nobody that its store is slow: calls end before requests do.
        let patience = cacheclip_client::Options {
            call_timeout_seconds: wait / 2.0,
            silence_seconds: wait / 2.0,
            ..Default::default()
        };
        let client = StoreClient::connect_with(&options.stores, &options.connect, patience)?;
        let publisher = Publisher::start(client.clone(), options.write_queue, metrics::write);
        Ok(Some(Self { client, identity: Arc::new(identity), timeout: seconds(wait), publisher }))
    }

    /// A request begins: the same stores for it. What it writes must not bring back what is deleted meanwhile.
    pub(crate) fn begin(&self) -> Self {
        Self { client: self.client.begin(), ..self.clone() }
    }

    /// What the stores have of these chunks, within the time that a request may wait for them.
    pub(crate) async fn load(&self, digests: &[Digest]) -> HashMap<Digest, Chunk> {
        let keys: Vec<ChunkKey> = digests.iter().map(|digest| self.identity.key(digest)).collect();
        let mut incoming = self.client.get(self.identity.layout(), &keys);
        let deadline = Instant::now() + self.timeout;
        let (mut containers, mut answered) = (Vec::new(), 0);
        while answered < digests.len() {
            match timeout_at(deadline, incoming.next()).await {
                Ok(Some((index, container))) => {
                    answered += 1;
                    // Why one does not come is counted by the client.
                    containers.extend(container.ok().map(|container| (digests[index], container)));
                }
                Ok(None) => break,
                Err(_) => {
                    cacheclip_client::metrics::overdue(digests.len() - answered);
                    tracing::debug!(chunks = digests.len() - answered, "stores are slow: going on with text");
                    break;
                }
            }
        }
        drop(incoming);
        let identity = Arc::clone(&self.identity);
        let decoded = tokio::task::spawn_blocking(move || decode(&identity, containers)).await;
        decoded.unwrap_or_else(|error| {
            tracing::error!(%error, "decoding ended early");
            HashMap::new()
        })
    }

    /// Which of these chunks must be stored: those that the stores say they do not have.
    pub(crate) async fn lacking(&self, digests: &[Digest]) -> Vec<Lacking> {
        let keys: Vec<ChunkKey> = digests.iter().map(|digest| self.identity.key(digest)).collect();
        let unknown = || vec![Lacking::Unknown; digests.len()];
        let Ok(located) = timeout(self.timeout, self.client.lookup(self.identity.layout(), &keys)).await
        else {
            return unknown();
        };
        let lacking = |located: Located| match located {
            Located::Found { .. } => Lacking::No,
            Located::Missing(MissReason::Unavailable | MissReason::Timeout) => Lacking::Unknown,
            Located::Missing(_) => Lacking::Yes,
        };
        located.into_iter().map(lacking).collect()
    }

    /// Queues a chunk; see [`Publisher::write_behind`].
    pub(crate) fn write_behind(&self, since: Since, digest: Digest, chunk: Chunk) {
        let identity = Arc::clone(&self.identity);
        let terms = Terms { hold: None, since };
        self.publisher
            .write_behind(self.identity.key(&digest), terms, move || identity.encode(&digest, &chunk));
    }

    /// What had been deleted when this request began.
    pub(crate) fn since(&self) -> Since {
        self.client.since()
    }

    /// Publishes chunks, for a document where one is named, and waits until the stores have answered, or do not. The
    /// chunks whose claim came to no store with that.
    pub(crate) async fn write(&self, chunks: Vec<(Digest, Chunk)>, hold: Option<&Hold>) -> Vec<Digest> {
        let mut unclaimed = Vec::new();
        for (digest, chunk) in chunks {
            let identity = Arc::clone(&self.identity);
            let terms = Terms { hold: hold.cloned(), since: self.since() };
            let writing = self
                .publisher
                .write(self.identity.key(&digest), terms, move || identity.encode(&digest, &chunk));
            match timeout(STORED, writing).await {
                Ok(written) => unclaimed.extend(written.is_unclaimed().then_some(digest)),
                // Its claim goes with it.
                Err(_) => tracing::warn!("stores are slow: auxiliary KV is stored behind its ingest"),
            }
        }
        unclaimed
    }

    /// Adds a document's claim to chunks that no put brings.
    ///
    /// # Errors
    /// As [`StoreClient::hold`].
    pub(crate) async fn hold(&self, digests: &[Digest], hold: &Hold) -> Result<(), cacheclip_client::Error> {
        let keys: Vec<ChunkKey> = digests.iter().map(|digest| self.identity.key(digest)).collect();
        self.client.hold(self.identity.layout(), &keys, hold).await
    }

    /// Has the stores delete a document.
    pub(crate) async fn delete_document(&self, document: &DocumentId) -> DocumentDeletion {
        self.client.delete_document(document).await
    }

    /// Whether a chunk's key is among these.
    pub(crate) fn names(&self, keys: &HashSet<ChunkKey>, digest: &Digest) -> bool {
        keys.contains(&self.identity.key(digest))
    }
}

/// Whether the stores lack a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lacking {
    /// One has it.
    No,
    /// They say that they do not have it.
    Yes,
    /// The one that should know cannot be asked.
    Unknown,
}

fn decode(identity: &Identity, containers: Vec<(Digest, Container)>) -> HashMap<Digest, Chunk> {
    let mut chunks = HashMap::new();
    for (digest, container) in containers {
        match identity.decode(&container) {
            Ok(Some(chunk)) => {
                chunks.insert(digest, chunk);
            }
            Ok(None) => tracing::warn!(key = %container.head().key(), "stored auxiliary KV is not usable"),
            Err(error) => {
                cacheclip_client::metrics::verify_failed();
                tracing::warn!(key = %container.head().key(), %error, "auxiliary KV was damaged on its way");
            }
        }
    }
    chunks
}
