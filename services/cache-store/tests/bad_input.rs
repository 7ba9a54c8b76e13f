//! Mistakes and malice of clients, over a real socket: each gets a status that names the field, leaves nothing behind,
//! and harms nobody else. What a put must match is in `store.rs`.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;
#[path = "index/process.rs"]
#[allow(dead_code, reason = "others ask a process for more")]
mod process;

use bytes::Bytes;
use cacheclip_cache_store::Options;
use cacheclip_chunk::container::head::{ENTRY_LEN, HEADER_LEN};
use cacheclip_chunk::{Codec, Container, Dtype, Head, KvShape, Parts, encode};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::status::invalid_field;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_rpc::v1::{GetRequest, KvFrame, PutFrame, PutHead, kv_frame, put_frame};
use cacheclip_service::{ConnectOptions, connect};
use common::{Calls, LAYOUT, SHAPE, TestStore, bytes_on_disk, container, key, options};
use futures::future::join_all;
use process::Process;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status, Streaming};

/// Waits for a condition, with a deadline that a busy machine keeps too.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Writes the head's check anew: the bytes lie, and are not merely damaged.
fn rechecked(mut bytes: Vec<u8>) -> Bytes {
    let len = Head::len_from_prefix(&bytes).unwrap();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..112]).update(&bytes[HEADER_LEN..len]);
    bytes[112..128].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    bytes.into()
}

fn head_frame(n: u32, bytes: u64) -> PutFrame {
    let (layout, key) = (id_bytes(LAYOUT.as_bytes()), id_bytes(key(n).as_bytes()));
    let head = PutHead { layout, key, bytes, ..PutHead::default() };
    PutFrame { frame: Some(put_frame::Frame::Head(head)) }
}

fn data_frame(data: Bytes) -> PutFrame {
    PutFrame { frame: Some(put_frame::Frame::Data(data)) }
}

async fn put_frames(store: &TestStore, frames: Vec<PutFrame>) -> Result<Outcome, Status> {
    let answer = store.client().put(futures::stream::iter(frames)).await;
    answer.map(|answer| answer.into_inner().outcome())
}

fn refused(status: &Status, field: &str, case: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{case}: {status}");
    assert_eq!(invalid_field(status).as_deref(), Some(field), "{case}: {status}");
    let (_, why) = status.message().split_once(": ").unwrap();
    assert!(!why.is_empty(), "{case}: {status}");
}

/// Nothing is left of refused input, and what was there is served.
async fn untouched(store: &TestStore, good: u32) {
    let temporary = store.data.join("temporary");
    until("temporary files are gone", async || std::fs::read_dir(&temporary).unwrap().next().is_none()).await;
    let used = async || store.stat().await.disk_used_bytes;
    until("reserved bytes are given back", async || used().await == bytes_on_disk(&store.data)).await;
    assert_eq!(store.get(good).await.unwrap(), container(good, 20));
}

#[tokio::test]
async fn a_head_that_lies_is_refused_before_anything_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(9, 20)).await;
    let good = container(1, 20);
    let head = Head::parse(&good).unwrap();
    let entry = |index: usize, at: usize| HEADER_LEN + index * ENTRY_LEN + at;
    let (layer, spans) = (head.segments()[0], SHAPE.layers as usize);
    assert!(head.segments()[spans].stored_len < head.segments()[spans].raw_len, "spans are compressed");
    let long = |word: u64| word.to_le_bytes().to_vec();
    let cases = [
        ("digest of a segment", entry(0, 32), vec![!layer.digest[0]]),
        ("an unknown codec", entry(0, 2), vec![9]),
        ("a codec that does not compress", entry(0, 2), vec![1]),
        ("an unknown kind of segment", entry(0, 0), vec![77]),
        ("a layer twice", entry(1, 4), vec![0]),
        ("offset", entry(1, 8), long(head.segments()[1].offset + 4096)),
        ("stored length", entry(0, 16), long(layer.stored_len - 1)),
        ("stored length without end", entry(0, 16), long(u64::MAX)),
        ("raw length", entry(spans, 24), long(head.segments()[spans].raw_len + 8)),
        ("raw length without end", entry(spans, 24), long(u64::MAX)),
        ("format version", 8, vec![2]),
        ("dtype", 14, vec![9]),
        ("segment count", 20, vec![6]),
        ("layers", 24, vec![2]),
        ("heads", 28, vec![3]),
        ("tokens", 36, vec![21]),
        ("a shape beyond all limits", 24, vec![0xff; 16]),
        (
            "a shape of a terabyte",
            28,
            [1024u32, 1024, 1 << 20].iter().flat_map(|it| it.to_le_bytes()).collect(),
        ),
        ("length of the container", 40, long(good.len() as u64 + 1)),
    ];
    for (case, at, bytes) in cases {
        let mut lie = good.to_vec();
        lie[at..at + bytes.len()].copy_from_slice(&bytes);
        // A head of another length has no check to write.
        let lie = if Head::len_from_prefix(&lie).is_ok() { rechecked(lie) } else { lie.into() };
        let status = store.try_put(LAYOUT, key(1), lie.len() as u64, lie).await.unwrap_err();
        refused(&status, "data", case);
    }
    // The digest is right, and what it is right about makes no sense.
    for (case, index, at) in [("no zstd frame", spans, 0), ("a zstd frame that is cut", spans, 12)] {
        let mut lie = good.to_vec();
        let segment = head.segments()[index];
        let (start, end) = (segment.offset as usize, (segment.offset + segment.stored_len) as usize);
        lie[start + at..end].fill(0);
        let digest = blake3::hash(&lie[start..end]);
        lie[entry(index, 32)..entry(index, 64)].copy_from_slice(digest.as_bytes());
        let status = store.try_put(LAYOUT, key(1), good.len() as u64, rechecked(lie)).await.unwrap_err();
        refused(&status, "data", case);
    }
    untouched(&store, 9).await;
    assert_eq!(store.put(good).await, Outcome::Stored, "the key is free");
}

#[tokio::test]
async fn frames_in_another_order_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(9, 20)).await;
    let good = container(1, 20);
    let data = |range: std::ops::Range<usize>| data_frame(good.slice(range));
    let (head, len) = (|| head_frame(1, good.len() as u64), good.len());
    let cases = [
        ("nothing at all", "head", vec![]),
        ("an empty frame first", "head", vec![PutFrame { frame: None }, head()]),
        ("data before the head", "head", vec![data(0..len), head()]),
        ("two heads", "frame", vec![head(), head(), data(0..len)]),
        ("a second head between data", "frame", vec![head(), data(0..5000), head(), data(5000..len)]),
        ("a second head at the end", "frame", vec![head(), data(0..len), head()]),
        ("an empty frame between data", "frame", vec![head(), data(0..5000), PutFrame { frame: None }]),
        (
            "segments that changed places",
            "data",
            vec![head(), data(0..4096), data(8192..len), data(4096..8192)],
        ),
        ("the end before the beginning", "data", vec![head(), data(4096..len), data(0..4096)]),
        ("a frame twice", "data", vec![head(), data(0..5000), data(0..5000), data(5000..len)]),
        ("a frame that is missing", "data", vec![head(), data(0..5000), data(6000..len)]),
    ];
    for (case, field, frames) in cases {
        let status = put_frames(&store, frames).await.unwrap_err();
        refused(&status, field, case);
    }
    untouched(&store, 9).await;
    assert_eq!(put_frames(&store, vec![head(), data(0..0), data(0..len)]).await.unwrap(), Outcome::Stored);
}

/// A put that its test feeds.
struct UnderWay {
    frames: mpsc::Sender<PutFrame>,
    answer: tokio::task::JoinHandle<Result<Outcome, Status>>,
}

impl UnderWay {
    /// The announcement and the first bytes are with the store, which keeps them in a file.
    async fn start(store: &TestStore, n: u32, bytes: &Bytes) -> Self {
        let temporary = store.data.join("temporary");
        let files = || std::fs::read_dir(&temporary).unwrap().count();
        let before = files();
        let (frames, stream) = mpsc::channel(1);
        let mut client = store.client();
        let answer = tokio::spawn(async move {
            client.put(ReceiverStream::new(stream)).await.map(|answer| answer.into_inner().outcome())
        });
        frames.send(head_frame(n, bytes.len() as u64)).await.unwrap();
        frames.send(data_frame(bytes.slice(..5000))).await.unwrap();
        until("the store writes", async || files() > before).await;
        Self { frames, answer }
    }

    async fn finish(self, rest: Bytes) -> Result<Outcome, Status> {
        // A store that refuses does not take it.
        let _ = self.frames.send(data_frame(rest)).await;
        drop(self.frames);
        self.answer.await.unwrap()
    }
}

#[tokio::test]
async fn a_writer_that_goes_away_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(9, 20)).await;
    let bytes = container(1, 20);
    let gone = UnderWay::start(&store, 1, &bytes).await;
    gone.answer.abort();
    drop(gone.frames);
    untouched(&store, 9).await;
    assert_eq!(store.put(bytes).await, Outcome::Stored);
}

#[tokio::test]
async fn a_writer_that_brings_nothing_more_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    // One at a time: who comes next would wait for ever.
    let options = Options { stall_seconds: 1.0, concurrent_puts: 1, ..options(dir.path()) };
    let store = TestStore::start(options).await;
    store.put(container(9, 20)).await;
    let bytes = container(1, 20);
    let stalled = UnderWay::start(&store, 1, &bytes).await;
    let status = stalled.answer.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("put again"), "{status}");
    untouched(&store, 9).await;
    assert_eq!(store.put(bytes).await, Outcome::Stored);
    drop(stalled.frames);
}

#[tokio::test]
async fn of_writers_of_one_key_one_wins_and_the_others_hear_who() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(9, 20)).await;
    // Honest writers that differ.
    let versions = [container(1, 20), container(1, 21), container(1, 22)];
    let mut under_way = Vec::new();
    for bytes in &versions {
        under_way.push(UnderWay::start(&store, 1, bytes).await);
    }
    let finishing = under_way.into_iter().zip(&versions).map(|(put, bytes)| put.finish(bytes.slice(5000..)));
    let outcomes: Vec<Outcome> = join_all(finishing).await.into_iter().map(Result::unwrap).collect();
    let winners: Vec<usize> = (0..3).filter(|at| outcomes[*at] == Outcome::Stored).collect();
    assert_eq!(winners.len(), 1, "{outcomes:?}");
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Existed).count(), 2, "{outcomes:?}");
    let winner = &versions[winners[0]];
    assert_eq!(store.get(1).await.unwrap(), winner);
    let again = store.try_put(LAYOUT, key(1), winner.len() as u64, winner.clone()).await.unwrap();
    assert_eq!(again.container_hash[..], Container::parse(winner.clone()).unwrap().hash().as_bytes()[..]);
    untouched(&store, 9).await;
}

#[tokio::test]
async fn a_writer_of_garbage_does_not_hinder_another_one_of_the_same_key() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(9, 20)).await;
    let good = container(1, 20);
    let bad = UnderWay::start(&store, 1, &good).await;
    assert_eq!(store.put(good.clone()).await, Outcome::Stored);
    let status = bad.finish(vec![7; good.len() - 5000].into()).await.unwrap_err();
    refused(&status, "data", "garbage behind a sound beginning");
    assert_eq!(store.get(1).await.unwrap(), good);
    untouched(&store, 9).await;
}

/// 64 MiB in 128 layers.
fn large(n: u32) -> Bytes {
    let shape = KvShape { layers: 128, kv_heads: 8, head_dim: 64 };
    let layer = vec![n as u8; shape.layer_bytes(256, Dtype::F16) as usize];
    let parts = Parts {
        layout: LAYOUT,
        key: key(n),
        shape,
        tokens: 256,
        dtype: Dtype::F16,
        layers: vec![&layer; 128],
        spans: None,
        rank: None,
    };
    encode(&parts, Codec::Raw).unwrap().into()
}

/// Asks for an object and takes the first frame of it.
async fn begin(store: &Process, n: u32) -> (Streaming<KvFrame>, usize) {
    let request = GetRequest { layout: id_bytes(LAYOUT.as_bytes()), key: id_bytes(key(n).as_bytes()) };
    // A connection of its own: the others' windows are full.
    let channel = connect(&store.endpoint, &ConnectOptions::default()).unwrap();
    let mut frames = CacheClient::new(channel).get(request).await.map(Response::into_inner).unwrap();
    let first = frames.message().await.unwrap().unwrap();
    let taken = taken(&first);
    (frames, taken)
}

fn taken(frame: &KvFrame) -> usize {
    match &frame.frame {
        Some(kv_frame::Frame::Data(data)) => data.len(),
        other => panic!("not a part of a container: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_takes_nothing_is_given_up_and_holds_little_until_then() {
    const READERS: usize = 4;
    const WAVES: usize = 6;
    /// What the readers of one wave may hold: 8 MiB that fit into the connection's window, frames that wait and
    /// segments ahead of half a MiB each, and some room. All of the object would be 64 MiB for each.
    const MOST: u64 = READERS as u64 * (20 << 20);
    let dir = tempfile::tempdir().unwrap();
    let settings = ["stall_seconds=1.0", "ram_bytes=1000000", "disk_bytes=200000000"].map(str::to_owned);
    let store = Process::start(dir.path(), "stalled", &settings);
    let bytes = large(1);
    let frames = bytes.chunks(256 << 10).map(|data| data_frame(bytes.slice_ref(data)));
    let frames: Vec<_> = std::iter::once(head_frame(1, bytes.len() as u64)).chain(frames).collect();
    let put = store.client().put(futures::stream::iter(frames)).await.unwrap().into_inner();
    assert_eq!(put.outcome(), Outcome::Stored);
    store.put(container(9, 20)).await;

    // Before the first read ends there is no such series.
    let given_up = || -> usize {
        let text = store.http("/metrics");
        let count = text.lines().find_map(|line| line.strip_prefix("cacheclip_store_get_seconds_count "));
        count.map_or(0, |count| count.parse().unwrap())
    };
    let before = store.peak_memory();
    let ended = given_up();
    let mut readers = Vec::new();
    for wave in 1..=WAVES {
        for _ in 0..READERS {
            readers.push(begin(&store, 1).await);
        }
        until("all readers are given up", async || given_up() >= ended + wave * READERS).await;
        let held = store.peak_memory() - before;
        // Earlier waves are connected still, and hold next to nothing.
        assert!(held <= MOST, "{} MiB are held in wave {wave}", held >> 20);
    }
    for (mut frames, mut all) in readers {
        let ended = loop {
            match frames.message().await {
                Ok(Some(frame)) => all += taken(&frame),
                ended => break ended,
            }
        };
        let status = ended.expect_err("whoever comes back hears of it");
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert!(all < bytes.len());
    }
    assert_eq!(store.get(9).await.unwrap(), container(9, 20), "others are served");
    let (mut frames, mut all) = begin(&store, 1).await;
    while let Some(frame) = frames.message().await.unwrap() {
        all += taken(&frame);
    }
    assert_eq!(all, bytes.len(), "a reader that reads gets all of it");
    assert!(swept(dir.path()));
}

fn swept(data: &Path) -> bool {
    std::fs::read_dir(data.join("temporary")).unwrap().next().is_none()
}
