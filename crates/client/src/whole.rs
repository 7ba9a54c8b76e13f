//! Whole containers from all stores, each as soon as its store has sent it.

use crate::find::{At, Finder};
use crate::fleet::Fleet;
use crate::moves::{Move, Mover};
use crate::since::Since;
use crate::{Options, metrics};
use cacheclip_chunk::{ChunkKey, Container, LayoutId};
use cacheclip_rpc::v1::MissReason;
use cacheclip_service::{request_id, seconds};
use futures::StreamExt as _;
use futures::future::join_all;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Containers that one store sends at the same time.
const AT_ONCE: usize = 8;
/// Containers that wait for the caller.
const AHEAD: usize = 4;

/// Containers of several chunks, in the order in which they come; made by
/// [`StoreClient::get`](crate::StoreClient::get).
#[derive(Debug)]
pub struct Containers(mpsc::Receiver<(usize, Result<Container, MissReason>)>);

impl Containers {
    /// The next chunk, by its index in the keys asked for, or why it does not come. None after the last.
    pub async fn next(&mut self) -> Option<(usize, Result<Container, MissReason>)> {
        self.0.recv().await
    }
}

/// Starts reading; the task ends with its last chunk or with the stream.
pub(crate) fn start(
    fleet: Fleet,
    mover: Mover,
    options: Arc<Options>,
    since: Since,
    layout: LayoutId,
    keys: Vec<ChunkKey>,
) -> Containers {
    let (outbox, inbox) = mpsc::channel(AHEAD);
    let whole = Whole { fleet, mover, options, since, layout, keys };
    let reading = async move {
        tokio::select! {
            () = whole.run(&outbox) => {}
            () = outbox.closed() => {}
        }
    };
    request_id::spawn(reading);
    Containers(inbox)
}

type Outbox = mpsc::Sender<(usize, Result<Container, MissReason>)>;

struct Whole {
    fleet: Fleet,
    mover: Mover,
    options: Arc<Options>,
    since: Since,
    layout: LayoutId,
    keys: Vec<ChunkKey>,
}

impl Whole {
    async fn run(&self, outbox: &Outbox) {
        self.fleet.met(seconds(self.options.call_timeout_seconds)).await;
        let finder = Finder::new(&self.fleet, &self.options, self.layout, &self.keys, &self.since);
        let groups = finder.groups();
        if groups.is_empty() {
            metrics::nowhere(self.keys.len());
            for index in 0..self.keys.len() {
                hand_over(outbox, index, Err(MissReason::Unavailable)).await;
            }
        }
        // Store by store: one that is slow holds up its own chunks and no others.
        let finder = &finder;
        let stores = groups.iter().map(|(owner, indices)| async move {
            let located = finder.locate(owner, indices).await;
            let reads = located.into_iter().map(|(index, found)| async move {
                let container = match found {
                    Ok(at) => self.read(self.keys[index], &at).await,
                    Err(reason) => Err(reason),
                };
                (index, container)
            });
            let mut reads = futures::stream::iter(reads).buffer_unordered(AT_ONCE);
            while let Some((index, container)) = reads.next().await {
                hand_over(outbox, index, container).await;
            }
        });
        join_all(stores).await;
    }

    async fn read(&self, key: ChunkKey, at: &At) -> Result<Container, MissReason> {
        let (bytes, tier) = (at.bytes, at.tier);
        let asked = (&*self.options, &self.since);
        let container = self.fleet.get(&at.node, self.layout, &key, (bytes, tier), asked).await?;
        let announced = |it: &Container| {
            it.hash() == at.container && it.head().key() == key && it.head().layout() == self.layout
        };
        let Some(container) = Container::parse(container).ok().filter(announced) else {
            metrics::verify_failed();
            tracing::warn!(%key, store = at.node.name(), "store sent bytes that are not what it announced");
            return Err(MissReason::Corrupt);
        };
        let keeper = self.fleet.view().keeper(&key).map(Arc::clone);
        if keeper.is_some_and(|keeper| keeper.name() != at.node.name()) {
            let (from, since) = (Arc::clone(&at.node), self.since.clone());
            self.mover.offer(Move { layout: self.layout, key, bytes, tier, from, since });
        }
        Ok(container)
    }
}

async fn hand_over(outbox: &Outbox, index: usize, container: Result<Container, MissReason>) {
    if let Err(reason) = &container {
        metrics::missing(*reason);
    }
    // A caller that went away is noticed by the task itself.
    let _ = outbox.send((index, container)).await;
}
