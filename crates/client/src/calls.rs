//! The calls at one store.

use crate::fleet::Fleet;
use crate::node::{MAX_MESSAGE, Node};
use crate::since::Since;
use crate::{Deleted, Error, Options, Outcome, Terms, metrics};
use bytes::{Bytes, BytesMut};
use cacheclip_chunk::{ChunkKey, Head, LayoutId};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::stream;
use cacheclip_rpc::v1::{
    self, DeleteRequest, GetRequest, LookupRequest, MissReason, PutFrame, PutHead, Tier, kv_frame, put_frame,
};
use cacheclip_service::request_id::outgoing;
use cacheclip_service::seconds;
use std::time::Instant;
use tonic::{Code, Request, Response, Status};

/// Bytes of one frame of a put.
const PUT_FRAME: usize = 1 << 20;
/// Room made ahead for a container; the rest grows as bytes come.
const AHEAD: u64 = 4 << 20;

/// Waits before a retry; counts it.
pub(crate) async fn pause(options: &Options, attempt: u32) {
    if attempt > 0 {
        metrics::retried();
        let factor = f64::from(1u32 << (attempt - 1).min(10));
        tokio::time::sleep(seconds(options.backoff_seconds * factor)).await;
    }
}

/// Keys as a message carries them.
pub(crate) fn raw(keys: &[ChunkKey]) -> Vec<Bytes> {
    keys.iter().map(|key| id_bytes(key.as_bytes())).collect()
}

/// A call that may be made several times with the same effect, made again where that may help.
pub(crate) async fn again<T, Answer: Future<Output = Result<Response<T>, Status>>>(
    fleet: &Fleet,
    node: &Node,
    method: &'static str,
    timeout: f64,
    options: &Options,
    call: impl Fn() -> Answer,
) -> Result<T, Error> {
    let mut last = Error::NoStore;
    for attempt in 0..=options.retries {
        pause(options, attempt).await;
        match fleet.call(node, method, timeout, call()).await {
            Err(Error::Status(status)) if worth_retrying(&status) => last = Error::Status(status),
            answer => return answer,
        }
    }
    Err(last)
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

/// Whether a store that gives this reason was asked in vain only because it is not the one that has the chunk.
pub(crate) fn may_be_elsewhere(reason: MissReason) -> bool {
    matches!(reason, MissReason::NeverSeen | MissReason::Evicted)
}

impl Fleet {
    /// What a store says of `keys`, in their order; with `elsewhere` also which other stores its index names.
    pub(crate) async fn lookup(
        &self,
        node: &Node,
        layout: LayoutId,
        keys: &[ChunkKey],
        elsewhere: bool,
        (options, since): (&Options, &Since),
    ) -> Result<Vec<v1::Entry>, MissReason> {
        let request = LookupRequest { layout: id_bytes(layout.as_bytes()), keys: raw(keys), elsewhere };
        let mut missing = MissReason::Unavailable;
        for attempt in 0..=options.retries {
            pause(options, attempt).await;
            let mut client = node.control.clone();
            let call = client.lookup(outgoing(Request::new(request.clone())));
            match self.call(node, "lookup", options.call_timeout_seconds, call).await {
                Ok(answer) if answer.entries.len() == keys.len() => {
                    since.told(node, answer.generation);
                    return Ok(answer.entries);
                }
                Ok(_) => break,
                // Waiting as long again helps nobody.
                Err(Error::Timeout { .. }) => return Err(MissReason::Timeout),
                Err(Error::Status(status)) => {
                    missing = reason(&status);
                    if !worth_retrying(&status) {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        Err(missing)
    }

    /// Stores a container, whose head this is.
    pub(crate) async fn put(
        &self,
        node: &Node,
        head: &Head,
        container: Bytes,
        (options, terms): (&Options, &Terms),
    ) -> Result<Outcome, Error> {
        let bytes = container.len();
        let announced = put_frame::Frame::Head(PutHead {
            layout: id_bytes(head.layout().as_bytes()),
            key: id_bytes(head.key().as_bytes()),
            bytes: bytes as u64,
            hold: terms.hold.clone(),
            generation: terms.since.at(node),
        });
        let frames = (0..bytes)
            .step_by(PUT_FRAME)
            .map(move |at| put_frame::Frame::Data(container.slice(at..bytes.min(at + PUT_FRAME))));
        let frames = std::iter::once(announced).chain(frames).map(|frame| PutFrame { frame: Some(frame) });
        let call = stream::put(node.bulk.clone(), outgoing(Request::new(frames)), MAX_MESSAGE);
        let answer = self.call(node, "put", options.put_timeout_seconds, call).await?;
        node.sound();
        metrics::written(bytes);
        Ok(answer.outcome())
    }

    /// Removes chunks from one store.
    pub(crate) async fn delete(
        &self,
        node: &Node,
        layout: LayoutId,
        keys: &[ChunkKey],
        options: &Options,
    ) -> Result<Deleted, Error> {
        let request = DeleteRequest { layout: id_bytes(layout.as_bytes()), keys: raw(keys) };
        let mut client = node.control.clone();
        let call = client.delete(outgoing(Request::new(request)));
        let answer = self.call(node, "delete", options.call_timeout_seconds, call).await?;
        Ok(Deleted { objects: answer.objects, bytes: answer.bytes, unreached: 0 })
    }

    /// A whole container of `bytes` bytes, of which only the number is checked.
    pub(crate) async fn get(
        &self,
        node: &Node,
        layout: LayoutId,
        key: &ChunkKey,
        (bytes, tier): (u64, Tier),
        (options, since): (&Options, &Since),
    ) -> Result<Bytes, MissReason> {
        let started = Instant::now();
        let request = GetRequest { layout: id_bytes(layout.as_bytes()), key: id_bytes(key.as_bytes()) };
        let call = stream::get(node.bulk.clone(), outgoing(Request::new(request)), MAX_MESSAGE);
        let mut frames = match self.call(node, "get", options.silence_seconds, call).await {
            Ok(frames) => frames,
            Err(Error::Status(status)) => return Err(reason(&status)),
            Err(_) => return Err(MissReason::Timeout),
        };
        let mut container = BytesMut::with_capacity(bytes.min(AHEAD) as usize);
        while (container.len() as u64) < bytes {
            let next = tokio::select! {
                next = tokio::time::timeout(seconds(options.silence_seconds), frames.message()) => next.ok(),
                () = node.silent() => None,
            };
            let frame = match next {
                Some(Ok(Some(frame))) => {
                    since.told(node, frame.generation);
                    frame.frame
                }
                Some(Ok(None)) => return Err(MissReason::Corrupt),
                Some(Err(status)) => {
                    self.judge(node, &status);
                    return Err(reason(&status));
                }
                None => {
                    self.overdue(node);
                    return Err(MissReason::Timeout);
                }
            };
            match frame {
                Some(kv_frame::Frame::Data(data)) => {
                    metrics::loaded(tier, data.len());
                    container.extend_from_slice(&data);
                }
                Some(kv_frame::Frame::Missing(reason)) => {
                    return Err(MissReason::try_from(reason).unwrap_or(MissReason::Unavailable));
                }
                // Parts of layers are not what was asked for; kinds of a newer protocol are none of ours.
                _ => {}
            }
        }
        if container.len() as u64 > bytes {
            return Err(MissReason::Corrupt);
        }
        metrics::load_ended(tier, started.elapsed().as_secs_f64());
        node.sound();
        Ok(container.freeze())
    }
}
