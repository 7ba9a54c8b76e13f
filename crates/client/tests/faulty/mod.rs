//! A store on a real port that goes wrong in one chosen way.
#![allow(unreachable_pub, reason = "shared by test files")]

use bytes::Bytes;
use cacheclip_chunk::{ByteSpan, ChunkKey, Codec, Container, Dtype, KvShape, LayoutId, Parts, Rank, encode};
use cacheclip_client::{Options, Outcome, StoreClient};
use cacheclip_rpc::v1::cache_server::{Cache, CacheServer};
use cacheclip_rpc::v1::{self, KvFrame, MissReason, Segment, Tier, kv_frame, put_frame};
use cacheclip_service::{ConnectOptions, Running, Server};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
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

pub fn container(n: u8) -> Container {
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
    Container::parse(encode(&parts, Codec::default()).unwrap().into()).unwrap()
}

/// What the store does wrong.
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
    /// Never answers.
    Deaf,
}

#[derive(Clone, Default)]
pub struct Faulty {
    fault: Fault,
    pub calls: Arc<AtomicU32>,
    pub asked: Arc<Mutex<Vec<v1::GetLayersRequest>>>,
    pub put: Arc<Mutex<HashMap<Bytes, Bytes>>>,
}

impl Faulty {
    pub fn with(fault: Fault) -> Self {
        Self { fault, ..Self::default() }
    }

    pub async fn serve(&self) -> (Running, StoreClient) {
        let routes = Routes::new(CacheServer::new(self.clone()));
        let server = Server::new("faulty", cacheclip_service::Options::default());
        let running = server.serve(routes, &["cacheclip.v1.Cache"]).await.unwrap();
        running.readiness().set(true, "");
        let client = StoreClient::connect(&running.endpoint(), &ConnectOptions::default()).unwrap();
        let patience = Options { silence_seconds: 0.5, call_timeout_seconds: 0.5, ..Options::default() };
        (running, client.with_options(patience))
    }

    async fn before(&self) -> Result<u32, Status> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::Refuse(times) if call < times => Err(Status::unavailable("try again")),
            Fault::Deaf => std::future::pending().await,
            _ => Ok(call),
        }
    }

    async fn send(
        self,
        call: u32,
        request: v1::GetLayersRequest,
        frames: mpsc::Sender<Result<KvFrame, Status>>,
    ) {
        let send = async |chunk: usize, frame: kv_frame::Frame| {
            let frame = KvFrame { chunk: chunk as u32, frame: Some(frame), tier: Tier::StoreDisk.into() };
            let _ = frames.send(Ok(frame)).await;
        };
        let known: Vec<_> = request.keys.iter().map(|key| key[0]).collect();
        for (chunk, n) in known.iter().enumerate() {
            let container = container(*n + u8::from(self.fault == Fault::WrongHead(chunk as u32)));
            send(chunk, kv_frame::Frame::Head(container.head().bytes().clone())).await;
            for index in [4, 5] {
                let data = container.stored_segment(index).unwrap();
                send(chunk, kv_frame::Frame::Segment(Segment { index: index as u32, offset: 0, data })).await;
            }
        }
        for layer in request.first_layer..request.end_layer {
            for (chunk, n) in known.iter().enumerate() {
                let stored = container(*n).stored_segment(layer as usize).unwrap();
                let mut data = stored.to_vec();
                if layer == 1 && self.fault == Fault::Flip(chunk as u32) {
                    data[0] ^= 1;
                }
                let gap = u64::from(layer == 1 && self.fault == Fault::Gap(chunk as u32));
                // In two frames, so that there is something to put together.
                let tail = data.split_off(data.len() / 2);
                let offset = data.len() as u64 + gap;
                let first = Segment { index: layer, offset: 0, data: data.into() };
                send(chunk, kv_frame::Frame::Segment(first)).await;
                let second = Segment { index: layer, offset, data: tail.into() };
                send(chunk, kv_frame::Frame::Segment(second)).await;
            }
            match self.fault {
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
        let hash = Bytes::copy_from_slice(container(1).hash().as_bytes());
        let tier = Tier::StoreRam.into();
        let found = v1::Entry { found: true, container_hash: hash, bytes: 9, tier, reason: 0 };
        let absent = v1::Entry { reason: MissReason::Evicted.into(), ..Default::default() };
        let entry = |key: Bytes| if key[0] == 1 { found.clone() } else { absent.clone() };
        let entries = request.into_inner().keys.into_iter().map(entry).collect();
        Ok(Response::new(v1::LookupResponse { entries }))
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

    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        Err(Status::unimplemented("not asked for here"))
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
        self.put.lock().unwrap().insert(head.key, bytes.into());
        let outcome = Outcome::Stored.into();
        Ok(Response::new(v1::PutResponse { outcome, container_hash: Bytes::new() }))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        self.before().await?;
        let objects = request.into_inner().keys.len() as u32;
        Ok(Response::new(v1::DeleteResponse { objects, bytes: 7 }))
    }

    async fn stat(&self, _: Request<v1::StatRequest>) -> Result<Response<v1::StatResponse>, Status> {
        Ok(Response::new(v1::StatResponse::default()))
    }
}
