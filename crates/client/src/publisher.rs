//! Containers on their way to the stores: behind a request's back, or awaited by an ingest.

use crate::{Error, Outcome, StoreClient, Terms};
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, FormatError};
use tokio::sync::{mpsc, oneshot};

/// What may become of a chunk that is offered to the stores, as metrics say it.
pub const OUTCOMES: [&str; 6] = ["stored", "existed", "no_room", "deleted", "dropped", "failed"];

/// Makes a container; called off the async threads, when its turn has come.
type Encode = Box<dyn FnOnce() -> Result<Bytes, FormatError> + Send>;

struct Write {
    key: ChunkKey,
    terms: Terms,
    encode: Encode,
    done: Option<oneshot::Sender<&'static str>>,
}

/// Handle to the publishing task, which ends with the last of them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: mpsc::Sender<Write>,
    count: fn(&'static str),
}

impl Publisher {
    /// Starts the task; at most `queue` chunks wait. `count` is told one of [`OUTCOMES`] for each.
    pub fn start(stores: StoreClient, queue: usize, count: fn(&'static str)) -> Self {
        let (sender, mut inbox) = mpsc::channel::<Write>(queue.max(1));
        tokio::spawn(async move {
            while let Some(Write { key, terms, encode, done }) = inbox.recv().await {
                let outcome = publish(&stores, key, &terms, encode).await;
                count(outcome);
                if let Some(done) = done {
                    // Ingest may have been cancelled meanwhile.
                    let _ = done.send(outcome);
                }
            }
        });
        Self { queue: sender, count }
    }

    /// Queues a chunk; dropped and counted when the queue is full, because a request must not wait for a store. Its
    /// owner keeps it in RAM.
    pub fn write_behind(
        &self,
        key: ChunkKey,
        terms: Terms,
        encode: impl FnOnce() -> Result<Bytes, FormatError> + Send + 'static,
    ) {
        if self.queue.try_send(Write { key, terms, encode: Box::new(encode), done: None }).is_err() {
            (self.count)("dropped");
        }
    }

    /// Publishes a chunk and waits until the store has answered: one of [`OUTCOMES`]. The caller brings the deadline.
    pub async fn write(
        &self,
        key: ChunkKey,
        terms: Terms,
        encode: impl FnOnce() -> Result<Bytes, FormatError> + Send + 'static,
    ) -> &'static str {
        let (done, answered) = oneshot::channel();
        let write = Write { key, terms, encode: Box::new(encode), done: Some(done) };
        match self.queue.send(write).await {
            // An error means that the task ended with the process.
            Ok(()) => answered.await.unwrap_or("dropped"),
            Err(_) => "dropped",
        }
    }
}

async fn publish(stores: &StoreClient, key: ChunkKey, terms: &Terms, encode: Encode) -> &'static str {
    let container = match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(container)) => container,
        Ok(Err(error)) => {
            tracing::error!(%key, %error, "a chunk could not be encoded");
            return "failed";
        }
        Err(error) => {
            tracing::error!(%key, %error, "encoding panicked");
            return "failed";
        }
    };
    let put = stores.put_on(container, terms).await;
    if let Err(error) = &put {
        tracing::warn!(%key, %error, "a chunk was not stored");
    }
    label(&put)
}

/// A put's end, as metrics say it.
pub(crate) fn label(put: &Result<Outcome, Error>) -> &'static str {
    match put {
        Ok(Outcome::Stored) => "stored",
        Ok(Outcome::Existed) => "existed",
        Ok(Outcome::Deleted) => "deleted",
        Ok(_) => "no_room",
        Err(_) => "failed",
    }
}
