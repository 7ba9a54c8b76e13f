//! A store on a real port with real files, and containers to put into it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use bytes::Bytes;
use cacheclip_cache_store::Options;
use cacheclip_chunk::{ByteSpan, ChunkKey, Codec, Dtype, Head, KvShape, LayoutId, Parts, Rank, encode};
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_rpc::v1::{
    DeleteRequest, DeleteResponse, Entry, GetLayersRequest, GetRequest, KvFrame, LookupRequest,
    MembersRequest, MembersResponse, MissReason, PutFrame, PutHead, PutResponse, StatRequest, StatResponse,
    Tier, kv_frame, put_frame,
};
use cacheclip_service::{ConnectOptions, Running, connect};
use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use tonic::Status;
use tonic::transport::Channel;

pub const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);
pub const SHAPE: KvShape = KvShape { layers: 3, kv_heads: 2, head_dim: 8 };

pub fn key(n: u32) -> ChunkKey {
    let mut bytes = [0xee; 32];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    ChunkKey::from_bytes(bytes)
}

/// A layer's bytes: different for every chunk and layer, too mixed to shrink.
pub fn layer(n: u32, layer: u32, tokens: u32) -> Vec<u8> {
    let mut state = n.wrapping_mul(7919) ^ layer.wrapping_mul(104_729) ^ 0x9e37;
    let len = SHAPE.layer_bytes(tokens, Dtype::F16) as usize;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(len)
    .collect()
}

pub fn container(n: u32, tokens: u32) -> Bytes {
    let layers: Vec<_> = (0..SHAPE.layers).map(|it| layer(n, it, tokens)).collect();
    let spans: Vec<_> = (0..tokens).map(|at| ByteSpan { start: at, end: at + 1 }).collect();
    let parts = Parts {
        layout: LAYOUT,
        key: key(n),
        shape: SHAPE,
        tokens,
        dtype: Dtype::F16,
        layers: layers.iter().map(Vec::as_slice).collect(),
        spans: Some(&spans),
        rank: Some(Rank { version: 1, ranks: &vec![5; tokens as usize] }),
    };
    encode(&parts, Codec::COMPRESSED).unwrap().into()
}

pub fn options(dir: &Path) -> Options {
    Options { data_dir: dir.join("data"), disk_bytes: 1 << 20, ram_bytes: 1 << 20, ..Options::default() }
}

pub struct TestStore {
    pub running: Running,
    pub client: CacheClient<Channel>,
    pub data: PathBuf,
}

impl TestStore {
    pub async fn start(options: Options) -> Self {
        let data = options.data_dir.clone();
        let running = cacheclip_cache_store::start(options).await.unwrap();
        let channel = connect(&running.endpoint(), &ConnectOptions::default()).unwrap();
        Self { running, client: CacheClient::new(channel), data }
    }

    pub async fn restart(self, options: Options) -> Self {
        drop(self.client);
        self.running.drain().await;
        Self::start(options).await
    }

    pub fn file(&self, n: u32) -> PathBuf {
        let name = key(n).to_string();
        self.data.join("objects").join(&name[..2]).join(format!("{name}.kv"))
    }
}

/// Calls of a store, wherever it runs.
pub trait Calls {
    fn client(&self) -> CacheClient<Channel>;

    async fn put(&self, bytes: Bytes) -> Outcome {
        let head = Head::parse(&bytes).unwrap();
        self.try_put(head.layout(), head.key(), bytes.len() as u64, bytes).await.unwrap().outcome()
    }

    async fn try_put(
        &self,
        layout: LayoutId,
        key: ChunkKey,
        announced: u64,
        bytes: Bytes,
    ) -> Result<PutResponse, Status> {
        let head = PutHead {
            layout: Bytes::copy_from_slice(layout.as_bytes()),
            key: Bytes::copy_from_slice(key.as_bytes()),
            bytes: announced,
            ..PutHead::default()
        };
        self.put_under(head, bytes).await
    }

    async fn put_under(&self, head: PutHead, bytes: Bytes) -> Result<PutResponse, Status> {
        // Small frames, so that heads and segments are cut in the middle.
        let data: Vec<_> =
            bytes.chunks(1000).map(|data| bytes.slice_ref(data)).map(put_frame::Frame::Data).collect();
        let frames = std::iter::once(put_frame::Frame::Head(head)).chain(data);
        let frames: Vec<_> = frames.map(|frame| PutFrame { frame: Some(frame) }).collect();
        Ok(self.client().put(futures::stream::iter(frames)).await?.into_inner())
    }

    async fn lookup(&self, layout: LayoutId, keys: &[ChunkKey]) -> Vec<Entry> {
        self.look(layout, keys, false).await
    }

    /// Also asks who else has what is not here.
    async fn lookup_elsewhere(&self, layout: LayoutId, keys: &[ChunkKey]) -> Vec<Entry> {
        self.look(layout, keys, true).await
    }

    async fn look(&self, layout: LayoutId, keys: &[ChunkKey], elsewhere: bool) -> Vec<Entry> {
        let layout = Bytes::copy_from_slice(layout.as_bytes());
        let request = LookupRequest { layout, keys: bytes_of(keys), elsewhere };
        self.client().lookup(request).await.unwrap().into_inner().entries
    }

    async fn members(&self) -> MembersResponse {
        self.client().members(MembersRequest {}).await.unwrap().into_inner()
    }

    async fn reason(&self, n: u32) -> MissReason {
        let entries = self.lookup(LAYOUT, &[key(n)]).await;
        assert!(!entries[0].found);
        entries[0].reason()
    }

    async fn delete(&self, layout: LayoutId, keys: &[ChunkKey]) -> DeleteResponse {
        let request =
            DeleteRequest { layout: Bytes::copy_from_slice(layout.as_bytes()), keys: bytes_of(keys) };
        self.client().delete(request).await.unwrap().into_inner()
    }

    async fn get(&self, n: u32) -> Result<Bytes, MissReason> {
        let request = GetRequest {
            layout: Bytes::copy_from_slice(LAYOUT.as_bytes()),
            key: Bytes::copy_from_slice(key(n).as_bytes()),
        };
        let mut frames = self.client().get(request).await.unwrap().into_inner();
        let mut bytes = Vec::new();
        while let Some(frame) = frames.message().await.unwrap() {
            match frame.frame.unwrap() {
                kv_frame::Frame::Data(data) => bytes.extend_from_slice(&data),
                kv_frame::Frame::Missing(reason) => return Err(reason.try_into().unwrap()),
                other => panic!("not a part of a container: {other:?}"),
            }
        }
        Ok(bytes.into())
    }

    async fn get_layers(&self, layout: LayoutId, keys: &[ChunkKey], first: u32, end: u32) -> Vec<KvFrame> {
        let request = GetLayersRequest {
            layout: Bytes::copy_from_slice(layout.as_bytes()),
            keys: bytes_of(keys),
            first_layer: first,
            end_layer: end,
        };
        let mut frames = self.client().get_layers(request).await.unwrap().into_inner();
        let mut all = Vec::new();
        while let Some(frame) = frames.message().await.unwrap() {
            all.push(frame);
        }
        all
    }

    async fn stat(&self) -> StatResponse {
        self.client().stat(StatRequest {}).await.unwrap().into_inner()
    }
}

impl Calls for TestStore {
    fn client(&self) -> CacheClient<Channel> {
        self.client.clone()
    }
}

fn bytes_of(keys: &[ChunkKey]) -> Vec<Bytes> {
    keys.iter().map(|key| Bytes::copy_from_slice(key.as_bytes())).collect()
}

/// What the frames of a read brought, per chunk.
#[derive(Debug, Default)]
pub struct Arrived {
    pub tier: Tier,
    /// Decoded segments by index.
    pub segments: BTreeMap<usize, Vec<u8>>,
    pub missing: Option<MissReason>,
}

/// Puts frames together the way a reader must, checking their order.
pub fn assemble(frames: &[KvFrame], chunks: usize) -> Vec<Arrived> {
    let mut heads: Vec<Option<Head>> = vec![None; chunks];
    let mut stored: Vec<BTreeMap<usize, Vec<u8>>> = vec![BTreeMap::new(); chunks];
    let mut arrived: Vec<Arrived> = (0..chunks).map(|_| Arrived::default()).collect();
    for frame in frames {
        let chunk = frame.chunk as usize;
        assert!(arrived[chunk].missing.is_none(), "nothing follows a missing chunk");
        match frame.frame.as_ref().unwrap() {
            kv_frame::Frame::Head(head) => {
                heads[chunk] = Some(Head::parse(head).unwrap());
                arrived[chunk].tier = frame.tier();
            }
            kv_frame::Frame::Segment(segment) => {
                assert!(heads[chunk].is_some(), "the head comes first");
                let bytes = stored[chunk].entry(segment.index as usize).or_default();
                assert_eq!(bytes.len() as u64, segment.offset);
                bytes.extend_from_slice(&segment.data);
            }
            kv_frame::Frame::Missing(reason) => {
                arrived[chunk].missing = Some((*reason).try_into().unwrap());
            }
            kv_frame::Frame::Data(_) => panic!("layers were asked for"),
        }
    }
    for (chunk, segments) in stored.into_iter().enumerate() {
        let Some(head) = &heads[chunk] else { continue };
        if arrived[chunk].missing.is_none() {
            arrived[chunk].segments = segments
                .into_iter()
                .map(|(index, bytes)| (index, head.decode_segment(index, &bytes).unwrap()))
                .collect();
        }
    }
    arrived
}

/// Bytes of all files of containers, wherever they are.
pub fn bytes_on_disk(data: &Path) -> u64 {
    fn find(folder: &Path, found: &mut HashMap<u64, u64>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => find(&entry.path(), found),
                // By inode: what the scrubber moves to quarantine meanwhile is there once.
                Ok(metadata) => drop(found.insert(metadata.ino(), metadata.len())),
                Err(_) => {}
            }
        }
    }
    let mut found = HashMap::new();
    ["objects", "temporary", "quarantine"].iter().for_each(|folder| find(&data.join(folder), &mut found));
    found.values().sum()
}
