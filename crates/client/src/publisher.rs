//! Containers on their way to the stores: behind a request's back, or awaited by an ingest.

use crate::{Error, Outcome, StoreClient, Terms};
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, FormatError};
use tokio::sync::{mpsc, oneshot};

/// What became of a chunk that was offered to the stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// A store has it now.
    Stored,
    /// A store had it already, and has recorded its claim.
    Existed,
    /// The store has no room for it.
    NoRoom,
    /// It was deleted since its computing began.
    Deleted,
    /// It never came to a store: the queue was full, or the process ends.
    Dropped,
    /// It could not be encoded, or the store refused it or could not be reached.
    Failed,
}

impl Written {
    /// All there are.
    pub const ALL: [Self; 6] =
        [Self::Stored, Self::Existed, Self::NoRoom, Self::Deleted, Self::Dropped, Self::Failed];

    /// As metrics say it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Existed => "existed",
            Self::NoRoom => "no_room",
            Self::Deleted => "deleted",
            Self::Dropped => "dropped",
            Self::Failed => "failed",
        }
    }

    /// Whether no store has recorded the claim that came with it.
    pub fn is_unclaimed(self) -> bool {
        matches!(self, Self::NoRoom | Self::Dropped | Self::Failed)
    }
}

impl From<&Result<Outcome, Error>> for Written {
    fn from(put: &Result<Outcome, Error>) -> Self {
        match put {
            Ok(Outcome::Stored) => Self::Stored,
            Ok(Outcome::Existed) => Self::Existed,
            Ok(Outcome::Deleted) => Self::Deleted,
            Ok(_) => Self::NoRoom,
            Err(_) => Self::Failed,
        }
    }
}

/// Makes a container; called off the async threads, when its turn has come.
type Encode = Box<dyn FnOnce() -> Result<Bytes, FormatError> + Send>;

struct Write {
    key: ChunkKey,
    terms: Terms,
    encode: Encode,
    done: Option<oneshot::Sender<Written>>,
}

/// Handle to the publishing task, which ends with the last of them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: mpsc::Sender<Write>,
    count: fn(Written),
}

impl Publisher {
    /// Starts the task; at most `queue` chunks wait. `count` is told what becomes of each.
    pub fn start(stores: StoreClient, queue: usize, count: fn(Written)) -> Self {
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
            (self.count)(Written::Dropped);
        }
    }

    /// Publishes a chunk and waits until the store has answered. The caller brings the deadline.
    pub async fn write(
        &self,
        key: ChunkKey,
        terms: Terms,
        encode: impl FnOnce() -> Result<Bytes, FormatError> + Send + 'static,
    ) -> Written {
        let (done, answered) = oneshot::channel();
        let write = Write { key, terms, encode: Box::new(encode), done: Some(done) };
        match self.queue.send(write).await {
            // An error means that the task ended with the process.
            Ok(()) => answered.await.unwrap_or(Written::Dropped),
            Err(_) => Written::Dropped,
        }
    }
}

async fn publish(stores: &StoreClient, key: ChunkKey, terms: &Terms, encode: Encode) -> Written {
    let container = match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(container)) => container,
        Ok(Err(error)) => {
            tracing::error!(%key, %error, "a chunk could not be encoded");
            return Written::Failed;
        }
        Err(error) => {
            tracing::error!(%key, %error, "encoding panicked");
            return Written::Failed;
        }
    };
    let put = stores.put_on(container, terms).await;
    if let Err(error) = &put {
        tracing::warn!(%key, %error, "a chunk was not stored");
    }
    Written::from(&put)
}
