//! The gRPC surface: checks requests, streams frames, keeps blocking work off the async threads.

mod lifecycle;
mod put;

use crate::answer::{Answer, Frames};
use crate::core::Core;
use crate::fleet::Fleet;
use crate::metrics;
use crate::options::Options;
use crate::ram::Resident;
use crate::read::{Opened, wanted};
use crate::upload::Outcome;
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, LayoutId};
use cacheclip_rpc::convert::{id, id_bytes};
use cacheclip_rpc::status::{invalid, unavailable};
use cacheclip_rpc::v1::cache_server::Cache;
use cacheclip_rpc::v1::{
    DeleteDocumentRequest, DeleteDocumentResponse, DeleteRequest, DeleteResponse, Entry, GetLayersRequest,
    GetRequest, HoldRequest, HoldResponse, KvFrame, LookupRequest, LookupResponse, MembersRequest,
    MembersResponse, MissReason, PinRequest, PinResponse, PutFrame, PutResponse, Segment, StatRequest,
    StatResponse, Tier, UnpinRequest, kv_frame, put_response,
};
use cacheclip_service::seconds;
use futures::{StreamExt as _, stream};
use put::Incoming;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

/// Bytes of one frame of KV.
const FRAME: usize = 1 << 20;
/// Frames that wait for a client; they are slices of segments, not copies.
const FRAMES_AHEAD: usize = 4;
/// Most keys of one request.
const MOST_KEYS: usize = 4096;

/// The tonic service. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    core: Arc<Core>,
    puts: Arc<Semaphore>,
    max_object_bytes: u64,
    read_ahead: usize,
    stall: Duration,
    fleet: Arc<Fleet>,
}

impl Service {
    pub(crate) fn new(core: Arc<Core>, options: &Options, fleet: Arc<Fleet>) -> Self {
        Self {
            core,
            puts: Arc::new(Semaphore::new(options.concurrent_puts.clamp(1, Semaphore::MAX_PERMITS))),
            max_object_bytes: options.max_object_bytes,
            read_ahead: options.read_ahead.max(1),
            stall: seconds(options.stall_seconds),
            fleet,
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Core) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let core = Arc::clone(&self.core);
        tokio::task::spawn_blocking(move || work(&core)).await.map_err(unavailable)
    }

    /// Runs `send` with a bounded channel to the client until it is done or the client is gone.
    fn stream<F: Future<Output = Option<()>> + Send + 'static>(
        self,
        send: impl FnOnce(Self, Frames) -> F,
    ) -> Response<Answer> {
        let (frames, answer, client) = Answer::new(FRAMES_AHEAD);
        let sending = send(self, frames);
        tokio::spawn(async move {
            let started = Instant::now();
            let sent = tokio::select! {
                sent = sending => sent,
                () = client.gone() => None,
            };
            if sent.is_none() {
                client.take_back();
            }
            metrics::get(started.elapsed().as_secs_f64());
        });
        Response::new(answer)
    }

    /// Sends a frame; None where the client is gone or takes nothing for too long.
    async fn send(&self, frames: &Frames, chunk: usize, frame: kv_frame::Frame, tier: Tier) -> Option<()> {
        let missing = matches!(frame, kv_frame::Frame::Missing(_));
        let generation = if missing { self.core.journal.generation() } else { 0 };
        let frame = KvFrame { chunk: chunk as u32, frame: Some(frame), tier: tier.into(), generation };
        match tokio::time::timeout(self.stall, frames.send(Ok(frame))).await {
            Ok(sent) => sent.ok(),
            Err(_) => {
                metrics::missing(MissReason::Timeout);
                tracing::debug!(chunk, "a client takes no frames: its read is given up");
                None
            }
        }
    }

    async fn send_missing(&self, frames: &Frames, chunk: usize, reason: MissReason) -> Option<()> {
        metrics::missing(reason);
        self.send(frames, chunk, kv_frame::Frame::Missing(reason.into()), Tier::Unspecified).await
    }

    async fn open_object(
        &self,
        layout: LayoutId,
        key: ChunkKey,
        range: Range<u32>,
    ) -> Result<Opened, MissReason> {
        let found = self.core.find(layout, &key)?;
        // Another thread is for waiting: handing over what is at hand takes longer than opening it.
        if found.is_at_hand() {
            return self.core.open_found(found, &range);
        }
        let opened = self.blocking(move |core| core.open_found(found, &range)).await;
        opened.unwrap_or(Err(MissReason::Unavailable))
    }

    async fn read(&self, object: Arc<Resident>, index: usize) -> Result<Bytes, MissReason> {
        if let Some(stored) = object.segment(index) {
            return Ok(stored);
        }
        let read = self.blocking(move |core| core.segment(&object, index)).await;
        read.unwrap_or(Err(MissReason::Unavailable))
    }

    /// Heads of all chunks, then their spans and ranks, then layer by layer.
    async fn send_layers(
        self,
        layout: LayoutId,
        keys: Vec<ChunkKey>,
        range: Range<u32>,
        frames: Frames,
    ) -> Option<()> {
        let mut objects = Vec::with_capacity(keys.len());
        {
            let opening = keys.into_iter().map(|key| self.open_object(layout, key, range.clone()));
            let mut opened = stream::iter(opening).buffered(self.read_ahead).enumerate();
            while let Some((chunk, opened)) = opened.next().await {
                match opened {
                    Ok(Opened { object, tier }) => {
                        let head = kv_frame::Frame::Head(object.head.bytes().clone());
                        self.send(&frames, chunk, head, tier).await?;
                        objects.push(Some(object));
                    }
                    Err(reason) => {
                        self.send_missing(&frames, chunk, reason).await?;
                        objects.push(None);
                    }
                }
            }
        }
        let plans: Vec<Vec<usize>> = objects
            .iter()
            .map(|object| object.as_ref().map_or_else(Vec::new, |object| wanted(&object.head, &range)))
            .collect();
        let steps = plans.iter().map(Vec::len).max().unwrap_or_default();
        // Plans end with the same layers but may begin with none, one or two extras: aligned by their ends.
        let order: Vec<(usize, usize, Arc<Resident>)> = (0..steps)
            .flat_map(|step| plans.iter().enumerate().map(move |(chunk, plan)| (step, chunk, plan)))
            .filter_map(|(step, chunk, plan)| {
                let index = plan.get((step + plan.len()).checked_sub(steps)?)?;
                Some((chunk, *index, Arc::clone(objects[chunk].as_ref()?)))
            })
            .collect();
        let reading = order.into_iter().map(|(chunk, index, object)| {
            let read = self.read(object, index);
            async move { (chunk, index, read.await) }
        });
        let mut segments = stream::iter(reading).buffered(self.read_ahead);
        while let Some((chunk, index, stored)) = segments.next().await {
            match stored {
                _ if objects[chunk].is_none() => {}
                Ok(stored) => {
                    metrics::sent(stored.len());
                    for offset in (0..stored.len()).step_by(FRAME) {
                        let data = stored.slice(offset..stored.len().min(offset + FRAME));
                        let segment = Segment { index: index as u32, offset: offset as u64, data };
                        let frame = kv_frame::Frame::Segment(segment);
                        self.send(&frames, chunk, frame, Tier::Unspecified).await?;
                    }
                }
                Err(reason) => {
                    objects[chunk] = None;
                    self.send_missing(&frames, chunk, reason).await?;
                }
            }
        }
        Some(())
    }

    /// A container, byte for byte: head and segments, and the zeros between them.
    async fn send_container(self, layout: LayoutId, key: ChunkKey, frames: Frames) -> Option<()> {
        let object = match self.open_object(layout, key, 0..0).await {
            Ok(opened) => opened.object,
            Err(reason) => return self.send_missing(&frames, 0, reason).await,
        };
        let head = object.head.bytes().clone();
        let mut end = head.len() as u64;
        self.send(&frames, 0, kv_frame::Frame::Data(head), Tier::Unspecified).await?;
        for (index, entry) in object.head.segments().iter().enumerate() {
            let stored = match self.read(Arc::clone(&object), index).await {
                Ok(stored) => stored,
                Err(reason) => return self.send_missing(&frames, 0, reason).await,
            };
            let padding = Bytes::from(vec![0; (entry.offset - end) as usize]);
            end = entry.offset + entry.stored_len;
            metrics::sent(padding.len() + stored.len());
            let parts =
                (0..stored.len()).step_by(FRAME).map(|at| stored.slice(at..stored.len().min(at + FRAME)));
            for data in std::iter::once(padding).chain(parts).filter(|data| !data.is_empty()) {
                self.send(&frames, 0, kv_frame::Frame::Data(data), Tier::Unspecified).await?;
            }
        }
        Some(())
    }

    /// Takes a container in frames.
    pub(crate) async fn put_frames(&self, frames: impl Incoming) -> Result<Response<PutResponse>, Status> {
        let started = Instant::now();
        let outcome = self.receive(frames).await;
        let (label, answer) = match outcome {
            Ok(Outcome::Stored(hash)) => ("stored", Ok((put_response::Outcome::Stored, Some(hash)))),
            Ok(Outcome::Existed(hash)) => ("existed", Ok((put_response::Outcome::Existed, Some(hash)))),
            Ok(Outcome::NoRoom) => ("no_room", Ok((put_response::Outcome::NoRoom, None))),
            Ok(Outcome::Deleted) => ("deleted", Ok((put_response::Outcome::Deleted, None))),
            Err(status) => ("failed", Err(status)),
        };
        metrics::put(label, started.elapsed().as_secs_f64());
        let (outcome, hash) = answer?;
        let container_hash = hash.map_or_else(Bytes::new, |hash| id_bytes(hash.as_bytes()));
        Ok(Response::new(PutResponse { outcome: outcome.into(), container_hash }))
    }
}

fn keys(fields: &[Bytes]) -> Result<Vec<ChunkKey>, Status> {
    if fields.len() > MOST_KEYS {
        return Err(invalid("keys", format!("has {}, at most {MOST_KEYS} per request", fields.len())));
    }
    fields.iter().enumerate().map(|(at, bytes)| id(&format!("keys[{at}]"), bytes)).collect()
}

#[tonic::async_trait]
impl Cache for Service {
    type GetLayersStream = Answer;
    type GetStream = Answer;

    async fn lookup(&self, request: Request<LookupRequest>) -> Result<Response<LookupResponse>, Status> {
        let request = request.into_inner();
        let (layout, keys) = (id("layout", &request.layout)?, keys(&request.keys)?);
        // Before what it is said with: a deletion in between refuses more, not less.
        let generation = self.core.journal.generation();
        let entry = |key: &ChunkKey| match self.core.locate(layout, key) {
            Ok((record, tier)) => Entry {
                found: true,
                container_hash: id_bytes(record.hash.as_bytes()),
                bytes: record.bytes,
                tier: tier.into(),
                ..Entry::default()
            },
            Err(reason) => Entry { reason: reason.into(), ..Entry::default() },
        };
        let mut entries: Vec<Entry> = keys.iter().map(entry).collect();
        if request.elsewhere {
            let missing = entries.iter_mut().zip(&keys).filter(|(entry, _)| !entry.found);
            let (missing, asked): (Vec<&mut Entry>, Vec<ChunkKey>) =
                missing.map(|(it, key)| (it, *key)).unzip();
            if !asked.is_empty() {
                for (entry, nodes) in missing.into_iter().zip(self.fleet.elsewhere(layout, &asked).await) {
                    entry.nodes = nodes;
                }
            }
        }
        Ok(Response::new(LookupResponse { entries, generation }))
    }

    async fn get_layers(
        &self,
        request: Request<GetLayersRequest>,
    ) -> Result<Response<Self::GetLayersStream>, Status> {
        let request = request.into_inner();
        let (layout, keys) = (id("layout", &request.layout)?, keys(&request.keys)?);
        let range = request.first_layer..request.end_layer;
        if range.end != 0 && range.is_empty() {
            return Err(invalid(
                "first_layer",
                format!("is {}, must be below end_layer {}", range.start, range.end),
            ));
        }
        Ok(self.clone().stream(|service, frames| service.send_layers(layout, keys, range, frames)))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let request = request.into_inner();
        let (layout, key) = (id("layout", &request.layout)?, id("key", &request.key)?);
        Ok(self.clone().stream(|service, frames| service.send_container(layout, key, frames)))
    }

    async fn put(&self, request: Request<Streaming<PutFrame>>) -> Result<Response<PutResponse>, Status> {
        self.put_frames(request.into_inner()).await
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let request = request.into_inner();
        let (layout, keys) = (id("layout", &request.layout)?, keys(&request.keys)?);
        let deleted = self.blocking(move |core| core.delete(layout, &keys)).await?;
        let (objects, bytes) =
            deleted.map_err(|error| unavailable(format!("delete is not complete: {error}")))?;
        Ok(Response::new(DeleteResponse { objects, bytes }))
    }

    async fn hold(&self, request: Request<HoldRequest>) -> Result<Response<HoldResponse>, Status> {
        self.add_claims(request.into_inner()).await.map(Response::new)
    }

    async fn delete_document(
        &self,
        request: Request<DeleteDocumentRequest>,
    ) -> Result<Response<DeleteDocumentResponse>, Status> {
        self.delete_claimed(request.into_inner()).await.map(Response::new)
    }

    async fn pin(&self, request: Request<PinRequest>) -> Result<Response<PinResponse>, Status> {
        self.pin_keys(request.into_inner()).await.map(Response::new)
    }

    async fn unpin(&self, request: Request<UnpinRequest>) -> Result<Response<PinResponse>, Status> {
        self.unpin_keys(request.into_inner()).await.map(Response::new)
    }

    async fn stat(&self, _: Request<StatRequest>) -> Result<Response<StatResponse>, Status> {
        Ok(Response::new(self.core.stat()))
    }

    async fn members(&self, _: Request<MembersRequest>) -> Result<Response<MembersResponse>, Status> {
        let generation = self.core.journal.generation();
        Ok(Response::new(MembersResponse { generation, ..self.fleet.members() }))
    }
}
