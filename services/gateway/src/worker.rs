//! The worker as the gateway knows it: what it says of itself, and what its errors mean to a caller.

use crate::Error;
use cacheclip_chunk::{AnchorId, LayoutId};
use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::worker_client::WorkerClient;
use cacheclip_rpc::{convert, status, v1};
use cacheclip_service::request_id;
use parking_lot::RwLock;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Longest wait for one answer to `Describe`.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pause before the second attempt; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

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

/// The worker behind this gateway. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    endpoint: Arc<str>,
    client: WorkerClient<Channel>,
    composer: Composer,
    described: Arc<RwLock<Option<Arc<Described>>>>,
}

impl Worker {
    pub(crate) fn new(endpoint: &str, channel: Channel, composer: Composer, message_bytes: usize) -> Self {
        let client = WorkerClient::new(channel)
            .max_decoding_message_size(message_bytes)
            .max_encoding_message_size(message_bytes);
        Self { endpoint: endpoint.into(), client, composer, described: Arc::default() }
    }

    /// A client for one call.
    pub(crate) fn client(&self) -> WorkerClient<Channel> {
        self.client.clone()
    }

    /// What the worker last said of itself.
    pub(crate) fn described(&self) -> Result<Arc<Described>, Status> {
        self.described
            .read()
            .clone()
            .ok_or_else(|| status::unavailable("the worker has not described itself yet"))
    }

    /// Asks until the worker answers or `patience` is over. A worker that is there and does not fit is an error
    /// at once: waiting would not change it.
    pub(crate) async fn learn(&self, patience: Duration) -> Result<Arc<Described>, Error> {
        let deadline = Instant::now() + patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let failed = match self.describe().await {
                Ok(reply) => {
                    let described = Arc::new(Described::check(reply, &self.composer)?);
                    *self.described.write() = Some(Arc::clone(&described));
                    return Ok(described);
                }
                Err(failed) => failed,
            };
            let hopeless = matches!(failed.code(), Code::Unimplemented | Code::PermissionDenied);
            if hopeless || Instant::now() + pause >= deadline {
                return Err(Error::Worker { endpoint: self.endpoint.to_string(), status: Box::new(failed) });
            }
            tracing::debug!(status = %failed, "the worker does not describe itself yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn describe(&self) -> Result<v1::DescribeResponse, Status> {
        let mut client = self.client();
        let call = client.describe(request_id::outgoing(Request::new(v1::DescribeRequest {})));
        within(ATTEMPT, "the worker's description", call).await.map(tonic::Response::into_inner)
    }

    /// What a worker's error is to a caller of the gateway.
    pub(crate) async fn explain(&self, failed: Status) -> Status {
        if failed.code() != Code::FailedPrecondition {
            return passed_on(&failed, "worker");
        }
        // The worker was replaced by one with another layout since it was asked. Keys made from here on are
        // right; this request's are not.
        match self.learn(ATTEMPT).await {
            Ok(described) => {
                tracing::warn!(layout = %described.layout_id, "the worker's layout has changed");
                status::unavailable("the worker's layout has changed; send the request again")
            }
            Err(error) => status::unavailable(error),
        }
    }
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
