//! Stores on real ports that go wrong in one chosen way, and that know each other by a shared index.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

mod reading;

pub use reading::*;

use bytes::Bytes;
use cacheclip_chunk::{
    ByteSpan, ChunkKey, Codec, Container, Dtype, KvShape, LayoutId, Parts, Rank, encode, encode_with_ids,
};
use cacheclip_client::{Outcome, StoreClient};
use cacheclip_rpc::v1::cache_server::{Cache, CacheServer};
use cacheclip_rpc::v1::{self, KvFrame, MissReason, Segment, Tier, kv_frame, put_frame};
use cacheclip_service::{Running, Server};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

pub const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);
pub const SHAPE: KvShape = KvShape { layers: 4, kv_heads: 1, head_dim: 8 };

pub fn key(n: u8) -> ChunkKey {
    ChunkKey::from_bytes([n; 32])
}

pub fn layer(n: u8, layer: u32) -> Vec<u8> {
    vec![n ^ ((layer as u8) << 4); SHAPE.layer_bytes(5, Dtype::F32) as usize]
}

fn made(n: u8, ids: Option<&[u32]>) -> Container {
    let layers: Vec<_> = (0..SHAPE.layers).map(|it| layer(n, it)).collect();
    let parts = Parts {
        layout: LAYOUT,
        key: key(n),
        shape: SHAPE,
        tokens: 5,
        dtype: Dtype::F32,
        layers: layers.iter().map(Vec::as_slice).collect(),
        spans: Some(&[ByteSpan { start: 0, end: 3 }; 5]),
        rank: Some(Rank { version: 2, ranks: &[1, 2, 3, 4, 5] }),
    };
    let bytes = match ids {
        Some(ids) => encode_with_ids(&parts, ids, Codec::default()),
        None => encode(&parts, Codec::default()),
    };
    Container::parse(bytes.unwrap().into()).unwrap()
}

pub fn container(n: u8) -> Container {
    made(n, None)
}

pub fn with_ids(n: u8) -> Container {
    made(n, Some(&[10, 11, 12, 13, 14]))
}

/// What a store does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// Flips a bit of this chunk's layer 1.
    Flip(u32),
    /// Sends this chunk's layer 1 with a gap.
    Gap(u32),
    /// Sends another chunk's head for this chunk.
    WrongHead(u32),
    /// Says nothing more after layer 1.
    Stall,
    /// Breaks the stream off after layer 1, in so many calls.
    Drop(u32),
    /// Refuses so many calls.
    Refuse(u32),
    /// Says that it is there and answers nothing else.
    Deaf,
    /// Answers nothing at all, like a process that was stopped.
    Frozen,
}

/// What stores know of each other.
#[derive(Clone, Default)]
pub struct Index {
    pub peers: Arc<Mutex<Vec<v1::Node>>>,
    pub holders: Arc<Mutex<HashMap<Bytes, Vec<String>>>>,
}

impl Index {
    pub fn add(&self, n: u8, store: &str) {
        let key = Bytes::copy_from_slice(key(n).as_bytes());
        self.holders.lock().unwrap().entry(key).or_default().push(store.to_owned());
    }
}

#[derive(Clone, Default)]
pub struct Faulty {
    pub name: String,
    pub index: Index,
    pub fault: Arc<Mutex<Fault>>,
    pub draining: Arc<AtomicBool>,
    /// Calls but those of Members.
    pub calls: Arc<AtomicU32>,
    pub asked: Arc<Mutex<Vec<v1::GetLayersRequest>>>,
    pub held: Arc<Mutex<HashMap<Bytes, Bytes>>>,
    pub deletes: Arc<AtomicU32>,
    pub documents: Arc<Mutex<Documents>>,
    /// Deletions of documents.
    pub deletions: Arc<AtomicU64>,
    endpoint: Arc<OnceLock<String>>,
}

/// Which keys documents claim, and which deletion took a key.
#[derive(Default)]
pub struct Documents {
    pub claims: HashMap<Bytes, HashSet<Bytes>>,
    pub gone: HashMap<Bytes, u64>,
    /// What a document's deletion took, for when it is asked for again.
    receipts: HashMap<Bytes, (Vec<Bytes>, usize, u32)>,
}

impl Documents {
    fn claimed(&self, key: &Bytes) -> bool {
        self.claims.values().any(|keys| keys.contains(key))
    }
}

impl Faulty {
    /// What a store says of its deletions: never 0.
    fn generation(&self) -> u64 {
        self.deletions.load(Ordering::SeqCst) + 1
    }

    /// A store of its own with chunks 1 to 6.
    pub fn with(fault: Fault) -> Self {
        let store = Self::named("faulty", &Index::default());
        *store.fault.lock().unwrap() = fault;
        (1..=6).for_each(|n| store.hold(container(n)));
        store
    }

    /// A store without chunks that knows others.
    pub fn named(name: &str, index: &Index) -> Self {
        Self { name: name.to_owned(), index: index.clone(), ..Self::default() }
    }

    pub fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    pub fn hold(&self, container: Container) {
        let key = Bytes::copy_from_slice(container.head().key().as_bytes());
        self.held.lock().unwrap().insert(key, container.bytes().clone());
    }

    pub fn holds(&self, n: u8) -> bool {
        self.held.lock().unwrap().contains_key(&key(n).as_bytes()[..])
    }

    pub async fn serve_at(&self, listen: &str) -> Running {
        let routes = Routes::new(CacheServer::new(self.clone()));
        let options = cacheclip_service::Options { listen: listen.to_owned(), ..Default::default() };
        let running = Server::new("faulty", options).serve(routes, &["cacheclip.v1.Cache"]).await.unwrap();
        running.readiness().set(true, "");
        let endpoint = self.endpoint.get_or_init(|| running.endpoint()).clone();
        let node = v1::Node { name: self.name.clone(), endpoint, draining: false };
        let mut peers = self.index.peers.lock().unwrap();
        if !peers.contains(&node) {
            peers.push(node);
        }
        running
    }

    pub async fn start(&self) -> Running {
        self.serve_at("127.0.0.1:0").await
    }

    /// This store alone and a client of it.
    pub async fn serve(&self) -> (Running, StoreClient) {
        let running = self.start().await;
        let client = client(&[running.endpoint()]);
        (running, client)
    }

    async fn before(&self) -> Result<u32, Status> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let fault = *self.fault.lock().unwrap();
        match fault {
            Fault::Refuse(times) if call < times => Err(Status::unavailable("try again")),
            Fault::Deaf | Fault::Frozen => std::future::pending().await,
            _ => Ok(call),
        }
    }

    fn container(&self, key: &Bytes) -> Option<Container> {
        let bytes = self.held.lock().unwrap().get(key).cloned();
        bytes.map(|bytes| Container::parse(bytes).unwrap())
    }

    async fn send(
        self,
        call: u32,
        request: v1::GetLayersRequest,
        frames: mpsc::Sender<Result<KvFrame, Status>>,
    ) {
        let fault = *self.fault.lock().unwrap();
        let send = async |chunk: usize, frame: kv_frame::Frame| {
            let missing = matches!(frame, kv_frame::Frame::Missing(_));
            let frame = KvFrame {
                chunk: chunk as u32,
                frame: Some(frame),
                tier: Tier::StoreDisk.into(),
                generation: if missing { self.generation() } else { 0 },
            };
            let _ = frames.send(Ok(frame)).await;
        };
        let known: Vec<_> = request.keys.iter().map(|key| self.container(key)).collect();
        for (chunk, known) in known.iter().enumerate() {
            let Some(known) = known else {
                send(chunk, kv_frame::Frame::Missing(MissReason::NeverSeen.into())).await;
                continue;
            };
            let head = match fault {
                Fault::WrongHead(wrong) if wrong == chunk as u32 => container(99).head().bytes().clone(),
                _ => known.head().bytes().clone(),
            };
            send(chunk, kv_frame::Frame::Head(head)).await;
            for index in 4..known.head().segments().len() {
                let data = known.stored_segment(index).unwrap();
                send(chunk, kv_frame::Frame::Segment(Segment { index: index as u32, offset: 0, data })).await;
            }
        }
        for layer in request.first_layer..request.end_layer {
            for (chunk, known) in known.iter().enumerate() {
                let Some(known) = known else { continue };
                let stored = known.stored_segment(layer as usize).unwrap();
                let mut data = stored.to_vec();
                if layer == 1 && fault == Fault::Flip(chunk as u32) {
                    data[0] ^= 1;
                }
                let gap = u64::from(layer == 1 && fault == Fault::Gap(chunk as u32));
                // In two frames, so that there is something to put together.
                let tail = data.split_off(data.len() / 2);
                let offset = data.len() as u64 + gap;
                let first = Segment { index: layer, offset: 0, data: data.into() };
                send(chunk, kv_frame::Frame::Segment(first)).await;
                let second = Segment { index: layer, offset, data: tail.into() };
                send(chunk, kv_frame::Frame::Segment(second)).await;
            }
            match fault {
                Fault::Stall if layer == 1 => return frames.closed().await,
                Fault::Drop(times) if layer == 1 && call < times => {
                    let _ = frames.send(Err(Status::unavailable("going down"))).await;
                    return;
                }
                _ => {}
            }
        }
    }
}

#[tonic::async_trait]
impl Cache for Faulty {
    type GetLayersStream = ReceiverStream<Result<KvFrame, Status>>;
    type GetStream = ReceiverStream<Result<KvFrame, Status>>;

    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<v1::LookupResponse>, Status> {
        self.before().await?;
        let request = request.into_inner();
        let entry = |key: &Bytes| match self.container(key) {
            Some(container) => v1::Entry {
                found: true,
                container_hash: Bytes::copy_from_slice(container.hash().as_bytes()),
                bytes: container.bytes().len() as u64,
                tier: Tier::StoreRam.into(),
                ..Default::default()
            },
            None => {
                let holders = self.index.holders.lock().unwrap().get(key).cloned().unwrap_or_default();
                let nodes = if request.elsewhere { holders } else { Vec::new() };
                v1::Entry { reason: MissReason::NeverSeen.into(), nodes, ..Default::default() }
            }
        };
        let entries = request.keys.iter().map(entry).collect();
        Ok(Response::new(v1::LookupResponse { entries, generation: self.generation() }))
    }

    async fn get_layers(
        &self,
        request: Request<v1::GetLayersRequest>,
    ) -> Result<Response<Self::GetLayersStream>, Status> {
        let call = self.before().await?;
        let request = request.into_inner();
        self.asked.lock().unwrap().push(request.clone());
        let (frames, answer) = mpsc::channel(1);
        tokio::spawn(self.clone().send(call, request, frames));
        Ok(Response::new(ReceiverStream::new(answer)))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        self.before().await?;
        let held = self.held.lock().unwrap().get(&request.into_inner().key).cloned();
        let (frames, answer) = mpsc::channel(4);
        tokio::spawn(async move {
            let parts = match held {
                None => vec![kv_frame::Frame::Missing(MissReason::NeverSeen.into())],
                Some(bytes) => {
                    bytes.chunks(1000).map(|it| kv_frame::Frame::Data(bytes.slice_ref(it))).collect()
                }
            };
            for frame in parts {
                let frame = KvFrame { frame: Some(frame), ..KvFrame::default() };
                let _ = frames.send(Ok(frame)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(answer)))
    }

    async fn put(
        &self,
        request: Request<Streaming<v1::PutFrame>>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        self.before().await?;
        let mut frames = request.into_inner();
        let Some(put_frame::Frame::Head(head)) = frames.message().await?.and_then(|it| it.frame) else {
            return Err(Status::invalid_argument("head"));
        };
        let mut bytes = Vec::new();
        while let Some(v1::PutFrame { frame: Some(put_frame::Frame::Data(data)) }) = frames.message().await? {
            bytes.extend_from_slice(&data);
        }
        assert_eq!(head.bytes, bytes.len() as u64);
        {
            let mut documents = self.documents.lock().unwrap();
            let since = if head.generation == 0 { self.generation() } else { head.generation };
            if documents.gone.get(&head.key).is_some_and(|gone| *gone > since) {
                let outcome = Outcome::Deleted.into();
                return Ok(Response::new(v1::PutResponse { outcome, container_hash: Bytes::new() }));
            }
            if let Some(hold) = head.hold {
                documents.claims.entry(hold.document).or_default().insert(head.key.clone());
            }
        }
        let mut holders = self.index.holders.lock().unwrap();
        holders.entry(head.key.clone()).or_default().push(self.name.clone());
        self.held.lock().unwrap().insert(head.key, bytes.into());
        let outcome = Outcome::Stored.into();
        Ok(Response::new(v1::PutResponse { outcome, container_hash: Bytes::new() }))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        self.before().await?;
        self.deletes.fetch_add(1, Ordering::SeqCst);
        let mut held = self.held.lock().unwrap();
        let removed = request.into_inner().keys.iter().filter(|key| held.remove(*key).is_some()).count();
        Ok(Response::new(v1::DeleteResponse { objects: removed as u32, bytes: 7 * removed as u64 }))
    }

    async fn hold(&self, request: Request<v1::HoldRequest>) -> Result<Response<v1::HoldResponse>, Status> {
        self.before().await?;
        let v1::HoldRequest { keys, hold, .. } = request.into_inner();
        let mut documents = self.documents.lock().unwrap();
        documents.claims.entry(hold.unwrap().document).or_default().extend(keys);
        Ok(Response::new(v1::HoldResponse { generation: self.generation() }))
    }

    async fn delete_document(
        &self,
        request: Request<v1::DeleteDocumentRequest>,
    ) -> Result<Response<v1::DeleteDocumentResponse>, Status> {
        self.before().await?;
        let v1::DeleteDocumentRequest { document, keys } = request.into_inner();
        let mut documents = self.documents.lock().unwrap();
        let claimed = documents.claims.remove(&document).unwrap_or_default();
        let before = documents.receipts.remove(&document).filter(|_| claimed.is_empty());
        let (mut went, mut objects, mut kept) = before.unwrap_or_default();
        let generation = self.deletions.fetch_add(1, Ordering::SeqCst) + 2;
        let own = claimed.into_iter().map(|key| (key, 1));
        for (key, counted) in own.chain(keys.into_iter().map(|key| (key, 0))) {
            if documents.claimed(&key) {
                kept += counted;
            } else if !went.contains(&key) {
                objects += usize::from(self.held.lock().unwrap().remove(&key).is_some());
                documents.gone.insert(key.clone(), generation);
                went.push(key);
            }
        }
        documents.receipts.insert(document, (went.clone(), objects, kept));
        let tiers = vec![v1::TierDeletion::of(Tier::StoreDisk, objects, 7 * objects as u64)];
        Ok(Response::new(v1::DeleteDocumentResponse { generation, tiers, keys: went, kept }))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Result<Response<v1::PinResponse>, Status> {
        self.before().await?;
        let held = self.held.lock().unwrap();
        let keys = request.into_inner().keys.iter().filter(|key| held.contains_key(*key)).count() as u32;
        Ok(Response::new(v1::PinResponse { keys }))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Result<Response<v1::PinResponse>, Status> {
        let v1::UnpinRequest { layout, keys } = request.into_inner();
        self.pin(Request::new(v1::PinRequest { layout, keys, seconds: 0 })).await
    }

    async fn stat(&self, _: Request<v1::StatRequest>) -> Result<Response<v1::StatResponse>, Status> {
        Ok(Response::new(v1::StatResponse::default()))
    }

    async fn members(&self, _: Request<v1::MembersRequest>) -> Result<Response<v1::MembersResponse>, Status> {
        let fault = *self.fault.lock().unwrap();
        if fault == Fault::Frozen {
            std::future::pending::<()>().await;
        }
        let node = v1::Node {
            name: self.name.clone(),
            endpoint: self.endpoint.get().cloned().unwrap_or_default(),
            draining: self.draining.load(Ordering::SeqCst),
        };
        let peers =
            self.index.peers.lock().unwrap().iter().filter(|it| it.name != self.name).cloned().collect();
        Ok(Response::new(v1::MembersResponse { node: Some(node), peers, ..Default::default() }))
    }
}
