//! Publishes canonical KV to the stores: behind the request's back, or awaited by ingest.

use crate::engine::{Canonical, RANK_VERSION};
use crate::layout::Layout;
use crate::metrics;
use bytes::Bytes;
use cacheclip_chunk::{ByteSpan, ChunkKey, Codec, Parts, Rank, encode};
use cacheclip_client::{Publisher, StoreClient, Terms, Written};
use cacheclip_model::layout::to_bytes;
use std::sync::Arc;

/// Handle to the writing task. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    publisher: Publisher,
    layout: Arc<Layout>,
    codec: Codec,
}

impl Writer {
    /// Starts the task; at most `queue` chunks wait.
    pub(crate) fn start(stores: StoreClient, layout: Arc<Layout>, queue: usize, codec: Codec) -> Self {
        Self { publisher: Publisher::start(stores, queue, metrics::write), layout, codec }
    }

    /// Queues a chunk; see [`Publisher::write_behind`]. One that was dropped is offered again when it is next
    /// computed.
    pub(crate) fn write_behind(
        &self,
        key: ChunkKey,
        terms: Terms,
        spans: Vec<ByteSpan>,
        canonical: Canonical,
    ) {
        let (layout, codec) = (Arc::clone(&self.layout), self.codec);
        self.publisher.write_behind(key, terms, move || container(&layout, codec, key, &spans, &canonical));
    }

    /// Publishes a chunk and waits until the store has answered; see [`Publisher::write`].
    pub(crate) async fn write(
        &self,
        key: ChunkKey,
        terms: Terms,
        spans: Vec<ByteSpan>,
        canonical: Canonical,
    ) -> Written {
        let (layout, codec) = (Arc::clone(&self.layout), self.codec);
        self.publisher.write(key, terms, move || container(&layout, codec, key, &spans, &canonical)).await
    }
}

fn container(
    layout: &Layout,
    codec: Codec,
    key: ChunkKey,
    spans: &[ByteSpan],
    canonical: &Canonical,
) -> Result<Bytes, cacheclip_chunk::FormatError> {
    let layers = to_bytes(&canonical.kv);
    let parts = Parts {
        layout: layout.id,
        key,
        shape: layout.spec.shape,
        tokens: canonical.kv.tokens() as u32,
        dtype: layout.spec.dtype,
        layers: layers.iter().map(Vec::as_slice).collect(),
        spans: Some(spans),
        rank: Some(Rank { version: RANK_VERSION, ranks: &canonical.rank }),
    };
    Ok(encode(&parts, codec)?.into())
}
