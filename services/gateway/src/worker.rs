//! The workers as the gateway knows them: what they say of themselves, and what their errors mean to a caller.

use crate::Error;
use crate::peers::{Chosen, Peer, Peers};
use cacheclip_chunk::{AnchorId, LayoutId};
use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::worker_client::WorkerClient;
use cacheclip_rpc::{convert, status, v1};
use cacheclip_service::{ConnectOptions, request_id};
use futures::future::BoxFuture;
use parking_lot::RwLock;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

/// Longest wait for one answer to `Describe`.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pause before the second attempt; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Largest announcement: 65,536 short keys and some room.
pub(crate) const ANNOUNCEMENT_BYTES: usize = 1 << 20;

/// What a worker said of itself, checked against this gateway's model directory.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) model: String,
    pub(crate) layout: v1::Layout,
    pub(crate) layout_id: LayoutId,
    /// What chunks are encoded behind.
    pub(crate) anchor: AnchorId,
    /// What a prefix is encoded behind: nothing.
    pub(crate) no_anchor: AnchorId,
    /// Length of the anchor in tokens.
    pub(crate) anchor_tokens: usize,
    pub(crate) max_tokens: usize,
    pub(crate) policies: Vec<String>,
}

impl Described {
    fn check(reply: v1::DescribeResponse, composer: &Composer) -> Result<Self, Error> {
        if reply.tokenizer != composer.tokenizer().digest()[..] {
            return Err(Error::Mismatch { what: "tokenizer" });
        }
        if reply.anchor != composer.anchor()? {
            return Err(Error::Mismatch { what: "anchor (prompt.json)" });
        }
        let layout = reply.layout.unwrap_or_default();
        let layout_id: LayoutId = convert::id("layout.id", &layout.id)
            .map_err(|_| Error::Mismatch { what: "layout id (its length)" })?;
        if layout.key_spec != cacheclip_chunk::KEY_SPEC {
            return Err(Error::Mismatch { what: "key specification (its version)" });
        }
        Ok(Self {
            model: reply.model,
            layout,
            layout_id,
            anchor: AnchorId::new(&layout_id, &reply.anchor),
            no_anchor: AnchorId::new(&layout_id, &[]),
            anchor_tokens: reply.anchor.len(),
            max_tokens: reply.max_tokens as usize,
            policies: reply.policies,
        })
    }
}

/// The workers behind this gateway. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Workers {
    peers: Peers,
    composer: Composer,
    message_bytes: usize,
    described: Arc<RwLock<Option<Arc<Described>>>>,
}

fn watch(channel: Channel) -> BoxFuture<'static, Result<Streaming<v1::Residency>, Status>> {
    Box::pin(async move {
        let mut client = WorkerClient::new(channel).max_decoding_message_size(ANNOUNCEMENT_BYTES);
        client.watch(Request::new(v1::WatchRequest {})).await.map(tonic::Response::into_inner)
    })
}

impl Workers {
    pub(crate) fn start(
        endpoints: &[String],
        connect: &ConnectOptions,
        composer: Composer,
        message_bytes: usize,
    ) -> Result<Self, Error> {
        let peers = Peers::start("worker", endpoints, connect, watch)?;
        Ok(Self { peers, composer, message_bytes, described: Arc::default() })
    }

    /// The best worker for these sections (short key and tokens), leaving out those already tried.
    pub(crate) fn choose(&self, wanted: &[(u64, u32)], tried: &[String]) -> Option<Chosen> {
        self.peers.choose(wanted, tried)
    }

    /// All workers, and names behind which none was found.
    pub(crate) fn all(&self) -> (Vec<Arc<Peer>>, Vec<String>) {
        self.peers.all()
    }

    /// A client for one call to a worker.
    pub(crate) fn client(&self, worker: &Peer) -> WorkerClient<Channel> {
        WorkerClient::new(worker.channel())
            .max_decoding_message_size(self.message_bytes)
            .max_encoding_message_size(self.message_bytes)
    }

    /// What the workers last said of themselves.
    pub(crate) fn described(&self) -> Result<Arc<Described>, Status> {
        self.described
            .read()
            .clone()
            .ok_or_else(|| status::unavailable("no worker has described itself yet; send the request again"))
    }

    /// Asks until a worker answers or `patience` is over. Workers that are there and none of which fits are an
    /// error at once: waiting would not change it.
    pub(crate) async fn learn(&self, patience: Duration) -> Result<Arc<Described>, Error> {
        let deadline = Instant::now() + patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let failed = match self.ask_around().await {
                Ok(described) => return Ok(described),
                Err(failed) => failed,
            };
            if !may_pass(&failed) || Instant::now() + pause >= deadline {
                return Err(failed);
            }
            tracing::debug!(%failed, "no worker describes itself yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The first worker that answers and fits; else an error, one that waiting may change where there is one.
    async fn ask_around(&self) -> Result<Arc<Described>, Error> {
        let nobody = || Status::unavailable("no worker was found");
        let mut failed = Error::Worker { endpoint: "workers".into(), status: Box::new(nobody()) };
        let mut tried = Vec::new();
        while let Some(worker) = self.peers.choose(&[], &tried) {
            tried.push(worker.endpoint().to_owned());
            let mut client = self.client(&worker);
            let call = client.describe(request_id::outgoing(Request::new(v1::DescribeRequest {})));
            let reply = within(ATTEMPT, "the worker's description", call).await;
            let endpoint = worker.endpoint().to_owned();
            let checked = match reply {
                Ok(reply) => Described::check(reply.into_inner(), &self.composer),
                Err(status) => Err(Error::Worker { endpoint, status: Box::new(status) }),
            };
            match checked {
                Ok(described) => {
                    let described = Arc::new(described);
                    *self.described.write() = Some(Arc::clone(&described));
                    return Ok(described);
                }
                // One that is starting may still be the one that fits.
                Err(error) if tried.len() == 1 || may_pass(&error) => failed = error,
                Err(_) => {}
            }
        }
        Err(failed)
    }

    /// What a worker's error is to a caller of the gateway.
    pub(crate) async fn explain(&self, failed: Status) -> Status {
        if failed.code() != Code::FailedPrecondition {
            return passed_on(&failed, "worker");
        }
        // The workers were replaced by some with another layout since they were asked. Keys made from here on
        // are right; this request's are not.
        match self.learn(ATTEMPT).await {
            Ok(described) => {
                tracing::warn!(layout = %described.layout_id, "the workers' layout has changed");
                status::unavailable("the workers' layout has changed; send the request again")
            }
            Err(error) => status::unavailable(error),
        }
    }
}

/// Whether a worker that cannot be used for this may be usable later.
fn may_pass(failed: &Error) -> bool {
    match failed {
        Error::Worker { status, .. } => {
            !matches!(status.code(), Code::Unimplemented | Code::PermissionDenied)
        }
        _ => false,
    }
}

/// Whether another worker may succeed where one failed with this, nothing having been answered yet.
pub(crate) fn worth_another(failed: &Status) -> bool {
    use std::error::Error as _;
    let broken = failed.source().is_some();
    let busy = matches!(failed.code(), Code::Unavailable | Code::ResourceExhausted);
    // One of two versions that run side by side during an upgrade.
    broken || busy || failed.code() == Code::FailedPrecondition
}

/// A status from another service, as this service's own: code, message and details stay, transport metadata does
/// not. A status that was made on this side from a broken connection is UNAVAILABLE, whatever broke.
pub(crate) fn passed_on(failed: &Status, service: &str) -> Status {
    use std::error::Error as _;
    if let Some(source) = failed.source() {
        return status::unavailable(format_args!("the {service} cannot be reached: {}", root(source)));
    }
    Status::with_details(failed.code(), failed.message(), failed.details().to_vec().into())
}

/// The innermost cause: "connection refused" tells more than "transport error".
fn root<'a>(mut error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    while let Some(source) = error.source() {
        error = source;
    }
    error
}

/// Waits for another service no longer than `limit`.
pub(crate) async fn within<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("{what} did not arrive within {limit:?}"))),
    }
}
