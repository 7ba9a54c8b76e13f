//! Documents at the stores: which chunks they hold, and their deletion everywhere.

use crate::calls::{again, raw};
use crate::find::Finder;
use crate::fleet::grouped;
use crate::node::Node;
use crate::{Error, StoreClient};
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, DocumentId, LayoutId};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::deletion;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::{
    DeleteDocumentRequest, DeleteDocumentResponse, Hold, HoldRequest, HolderDeletion, PinRequest,
    PinResponse, TierDeletion, UnpinRequest,
};
use cacheclip_service::request_id::outgoing;
use cacheclip_service::seconds;
use futures::future::join_all;
use std::collections::BTreeSet;
use std::sync::Arc;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

/// Most keys that a store is told in one call.
const BATCH: usize = 4096;

/// What the stores gave up with a document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DocumentDeletion {
    /// The largest of the stores' numbers of this deletion.
    pub generation: u64,
    /// What went, each tier once, ascending.
    pub tiers: Vec<TierDeletion>,
    /// Keys that went, now or when the document was deleted before, ascending: for whoever caches them.
    pub keys: Vec<ChunkKey>,
    /// Chunks that stay because another document holds them.
    pub kept: u32,
    /// Stores that did not answer, ascending: by name, or by endpoint where nobody has ever answered there. They may
    /// still have everything.
    pub pending: Vec<String>,
}

impl DocumentDeletion {
    /// The same as a worker or scorer tells it, with what went from its own RAM.
    pub fn with(mut self, own: &TierDeletion) -> HolderDeletion {
        deletion::add(&mut self.tiers, own);
        let Self { generation, tiers, kept, pending, .. } = self;
        HolderDeletion { generation, tiers, kept, pending }
    }
}

impl StoreClient {
    /// Adds a document's claim to chunks, at the stores that have them and at those that would keep them. A store that
    /// knows of no documents is left out: it cannot delete one either.
    ///
    /// # Errors
    /// No live store, or one that refuses or cannot be reached in time: the claim may not be recorded.
    pub async fn hold(&self, layout: LayoutId, keys: &[ChunkKey], hold: &Hold) -> Result<(), Error> {
        self.fleet.one_live(seconds(self.options.call_timeout_seconds)).await;
        let calls = self.places(layout, keys).await?;
        let calls = calls.into_iter().map(async |(node, keys)| {
            let request = HoldRequest {
                layout: id_bytes(layout.as_bytes()),
                keys: raw(&keys),
                hold: Some(hold.clone()),
                generation: self.since.at(&node),
            };
            let call = || {
                let mut client = node.control.clone();
                let request = outgoing(Request::new(request.clone()));
                async move { client.hold(request).await }
            };
            let held =
                again(&self.fleet, &node, "hold", self.options.put_timeout_seconds, &self.options, call)
                    .await;
            match held {
                Err(Error::Status(status)) if status.code() == Code::Unimplemented => {
                    tracing::warn!(store = node.name(), "a store knows of no documents: upgrade it");
                    Ok(())
                }
                held => held.map(|held| self.since.told(&node, held.generation)),
            }
        });
        // All of them are waited for: one that fails must not keep another from recording it.
        join_all(calls).await.into_iter().collect()
    }

    /// Keeps chunks from eviction for so many seconds; how many were found to be kept, copies included.
    ///
    /// # Errors
    /// As [`hold`](Self::hold).
    pub async fn pin(&self, layout: LayoutId, keys: &[ChunkKey], seconds: u64) -> Result<u32, Error> {
        let ask = async |mut store: CacheClient<Channel>, layout, keys| {
            store.pin(outgoing(Request::new(PinRequest { layout, keys, seconds }))).await
        };
        self.count_at_places("pin", layout, keys, ask).await
    }

    /// Lets chunks go that were kept from eviction; how many were found, copies included.
    ///
    /// # Errors
    /// As [`hold`](Self::hold).
    pub async fn unpin(&self, layout: LayoutId, keys: &[ChunkKey]) -> Result<u32, Error> {
        let ask = async |mut store: CacheClient<Channel>, layout, keys| {
            store.unpin(outgoing(Request::new(UnpinRequest { layout, keys }))).await
        };
        self.count_at_places("unpin", layout, keys, ask).await
    }

    /// Asks every place for its keys; how many they say it was for.
    async fn count_at_places(
        &self,
        method: &'static str,
        layout: LayoutId,
        keys: &[ChunkKey],
        ask: impl AsyncFn(CacheClient<Channel>, Bytes, Vec<Bytes>) -> Result<Response<PinResponse>, Status>,
    ) -> Result<u32, Error> {
        let (calls, ask) = (self.places(layout, keys).await?, &ask);
        let calls = calls.into_iter().map(async |(node, keys)| {
            let call = || ask(node.control.clone(), id_bytes(layout.as_bytes()), raw(&keys));
            again(&self.fleet, &node, method, self.options.call_timeout_seconds, &self.options, call).await
        });
        join_all(calls).await.into_iter().try_fold(0, |sum, counted| Ok(sum + counted?.keys))
    }

    /// Deletes a document at every store that is known, live or not; at those that do not answer it is pending, and
    /// asking again is how it gets done there. What a store tells of the document's keys is passed on to the others,
    /// which may have copies that came to them without it.
    pub async fn delete_document(&self, document: &DocumentId) -> DocumentDeletion {
        self.met().await;
        let mut pending: BTreeSet<String> = self.fleet.unheard().into_iter().collect();
        let nodes = self.fleet.known();
        let first = join_all(nodes.iter().map(|node| self.delete_at(node, document, &[]))).await;
        let mut answers = Vec::new();
        for (node, answer) in nodes.iter().zip(first) {
            match answer {
                Some(answer) => answers.push((node, answer)),
                None => {
                    pending.insert(node.name().to_owned());
                }
            }
        }
        let all: BTreeSet<ChunkKey> = answers.iter().flat_map(|(_, answer)| keys(answer)).collect();
        let passed_on = answers.iter_mut().map(async |(node, answer)| {
            let known: BTreeSet<ChunkKey> = keys(answer).collect();
            let news: Vec<ChunkKey> = all.difference(&known).copied().collect();
            for batch in news.chunks(BATCH) {
                match self.delete_at(node, document, batch).await {
                    Some(more) => *answer = more,
                    None => return Some(node.name().to_owned()),
                }
            }
            None
        });
        pending.extend(join_all(passed_on).await.into_iter().flatten());
        let mut deletion = DocumentDeletion {
            keys: all.into_iter().collect(),
            pending: pending.into_iter().collect(),
            ..DocumentDeletion::default()
        };
        for (_, answer) in &answers {
            deletion.generation = deletion.generation.max(answer.generation);
            deletion.kept = deletion.kept.saturating_add(answer.kept);
            answer.tiers.iter().for_each(|tier| deletion::add(&mut deletion.tiers, tier));
        }
        deletion
    }

    /// One store's answer; None where there is none.
    async fn delete_at(
        &self,
        node: &Arc<Node>,
        document: &DocumentId,
        keys: &[ChunkKey],
    ) -> Option<DeleteDocumentResponse> {
        let request = DeleteDocumentRequest { document: id_bytes(document.as_bytes()), keys: raw(keys) };
        let call = || {
            let mut client = node.control.clone();
            let request = outgoing(Request::new(request.clone()));
            async move { client.delete_document(request).await }
        };
        let seconds = self.options.delete_timeout_seconds;
        match again(&self.fleet, node, "delete_document", seconds, &self.options, call).await {
            Ok(answer) => {
                node.counts(answer.generation);
                Some(answer)
            }
            Err(error) => {
                tracing::warn!(store = node.name(), %document, %error, "a document is not deleted at this store yet");
                None
            }
        }
    }

    /// Keys by the stores that have them or would keep them.
    async fn places(
        &self,
        layout: LayoutId,
        keys: &[ChunkKey],
    ) -> Result<Vec<(Arc<Node>, Vec<ChunkKey>)>, Error> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        self.met().await;
        let finder = Finder::new(&self.fleet, &self.options, layout, keys, &self.since);
        let owned = finder.groups();
        if owned.is_empty() {
            return Err(Error::NoStore);
        }
        let found = join_all(owned.iter().map(|(owner, indices)| finder.locate(owner, indices))).await;
        let kept =
            owned.iter().flat_map(|(owner, indices)| indices.iter().map(|&index| (index, Arc::clone(owner))));
        let had = found.into_iter().flatten().filter_map(|(index, found)| Some((index, found.ok()?.node)));
        let groups = grouped(kept.chain(had)).into_iter().map(|(node, indices)| {
            let distinct: BTreeSet<usize> = indices.into_iter().collect();
            (node, distinct.into_iter().map(|index| keys[index]).collect())
        });
        Ok(groups.collect())
    }
}

fn keys(answer: &DeleteDocumentResponse) -> impl Iterator<Item = ChunkKey> + '_ {
    // What is no key names nothing.
    answer.keys.iter().filter_map(|key| ChunkKey::try_from(&key[..]).ok())
}
