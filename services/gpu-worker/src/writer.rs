//! Publishes canonical KV to the stores: behind the request's back, or awaited by ingest.

use crate::engine::{Canonical, RANK_VERSION};
use crate::layout::Layout;
use crate::metrics;
use bytes::Bytes;
use cacheclip_chunk::{ByteSpan, ChunkKey, Codec, Parts, Rank, encode};
use cacheclip_client::StoreClient;
use cacheclip_model::layout::to_bytes;
use cacheclip_rpc::v1::put_response::Outcome;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

struct Write {
    key: ChunkKey,
    spans: Vec<ByteSpan>,
    canonical: Canonical,
    done: Option<oneshot::Sender<()>>,
}

/// Handle to the writing task. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Write>,
}

impl Writer {
    /// Starts the task; at most `queue` chunks wait.
    pub(crate) fn start(stores: StoreClient, layout: Arc<Layout>, queue: usize) -> Self {
        let (sender, mut inbox) = mpsc::channel::<Write>(queue.max(1));
        tokio::spawn(async move {
            while let Some(write) = inbox.recv().await {
                let done = publish(&stores, &layout, write).await;
                if let Some(done) = done {
                    // Ingest may have been cancelled meanwhile.
                    let _ = done.send(());
                }
            }
        });
        Self { queue: sender }
    }

    /// Queues a chunk; dropped and counted when the queue is full, because a request must not wait for a
    /// store. The chunk stays in RAM and is offered again when it is next computed.
    pub(crate) fn write_behind(&self, key: ChunkKey, spans: Vec<ByteSpan>, canonical: Canonical) {
        if self.queue.try_send(Write { key, spans, canonical, done: None }).is_err() {
            metrics::write("dropped");
        }
    }

    /// Publishes a chunk and waits until the store has answered.
    pub(crate) async fn write(&self, key: ChunkKey, spans: Vec<ByteSpan>, canonical: Canonical) {
        let (done, answered) = oneshot::channel();
        if self.queue.send(Write { key, spans, canonical, done: Some(done) }).await.is_ok() {
            // An error means the task ended with the process.
            let _ = answered.await;
        }
    }
}

async fn publish(stores: &StoreClient, layout: &Arc<Layout>, write: Write) -> Option<oneshot::Sender<()>> {
    let Write { key, spans, canonical, done } = write;
    let layout = Arc::clone(layout);
    let encoded = tokio::task::spawn_blocking(move || container(&layout, key, &spans, &canonical)).await;
    match encoded {
        Ok(Ok(container)) => match stores.put(container).await {
            Ok(Outcome::Stored) => metrics::write("stored"),
            Ok(Outcome::Existed) => metrics::write("existed"),
            Ok(_) => metrics::write("no_room"),
            Err(error) => {
                metrics::write("failed");
                tracing::warn!(%key, %error, "chunk was not stored");
            }
        },
        Ok(Err(error)) => {
            metrics::write("failed");
            tracing::error!(%key, %error, "chunk could not be encoded");
        }
        Err(error) => {
            metrics::write("failed");
            tracing::error!(%key, %error, "encoding panicked");
        }
    }
    done
}

fn container(
    layout: &Layout,
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
    Ok(encode(&parts, Codec::default())?.into())
}
