//! One read of layers over all stores: every chunk from the store that keeps it, else from one that has it.

use crate::calls::may_be_elsewhere;
use crate::fleet::{Fleet, View, grouped};
use crate::layers::{Item, LayerStream, Pending};
use crate::moves::{Move, Mover};
use crate::node::Node;
use crate::read::{Absent, Reader, Source};
use crate::since::Since;
use crate::{Options, metrics};
use cacheclip_chunk::{ChunkKey, LayoutId};
use cacheclip_rpc::v1::MissReason;
use cacheclip_service::{request_id, seconds};
use futures::future::join_all;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// What to read.
pub(crate) struct Fetch {
    pub(crate) fleet: Fleet,
    pub(crate) mover: Mover,
    pub(crate) layout: LayoutId,
    pub(crate) keys: Vec<ChunkKey>,
    pub(crate) range: Range<u32>,
    pub(crate) options: Arc<Options>,
    pub(crate) since: Since,
}

/// Starts reading; the task ends with the stream's end or with the stream.
pub(crate) fn start(fetch: Fetch) -> LayerStream {
    let (outbox, inbox) = mpsc::channel(fetch.options.decode_ahead.max(1));
    if !fetch.keys.is_empty() && !fetch.range.is_empty() {
        let reading = async move {
            tokio::select! {
                () = fetch.run(&outbox) => {}
                // Dropping the responses resets their streams, and the stores stop.
                () = outbox.closed() => {}
            }
        };
        request_id::spawn(reading);
    }
    LayerStream::new(inbox)
}

impl Fetch {
    async fn run(&self, outbox: &mpsc::Sender<Pending>) {
        self.fleet.met(seconds(self.options.call_timeout_seconds)).await;
        let view = self.fleet.view();
        let owned = self.keys.iter().enumerate();
        let owned = owned.filter_map(|(index, key)| Some((index, Arc::clone(view.owner(key)?))));
        let groups = grouped(owned);
        if groups.is_empty() {
            metrics::nowhere(self.keys.len());
            for chunk in 0..self.keys.len() {
                missing(outbox, chunk, MissReason::Unavailable).await;
            }
        }
        join_all(groups.iter().map(|(owner, chunks)| self.from(&view, owner, chunks, outbox))).await;
    }

    /// Reads chunks from the store that keeps them. Those that it does not have are looked for elsewhere as soon as
    /// it has said so, beside the others.
    async fn from(&self, view: &View, owner: &Node, chunks: &[usize], outbox: &mpsc::Sender<Pending>) {
        let wanted = chunks.iter().map(|&chunk| (chunk, None));
        let reader = Reader::new(self.source(owner), wanted, outbox);
        if view.len() < 2 {
            reader.run().await;
            return;
        }
        let (told, absent) = oneshot::channel();
        let search = async {
            if let Ok(absent) = absent.await {
                self.elsewhere(owner, absent, outbox).await;
            }
        };
        tokio::join!(reader.telling(told).run(), search);
    }

    async fn elsewhere(&self, owner: &Node, absent: Vec<Absent>, outbox: &mpsc::Sender<Pending>) {
        if absent.is_empty() {
            return;
        }
        let keys: Vec<ChunkKey> = absent.iter().map(|it| self.keys[it.chunk]).collect();
        let entries = self.fleet.lookup(owner, self.layout, &keys, true, (&self.options, &self.since)).await;
        let view = self.fleet.view();
        let mut places = Vec::new();
        for (index, it) in absent.iter().enumerate() {
            let entry = entries.as_ref().ok().and_then(|entries| entries.get(index));
            let place = entry.and_then(|entry| view.elsewhere(owner, &keys[index], entry));
            match place {
                Some(place) => places.push((index, Arc::clone(place))),
                None => missing(outbox, it.chunk, it.reason).await,
            }
        }
        let groups = grouped(places);
        let reads = groups.iter().map(|(node, indices)| {
            let wanted = indices.iter().map(|&index| (absent[index].chunk, Some(absent[index].reason)));
            Reader::new(self.source(node), wanted, outbox).run()
        });
        for ((node, _), complete) in groups.iter().zip(join_all(reads).await) {
            for read in complete {
                let (key, from) = (self.keys[read.chunk], Arc::clone(node));
                let (layout, since) = (self.layout, self.since.clone());
                self.mover.offer(Move { layout, key, bytes: read.bytes, tier: read.tier, from, since });
            }
        }
    }

    fn source<'a>(&'a self, node: &'a Node) -> Source<'a> {
        Source {
            fleet: &self.fleet,
            node,
            layout: self.layout,
            keys: &self.keys,
            range: self.range.clone(),
            options: &self.options,
            since: &self.since,
        }
    }
}

async fn missing(outbox: &mpsc::Sender<Pending>, chunk: usize, reason: MissReason) {
    // A caller that went away is noticed by the task itself.
    let _ = outbox.send(Pending::Ready(Item::Missing { chunk, reason })).await;
}

/// A chunk that its keeper does not have counts as missing for the keeper's reason, whatever the other store said.
pub(crate) fn final_reason(reason: MissReason, before: Option<MissReason>) -> MissReason {
    before.filter(|_| may_be_elsewhere(reason)).unwrap_or(reason)
}
