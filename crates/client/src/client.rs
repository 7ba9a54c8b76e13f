//! Connections to stores and the calls on them.

use crate::fetch::{Fetch, start};
use crate::{Error, LayerStream, Options, Outcome, metrics};
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, ContainerHash, Head, LayoutId};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::{self, DeleteRequest, LookupRequest, MissReason, PutFrame, PutHead, Tier, put_frame};
use cacheclip_service::request_id::outgoing;
use cacheclip_service::{ConnectOptions, connect, seconds};
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

/// Bytes of one frame of a put.
const PUT_FRAME: usize = 512 << 10;
/// Largest message a store may send: a frame is at most 1 MiB, a head somewhat less.
const MAX_MESSAGE: usize = 4 << 20;

/// One store. Bulk reads and writes have a connection of their own, so that a lookup never waits behind them.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    control: CacheClient<Channel>,
    pub(crate) bulk: CacheClient<Channel>,
}

impl Node {
    fn new(control: Channel, bulk: Channel) -> Self {
        let client = |channel| CacheClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        Self { control: client(control), bulk: client(bulk) }
    }
}

/// Handle to the stores. Cheap to clone; connects with its first call and again after a loss.
#[derive(Clone, Debug)]
pub struct StoreClient {
    node: Node,
    options: Arc<Options>,
}

/// Where a lookup found a chunk, or why it did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Located {
    /// The store has it.
    Found {
        /// Hash of the container it has.
        container: ContainerHash,
        /// Bytes of that container.
        bytes: u64,
        /// Where in the store.
        tier: Tier,
    },
    /// The store does not have it, or could not be asked.
    Missing(MissReason),
}

/// What a delete removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Containers.
    pub objects: u32,
    /// Their bytes.
    pub bytes: u64,
}

impl StoreClient {
    /// A client of the store at `endpoint` (`http://host:port` or `host:port`), with default patience. Needs a
    /// tokio runtime; does not connect yet.
    ///
    /// # Errors
    /// An endpoint that cannot be dialled.
    pub fn connect(endpoint: &str, options: &ConnectOptions) -> Result<Self, Error> {
        Ok(Self::new(connect(endpoint, options)?, connect(endpoint, options)?, Options::default()))
    }

    /// A client on channels the caller made: one for lookups and deletes, one for bulk.
    pub fn new(control: Channel, bulk: Channel, options: Options) -> Self {
        Self { node: Node::new(control, bulk), options: Arc::new(options) }
    }

    /// The same connections with other deadlines and retries.
    #[must_use]
    pub fn with_options(self, options: Options) -> Self {
        Self { options: Arc::new(options), ..self }
    }

    /// The store that keeps a key: where rendezvous placement over several stores will choose.
    fn place(&self, _key: &ChunkKey) -> &Node {
        &self.node
    }

    /// Which of `keys` the store has, in their order. A store that cannot be asked has none of them, by the
    /// reason UNAVAILABLE or TIMEOUT.
    pub async fn lookup(&self, layout: LayoutId, keys: &[ChunkKey]) -> Vec<Located> {
        let Some(first) = keys.first() else { return Vec::new() };
        let mut missing = MissReason::Unavailable;
        for attempt in 0..=self.options.retries {
            self.pause(attempt).await;
            let request = LookupRequest {
                layout: id_bytes(layout.as_bytes()),
                keys: keys.iter().map(|key| id_bytes(key.as_bytes())).collect(),
            };
            let mut client = self.place(first).control.clone();
            let timeout = self.options.call_timeout_seconds;
            match call("lookup", timeout, client.lookup(outgoing(Request::new(request)))).await {
                Ok(answer) if answer.entries.len() == keys.len() => {
                    return answer.entries.iter().map(located).collect();
                }
                Ok(_) => break,
                Err(Error::Timeout { .. }) => {
                    missing = MissReason::Timeout;
                    break;
                }
                Err(Error::Status(status)) if worth_retrying(&status) => missing = reason(&status),
                Err(_) => break,
            }
        }
        vec![Located::Missing(missing); keys.len()]
    }

    /// Layers `range` of several chunks, layer-major: all chunks' first layer, then their second. Chunks are
    /// named by their index in `keys`. Every layer that comes out is verified and decoded; every chunk ends
    /// with its last layer or with [`Item::Missing`]. Dropping the stream stops the store's work.
    pub fn get_layers(&self, layout: LayoutId, keys: &[ChunkKey], range: Range<u32>) -> LayerStream {
        let node = keys.first().map_or(&self.node, |key| self.place(key)).clone();
        start(Fetch { node, layout, keys: keys.to_vec(), range, options: Arc::clone(&self.options) })
    }

    /// Stores a container. The first writer of a key wins; a later one is told [`Outcome::Existed`].
    ///
    /// # Errors
    /// Bytes that are not a container, a store that refuses it or cannot be reached in time.
    pub async fn put(&self, container: Bytes) -> Result<Outcome, Error> {
        let head = Head::parse(&container)?;
        let announced = put_frame::Frame::Head(PutHead {
            layout: id_bytes(head.layout().as_bytes()),
            key: id_bytes(head.key().as_bytes()),
            bytes: container.len() as u64,
        });
        let frames = (0..container.len())
            .step_by(PUT_FRAME)
            .map(move |at| put_frame::Frame::Data(container.slice(at..container.len().min(at + PUT_FRAME))));
        let frames = std::iter::once(announced).chain(frames).map(|frame| PutFrame { frame: Some(frame) });
        let mut client = self.place(&head.key()).bulk.clone();
        let request = outgoing(Request::new(futures::stream::iter(frames)));
        let answer = call("put", self.options.put_timeout_seconds, client.put(request)).await?;
        Ok(answer.outcome())
    }

    /// Removes chunks from the store.
    ///
    /// # Errors
    /// A store that refuses or cannot be reached in time: the chunks may then still be there.
    pub async fn delete(&self, layout: LayoutId, keys: &[ChunkKey]) -> Result<Deleted, Error> {
        let Some(first) = keys.first() else { return Ok(Deleted::default()) };
        let request = DeleteRequest {
            layout: id_bytes(layout.as_bytes()),
            keys: keys.iter().map(|key| id_bytes(key.as_bytes())).collect(),
        };
        let mut client = self.place(first).control.clone();
        let request = outgoing(Request::new(request));
        let answer = call("delete", self.options.call_timeout_seconds, client.delete(request)).await?;
        Ok(Deleted { objects: answer.objects, bytes: answer.bytes })
    }

    async fn pause(&self, attempt: u32) {
        pause(&self.options, attempt).await;
    }
}

/// Waits before a retry; counts it.
pub(crate) async fn pause(options: &Options, attempt: u32) {
    if attempt > 0 {
        metrics::retried();
        let factor = f64::from(1u32 << (attempt - 1).min(10));
        tokio::time::sleep(seconds(options.backoff_seconds * factor)).await;
    }
}

/// Whether the same read may succeed when it is made again.
pub(crate) fn worth_retrying(status: &Status) -> bool {
    matches!(
        status.code(),
        // A connection that breaks in the middle of an answer is Unknown, Internal or Cancelled to tonic.
        Code::Unavailable
            | Code::Unknown
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
            | Code::ResourceExhausted
    )
}

/// Why chunks are missing when their read ended with a status.
pub(crate) fn reason(status: &Status) -> MissReason {
    match status.code() {
        Code::DeadlineExceeded => MissReason::Timeout,
        Code::FailedPrecondition => MissReason::Layout,
        _ => MissReason::Unavailable,
    }
}

/// An id-sized field of an answer, or why the entry counts as missing.
fn located(entry: &v1::Entry) -> Located {
    if !entry.found {
        return Located::Missing(entry.reason());
    }
    match ContainerHash::try_from(&entry.container_hash[..]) {
        Ok(container) => Located::Found { container, bytes: entry.bytes, tier: entry.tier() },
        Err(_) => Located::Missing(MissReason::Corrupt),
    }
}

async fn call<T>(
    method: &'static str,
    timeout: f64,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    let started = Instant::now();
    let answer = tokio::time::timeout(seconds(timeout), call).await;
    metrics::call_ended(method, started.elapsed().as_secs_f64());
    match answer {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Box::new(status).into()),
        Err(_) => Err(Error::Timeout { seconds: timeout }),
    }
}
