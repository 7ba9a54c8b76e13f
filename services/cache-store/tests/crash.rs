//! A store that is killed under load loses nothing that it acknowledged and serves nothing that is not what was put.
//!
//! One real process on one directory, again and again: writers, deleters and readers over real sockets, SIGKILL behind
//! a number of steps that the seed draws, a new process, and a look at every object there has ever been.
//!
//! `CRASHES=200 cargo test --release --workspace --test crash` kills 200 times; `CRASH_SEED` draws
//! other points.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;
#[path = "common/dice.rs"]
mod dice;
#[path = "index/process.rs"]
#[allow(dead_code, reason = "others ask a process for more")]
mod process;

use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, Codec, Container, Dtype, KvShape, LayoutId, Parts, encode};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_rpc::v1::{
    DeleteRequest, GetLayersRequest, GetRequest, MissReason, PutFrame, PutHead, kv_frame, put_frame,
};
use common::{Arrived, Calls, assemble, bytes_on_disk};
use dice::Dice;
use futures::StreamExt as _;
use futures::future::join_all;
use process::Process;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

const LAYOUT: LayoutId = LayoutId::from_bytes([3; 32]);
const WRITERS: u32 = 5;
const READERS: u32 = 3;
/// Rounds that the suite does.
const ROUNDS: u64 = 20;
/// Steps behind which a store is killed, at most: starts and ends of operations, and frames sent.
const STEPS: u64 = 1500;
/// Objects that live on from round to round.
const KEPT: usize = 60;
const FRAME: usize = 16 << 10;
/// No call takes this long unless the store hangs.
const DEADLINE: Duration = Duration::from_secs(60);

fn key(n: u64) -> ChunkKey {
    let mut dice = Dice(n);
    let mut bytes: [u8; 32] = std::array::from_fn(|_| dice.below(256) as u8);
    bytes[24..].copy_from_slice(&n.to_le_bytes());
    ChunkKey::from_bytes(bytes)
}

/// An object of 5 to 300 KiB that its number alone determines.
fn container(n: u64) -> Bytes {
    let mut dice = Dice(n ^ 0xc0_ffee);
    let shape = KvShape { layers: 1 + dice.below(4) as u32, kv_heads: 2, head_dim: 32 };
    // Most are small, some are large.
    let tokens = 1 + [dice.below(8), dice.below(60), dice.below(280)][dice.below(3) as usize] as u32;
    // Half of them are stored compressed.
    let values = [256, 4][dice.below(2) as usize];
    let len = shape.layer_bytes(tokens, Dtype::F16) as usize;
    let layers: Vec<Vec<u8>> = (0..shape.layers)
        .map(|_| std::iter::repeat_with(|| dice.below(values) as u8).take(len).collect())
        .collect();
    let parts = Parts {
        layout: LAYOUT,
        key: key(n),
        shape,
        tokens,
        dtype: Dtype::F16,
        layers: layers.iter().map(Vec::as_slice).collect(),
        spans: None,
        rank: None,
    };
    encode(&parts, Codec::COMPRESSED).unwrap().into()
}

/// What a client knows of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A put began and was not acknowledged, or a deletion was not.
    Either,
    /// The put was acknowledged.
    There,
    /// The deletion was acknowledged.
    Gone,
}

#[derive(Clone, Debug)]
struct Object {
    bytes: Bytes,
    state: State,
    /// Counts changes of the state: a reader that saw one cannot judge.
    changes: u64,
}

/// What was found, over all rounds.
#[derive(Debug, Default)]
struct Found {
    puts: u64,
    deletions: u64,
    reads: u64,
    lost: Vec<String>,
    corrupt: Vec<String>,
    returned: Vec<String>,
}

/// The clients' memory, which outlives the store.
#[derive(Debug, Default)]
struct Memory {
    objects: Mutex<BTreeMap<u64, Object>>,
    found: Mutex<Found>,
}

impl Memory {
    fn object(&self, n: u64) -> Object {
        self.objects.lock().unwrap()[&n].clone()
    }

    fn becomes(&self, n: u64, state: State) {
        let mut objects = self.objects.lock().unwrap();
        let object = objects.get_mut(&n).unwrap();
        object.state = state;
        object.changes += 1;
    }

    fn numbers(&self, state: State) -> Vec<u64> {
        let objects = self.objects.lock().unwrap();
        objects.iter().filter(|(_, object)| object.state == state).map(|(n, _)| *n).collect()
    }

    /// Judges a read by what was known before and is known after it.
    fn judge(&self, n: u64, before: &Object, read: Result<Vec<u8>, MissReason>, when: &str) {
        let after = self.object(n);
        let known = (before.changes == after.changes).then_some(after.state);
        let mut found = self.found.lock().unwrap();
        found.reads += 1;
        match read {
            Ok(bytes) if bytes != before.bytes => found.corrupt.push(format!("object {n}, {when}")),
            Ok(_) if known == Some(State::Gone) => found.returned.push(format!("object {n}, {when}")),
            Err(reason) if known == Some(State::There) => {
                found.lost.push(format!("object {n}, {when}: {reason:?}"));
            }
            _ => {}
        }
    }
}

/// One round's clients of one process.
#[derive(Clone)]
struct Load {
    memory: Arc<Memory>,
    client: CacheClient<Channel>,
    steps: Arc<AtomicU64>,
    kill_at: u64,
    /// The process is to be killed; operations go on until it is.
    killed: CancellationToken,
}

impl Load {
    fn step(&self) {
        if self.steps.fetch_add(1, Ordering::Relaxed) + 1 == self.kill_at {
            self.killed.cancel();
        }
    }

    async fn put(&self, n: u64) -> Result<(), Status> {
        let object = self.memory.object(n);
        self.memory.becomes(n, State::Either);
        self.step();
        let head = PutHead {
            layout: id_bytes(LAYOUT.as_bytes()),
            key: id_bytes(key(n).as_bytes()),
            bytes: object.bytes.len() as u64,
            ..PutHead::default()
        };
        let parts = object.bytes.chunks(FRAME).map(|data| object.bytes.slice_ref(data));
        let frames: Vec<_> = std::iter::once(put_frame::Frame::Head(head))
            .chain(parts.map(put_frame::Frame::Data))
            .map(|frame| PutFrame { frame: Some(frame) })
            .collect();
        let load = self.clone();
        let frames = futures::stream::iter(frames).inspect(move |_| load.step());
        let answer = within(self.client.clone().put(frames)).await?.into_inner();
        assert!(matches!(answer.outcome(), Outcome::Stored | Outcome::Existed), "{answer:?}");
        self.memory.becomes(n, State::There);
        self.memory.found.lock().unwrap().puts += 1;
        self.step();
        Ok(())
    }

    async fn delete(&self, n: u64) -> Result<(), Status> {
        self.memory.becomes(n, State::Either);
        self.step();
        let request =
            DeleteRequest { layout: id_bytes(LAYOUT.as_bytes()), keys: vec![id_bytes(key(n).as_bytes())] };
        within(self.client.clone().delete(request)).await?;
        self.memory.becomes(n, State::Gone);
        self.memory.found.lock().unwrap().deletions += 1;
        self.step();
        Ok(())
    }

    /// Reads whole and by layers in turn, and verifies every segment as a client must.
    async fn read(&self, n: u64, whole: bool, when: &str) -> Result<(), Status> {
        let before = self.memory.object(n);
        self.step();
        let read = if whole { self.get(n).await? } else { self.get_layers(n, &before.bytes).await? };
        self.memory.judge(n, &before, read, when);
        self.step();
        Ok(())
    }

    async fn get(&self, n: u64) -> Result<Result<Vec<u8>, MissReason>, Status> {
        let request = GetRequest { layout: id_bytes(LAYOUT.as_bytes()), key: id_bytes(key(n).as_bytes()) };
        let mut frames = within(self.client.clone().get(request)).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(frame) = within(frames.message()).await? {
            match frame.frame.unwrap() {
                kv_frame::Frame::Data(data) => bytes.extend_from_slice(&data),
                kv_frame::Frame::Missing(reason) => return Ok(Err(reason.try_into().unwrap())),
                other => panic!("not a part of a container: {other:?}"),
            }
        }
        if let Err(why) = Container::parse(bytes.clone().into()).and_then(|it| it.verify_all()) {
            self.memory.found.lock().unwrap().corrupt.push(format!("object {n}: {why}"));
        }
        Ok(Ok(bytes))
    }

    /// The container's bytes where all layers are what they should be, nothing where they are not.
    async fn get_layers(&self, n: u64, expected: &Bytes) -> Result<Result<Vec<u8>, MissReason>, Status> {
        let request = GetLayersRequest {
            layout: id_bytes(LAYOUT.as_bytes()),
            keys: vec![id_bytes(key(n).as_bytes())],
            ..GetLayersRequest::default()
        };
        let mut frames = within(self.client.clone().get_layers(request)).await?.into_inner();
        let mut all = Vec::new();
        while let Some(frame) = within(frames.message()).await? {
            all.push(frame);
        }
        let Arrived { segments, missing, .. } = assemble(&all, 1).remove(0);
        if let Some(reason) = missing {
            return Ok(Err(reason));
        }
        let container = Container::parse(expected.clone()).unwrap();
        let layers = container.head().shape().layers;
        let sound = segments.len() == layers as usize
            && (0..layers).all(|layer| segments[&(layer as usize)] == container.layer(layer).unwrap());
        Ok(Ok(if sound { expected.to_vec() } else { Vec::new() }))
    }

    /// Puts new objects, puts deleted ones again, and deletes, until the store is gone.
    async fn write(self, mut mine: Vec<u64>, mut dice: Dice) {
        let mut next = 0;
        loop {
            let n = mine[next % mine.len()];
            let done = match self.memory.object(n).state {
                State::There if dice.below(3) == 0 => self.delete(n).await,
                State::There => Ok(()),
                State::Either | State::Gone => self.put(n).await,
            };
            // The store is gone.
            if done.is_err() {
                return;
            }
            next += 1;
            if next % mine.len() == 0 {
                let at = dice.below(mine.len() as u64) as usize;
                mine.rotate_left(at);
                tokio::task::yield_now().await;
            }
        }
    }

    async fn keep_reading(self, mut dice: Dice) {
        loop {
            let known = self.memory.numbers(State::There);
            if known.is_empty() {
                // No call would tell that the store is gone.
                if self.killed.is_cancelled() {
                    return;
                }
                self.step();
                tokio::task::yield_now().await;
            } else {
                let n = known[dice.below(known.len() as u64) as usize];
                if self.read(n, dice.below(2) == 0, "under load").await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn within<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(DEADLINE, call).await.expect("the store hangs")
}

/// A new process must have all of it, and nothing else.
async fn look(store: &Process, memory: &Arc<Memory>, dir: &Path, round: u64) {
    let load = Load {
        memory: Arc::clone(memory),
        client: store.client(),
        steps: Arc::default(),
        kill_at: u64::MAX,
        killed: CancellationToken::new(),
    };
    let all: Vec<u64> = memory.objects.lock().unwrap().keys().copied().collect();
    let when = format!("behind crash {round}");
    for n in &all {
        load.read(*n, n % 2 == 0, &when).await.unwrap();
    }
    // What clients could not know is settled now.
    let found = store.lookup(LAYOUT, &all.iter().map(|n| key(*n)).collect::<Vec<_>>()).await;
    for (n, entry) in all.iter().zip(&found) {
        if memory.object(*n).state == State::Either {
            memory.becomes(*n, if entry.found { State::There } else { State::Gone });
        }
    }
    let stat = store.stat().await;
    assert_eq!(stat.disk_used_bytes, bytes_on_disk(dir), "round {round}: bytes counted and bytes there");
    assert_eq!(stat.objects as usize, found.iter().filter(|entry| entry.found).count(), "round {round}");
    assert_eq!(stat.quarantined, 0, "round {round}: a kill damages no object");
    let leftovers: Vec<_> = std::fs::read_dir(dir.join("temporary")).unwrap().flatten().collect();
    assert!(leftovers.is_empty(), "round {round}: not swept: {leftovers:?}");
}

/// Forgets, with the store, all but a few objects: rounds stay as small as the first.
async fn prune(store: &Process, memory: &Memory) {
    let there = memory.numbers(State::There);
    let surplus = &there[..there.len().saturating_sub(KEPT)];
    store.delete(LAYOUT, &surplus.iter().map(|n| key(*n)).collect::<Vec<_>>()).await;
    let mut objects = memory.objects.lock().unwrap();
    surplus.iter().for_each(|n| drop(objects.remove(n)));
    // Deleted ones are looked for a while longer.
    let gone: Vec<u64> =
        objects.iter().filter(|(_, object)| object.state == State::Gone).map(|(n, _)| *n).collect();
    gone[..gone.len().saturating_sub(KEPT)].iter().for_each(|n| drop(objects.remove(n)));
}

fn variable(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_killed_under_load_loses_nothing_acknowledged_and_serves_nothing_corrupt() {
    let rounds = variable("CRASHES").unwrap_or(ROUNDS);
    let seed = variable("CRASH_SEED").unwrap_or(1);
    let dir = tempfile::tempdir().unwrap();
    // A RAM tier of next to nothing: reads come from the disk.
    let settings = ["disk_bytes=1000000000".to_owned(), "ram_bytes=100000".to_owned()];
    let memory = Arc::new(Memory::default());
    let (mut steps, mut dice) = (0, Dice(seed));
    let mut store = Process::start(dir.path(), "crash", &settings);
    for round in 1..=rounds {
        let kill_at = 1 + dice.below(STEPS);
        let load = Load {
            memory: Arc::clone(&memory),
            client: store.client(),
            steps: Arc::default(),
            kill_at,
            killed: CancellationToken::new(),
        };
        let mut tasks = Vec::new();
        for writer in 0..WRITERS {
            let first = round * 1000 + u64::from(writer) * 100;
            let mine: Vec<u64> = (first..first + 6).collect();
            let mut objects = memory.objects.lock().unwrap();
            objects.extend(
                mine.iter().map(|n| (*n, Object { bytes: container(*n), state: State::Either, changes: 0 })),
            );
            drop(objects);
            tasks.push(tokio::spawn(load.clone().write(mine, Dice(dice.below(u64::MAX)))));
        }
        for _ in 0..READERS {
            tasks.push(tokio::spawn(load.clone().keep_reading(Dice(dice.below(u64::MAX)))));
        }
        tokio::time::timeout(DEADLINE, load.killed.cancelled()).await.expect("the load stands still");
        tokio::task::spawn_blocking(move || store.kill()).await.unwrap();
        join_all(tasks).await.into_iter().for_each(|ended| ended.unwrap());
        steps += load.steps.load(Ordering::Relaxed);

        let data = dir.path().to_owned();
        let settings = settings.clone();
        store = tokio::task::spawn_blocking(move || Process::start(&data, "crash", &settings)).await.unwrap();
        look(&store, &memory, dir.path(), round).await;
        prune(&store, &memory).await;
    }
    let found = memory.found.lock().unwrap();
    // Past the test harness's capture: these figures are published.
    let _ = writeln!(
        std::io::stderr(),
        "crash test: seed {seed}, {rounds} kills, {steps} steps, {} puts and {} deletions acknowledged, {} reads \
         compared; {} lost, {} corrupt, {} came back",
        found.puts,
        found.deletions,
        found.reads,
        found.lost.len(),
        found.corrupt.len(),
        found.returned.len()
    );
    assert!(found.puts > rounds, "{} puts in {rounds} rounds: too few to mean much", found.puts);
    assert!(
        found.deletions > rounds,
        "{} deletions in {rounds} rounds: too few to mean much",
        found.deletions
    );
    assert!(found.lost.is_empty(), "acknowledged and lost: {:#?}", found.lost);
    assert!(found.corrupt.is_empty(), "served and not what was put: {:#?}", found.corrupt);
    assert!(found.returned.is_empty(), "deleted and back: {:#?}", found.returned);
}
