//! This store among the others: who it is, whom it has heard of, and who has what it has not.

use crate::changes::Changes;
use crate::index::{Index, Peer, Unavailable};
use crate::metrics;
use cacheclip_chunk::{ChunkKey, LayoutId};
use cacheclip_rpc::v1::{MembersResponse, Node};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::Instant;

/// What requests and the keeper know of the fleet.
#[derive(Debug)]
pub(crate) struct Fleet {
    node: String,
    /// Known once this store listens.
    endpoint: OnceLock<String>,
    draining: AtomicBool,
    pub(crate) index: Arc<dyn Index>,
    pub(crate) changes: Arc<Changes>,
    /// Longest wait of a lookup for the index.
    timeout: Duration,
    /// The last lookup had to go without the index, and that was logged.
    complained: AtomicBool,
    heard: Mutex<Heard>,
}

#[derive(Debug, Default)]
struct Heard {
    /// Peers, and until when their leases run.
    peers: Vec<(Peer, Instant)>,
    unavailable: String,
}

impl Fleet {
    pub(crate) fn new(node: &str, index: Arc<dyn Index>, changes: Arc<Changes>, timeout: Duration) -> Self {
        let heard = Heard { peers: Vec::new(), unavailable: "it has not been asked yet".into() };
        Self {
            node: node.into(),
            endpoint: OnceLock::new(),
            draining: AtomicBool::new(false),
            index,
            changes,
            timeout,
            complained: AtomicBool::new(false),
            heard: Mutex::new(heard),
        }
    }

    /// Sets where this store is dialled, once.
    pub(crate) fn is_at(&self, endpoint: String) {
        // Nobody else sets it.
        let _ = self.endpoint.set(endpoint);
    }

    pub(crate) fn endpoint(&self) -> &str {
        self.endpoint.get().map_or("", String::as_str)
    }

    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The index could be asked.
    pub(crate) fn hear(&self, peers: Vec<Peer>) {
        let now = Instant::now();
        let peers = peers.into_iter().map(|peer| (now + peer.lease, peer)).map(|(until, peer)| (peer, until));
        *self.heard.lock() = Heard { peers: peers.collect(), unavailable: String::new() };
    }

    /// The index cannot be asked. Peers stay until their leases end.
    pub(crate) fn hear_nothing(&self, why: &Unavailable) {
        self.heard.lock().unavailable.clone_from(&why.0);
    }

    /// `Cache.Members`: what was heard last, so that asking often costs the index nothing.
    pub(crate) fn members(&self) -> MembersResponse {
        let now = Instant::now();
        let heard = self.heard.lock();
        let live = heard.peers.iter().filter(|(_, until)| *until > now);
        let node = |name: &str, endpoint: &str, draining| Node {
            name: name.into(),
            endpoint: endpoint.into(),
            draining,
        };
        MembersResponse {
            node: Some(node(&self.node, self.endpoint(), self.draining.load(Ordering::Relaxed))),
            peers: live.map(|(peer, _)| node(&peer.name, &peer.endpoint, false)).collect(),
            index_unavailable: heard.unavailable.clone(),
            // The service knows it.
            generation: 0,
        }
    }

    /// Other nodes that have these keys in this layout, by name; nobody where the index does not answer in time.
    pub(crate) async fn elsewhere(&self, layout: LayoutId, keys: &[ChunkKey]) -> Vec<Vec<String>> {
        let asked = tokio::time::timeout(self.timeout, self.index.locate(keys)).await;
        let found = match asked {
            Ok(Ok(found)) => {
                self.complained.store(false, Ordering::Relaxed);
                found
            }
            failed => {
                metrics::index_error(metrics::LOCATE);
                self.changes.doubt();
                if !self.complained.swap(true, Ordering::Relaxed) {
                    tracing::warn!(?failed, "lookups go without the index");
                }
                return vec![Vec::new(); keys.len()];
            }
        };
        let mut elsewhere = Vec::with_capacity(keys.len());
        for (key, holders) in keys.iter().zip(found) {
            if holders.iter().any(|holder| holder.node == self.node) {
                // It was asked because the chunk is not here: the record is stale, and taken back.
                self.changes.tell(*key, false);
            }
            let others = holders.into_iter().filter(|it| it.node != self.node && it.entry.layout == layout);
            elsewhere.push(others.map(|holder| holder.node).collect());
        }
        elsewhere
    }
}
