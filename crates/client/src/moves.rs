//! Copies chunks to the store that keeps them, when a read found them at another one.
//!
//! That happens after a store joined or left: the chunk is where it was put, and placement names another place.
//! Copying what is read, and only that, moves the working set without a rebalancing that nobody asked for.

use crate::fleet::Fleet;
use crate::node::Node;
use crate::publisher::Written;
use crate::since::Since;
use crate::{Options, Terms, metrics};
use cacheclip_chunk::{ChunkKey, Head, LayoutId};
use cacheclip_rpc::v1::Tier;
use cacheclip_service::seconds;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::sync::Arc;
use tokio::sync::mpsc;

/// A chunk to copy.
#[derive(Debug)]
pub(crate) struct Move {
    pub(crate) layout: LayoutId,
    pub(crate) key: ChunkKey,
    /// Bytes of its container.
    pub(crate) bytes: u64,
    pub(crate) tier: Tier,
    /// The store that has it.
    pub(crate) from: Arc<Node>,
    /// What the keeper had deleted when it said that it lacks the chunk.
    pub(crate) since: Since,
}

/// Handle to the copying task, which ends with the last of them. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Mover {
    queue: mpsc::Sender<Move>,
    /// Keys that wait or are being copied: the same chunk read twice is copied once.
    waiting: Arc<Mutex<HashSet<ChunkKey>>>,
}

impl Mover {
    /// Starts the task. It copies one container at a time, which is all that it holds in memory.
    pub(crate) fn start(fleet: Fleet, options: Arc<Options>) -> Self {
        let (queue, mut inbox) = mpsc::channel::<Move>(options.move_queue.max(1));
        let waiting = Arc::<Mutex<HashSet<ChunkKey>>>::default();
        let moving = Arc::clone(&waiting);
        tokio::spawn(async move {
            while let Some(next) = inbox.recv().await {
                let outcome = carry(&fleet, &options, &next).await;
                metrics::moved(outcome);
                tracing::debug!(key = %next.key, from = next.from.name(), outcome = outcome.label(), "chunk copied to its keeper");
                moving.lock().remove(&next.key);
            }
        });
        Self { queue, waiting }
    }

    /// Queues a chunk; dropped and counted when the queue is full. It is offered again when it is next read.
    pub(crate) fn offer(&self, next: Move) {
        let key = next.key;
        if self.waiting.lock().insert(key) && self.queue.try_send(next).is_err() {
            self.waiting.lock().remove(&key);
            metrics::moved(Written::Dropped);
        }
    }
}

async fn carry(fleet: &Fleet, options: &Options, next: &Move) -> Written {
    let Move { layout, key, bytes, tier, from, since } = next;
    // Who keeps it may have changed since it was queued.
    let Some(keeper) = fleet.view().keeper(key).map(Arc::clone) else { return Written::Failed };
    if keeper.name() == from.name() {
        return Written::Existed;
    }
    let get = fleet.get(from, *layout, key, (*bytes, *tier), (options, since));
    let Ok(Ok(container)) = tokio::time::timeout(seconds(options.put_timeout_seconds), get).await else {
        return Written::Failed;
    };
    // The keeper verifies every byte before it publishes; here it only matters that it is the chunk asked for.
    let Ok(head) = Head::parse(&container) else { return Written::Failed };
    if head.key() != *key || head.layout() != *layout {
        return Written::Failed;
    }
    let terms = Terms { hold: None, since: since.clone() };
    Written::from(&fleet.put(&keeper, &head, container, (options, &terms)).await)
}
