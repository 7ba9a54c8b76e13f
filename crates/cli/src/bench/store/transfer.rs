//! One object, there and back, in turns with Redis, a raw socket and plain files.

use super::super::measure::{Runs, cpu_seconds};
use super::nodes::Node;
use super::objects::{self, Maker};
use super::peers::{Socket, forget, read_direct, write_synced};
use super::redis_peer::Redis;
use super::times::{Promise, Row, Times, Wanted};
use anyhow::Context as _;
use bytes::Bytes;
use cacheclip_chunk::Container;
use indicatif::ProgressBar;
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

/// Turns of a round.
pub(crate) const TURNS: u64 = 11;

/// Everything that takes its turn.
pub(crate) struct Ring<'a> {
    /// Has everything in RAM.
    pub(crate) memory: &'a Node,
    /// Keeps nothing in RAM.
    pub(crate) disk: &'a Node,
    pub(crate) redis: &'a mut Result<Redis, String>,
    /// A folder beside the stores' own.
    pub(crate) folder: &'a Path,
    pub(crate) bar: &'a ProgressBar,
}

/// What one size gave.
#[derive(Debug, Serialize)]
pub(crate) struct Transfer {
    pub(crate) rows: Vec<Row>,
    pub(crate) promises: Vec<Promise>,
    pub(crate) stages: Stages,
    /// Whether the peer of the cold read went past the system's memory, or read after it had forgotten the file.
    pub(crate) direct: bool,
}

/// Where the time of a verified get from RAM goes, in nanoseconds per byte. Stages overlap: what they add up to beyond
/// `get` went on beside something else.
#[derive(Debug, Serialize)]
pub(crate) struct Stages {
    pub(crate) mib: usize,
    /// A get as callers see it.
    pub(crate) get: Option<Runs>,
    /// As many bytes over a raw socket: part of `transport`.
    pub(crate) socket: Option<Runs>,
    /// The same frames, received and not looked at.
    pub(crate) transport: Option<Runs>,
    /// Digests alone, on one core.
    pub(crate) verify: Option<Runs>,
    /// Decoding alone, on one core.
    pub(crate) decode: Option<Runs>,
    /// All threads of the reading process during gets.
    pub(crate) client_cpu: f64,
    /// All threads of the store during gets.
    pub(crate) store_cpu: f64,
}

/// CPU seconds of both ends during gets.
#[derive(Debug, Default)]
struct Used {
    client: f64,
    store: f64,
}

/// All turns at one size. The first round is thrown away: it warms.
pub(crate) async fn measure(ring: &mut Ring<'_>, mib: usize, runs: usize) -> anyhow::Result<Transfer> {
    let maker = Maker::new(mib);
    // Numbers of sizes must not meet, nor those of rounds.
    let number = |round: usize| ((mib as u64) << 32) + round as u64;
    let container = maker.container(number(0))?;
    let key = objects::key(number(0));
    ring.memory.put(container.clone()).await?;
    ring.disk.put(container.clone()).await?;
    let name = format!("object-{mib}");
    if let Ok(redis) = ring.redis {
        redis.set(&name, &container).await?;
    }
    let mut socket = Socket::start(container.clone())?;
    let file = ring.folder.join(format!("read-{mib}"));
    write_synced(&file, &container)?;
    let (mut times, mut used, mut direct) = (Times::default(), Used::default(), false);
    for round in 0..=runs {
        ring.bar.set_message(format!("{mib} MiB"));
        if round == 1 {
            times.forget();
            used = Used::default();
        }
        let cpu = || (cpu_seconds("self"), ring.memory.process.cpu_seconds());
        let before = cpu();
        times.add("get", ring.memory.get(&[key]).await?.seconds);
        let after = cpu();
        (used.client, used.store) = (used.client + after.0 - before.0, used.store + after.1 - before.1);
        if let Ok(redis) = ring.redis {
            times.add("redis get + blake3", redis.get_hashed(&name).await?);
        }
        let (seconds, back) = blocking(move || {
            let seconds = socket.read()?;
            Ok((seconds, socket))
        })
        .await?;
        socket = back;
        times.add("socket", seconds);
        times.add("receive", ring.memory.receive(key).await?);
        times.add("receive, generated", ring.memory.receive_generated(key).await?);
        for (name, seconds) in alone(&container).await? {
            times.add(name, seconds);
        }
        ring.bar.inc(TURNS / 2);
        write(ring, &maker, number(round + 1), mib, &mut times).await?;
        let object = objects::file(&ring.disk.data, &key);
        blocking(move || forget(&object)).await?;
        times.add("get, cold", ring.disk.get(&[key]).await?.seconds);
        let path = file.clone();
        let seconds;
        (seconds, direct) = blocking(move || read_direct(&path)).await?;
        times.add("direct read", seconds);
        ring.bar.inc(TURNS - TURNS / 2);
    }
    for node in [ring.memory, ring.disk] {
        node.delete(key).await?;
    }
    std::fs::remove_file(&file)?;
    let moved = (container.len() * runs) as f64;
    let skipped = ring.redis.as_ref().err().cloned();
    Ok(Transfer {
        rows: rows(&times, mib, container.len() as u64, skipped),
        promises: promises(&times, mib),
        stages: stages(&times, mib, container.len(), &used, moved),
        direct,
    })
}

/// A durable put, and the same bytes written to a plain file.
async fn write(
    ring: &Ring<'_>,
    maker: &Maker,
    number: u64,
    mib: usize,
    times: &mut Times,
) -> anyhow::Result<()> {
    let container = maker.container(number)?;
    times.add("put", ring.memory.put(container.clone()).await?);
    ring.memory.delete(objects::key(number)).await?;
    let path = ring.folder.join(format!("write-{mib}"));
    let seconds = blocking(move || {
        let seconds = write_synced(&path, &container)?;
        std::fs::remove_file(&path)?;
        Ok(seconds)
    });
    times.add("fsynced write", seconds.await?);
    Ok(())
}

/// What verification and decoding take where nothing else goes on.
async fn alone(container: &Bytes) -> anyhow::Result<[(&'static str, f64); 2]> {
    let container = Container::parse(container.clone())?;
    blocking(move || {
        let (mut verify, mut both) = (0.0, 0.0);
        for index in 0..container.head().segments().len() {
            let stored = container.stored_segment(index)?;
            let began = Instant::now();
            container.head().verify_segment(index, &stored)?;
            verify += began.elapsed().as_secs_f64();
            let began = Instant::now();
            std::hint::black_box(container.head().decode_segment(index, &stored)?);
            both += began.elapsed().as_secs_f64();
        }
        Ok([("verify", verify), ("decode", (both - verify).max(f64::MIN_POSITIVE))])
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a blocking turn")?
}

fn rows(times: &Times, mib: usize, bytes: u64, skipped: Option<String>) -> Vec<Row> {
    let names = [
        "get",
        "redis get + blake3",
        "socket",
        "receive",
        "receive, generated",
        "put",
        "fsynced write",
        "get, cold",
        "direct read",
    ];
    let row = |name: &'static str| {
        let bytes_per_second = times.rate(name, bytes);
        let skipped = skipped.clone().filter(|_| bytes_per_second.is_none());
        Row { name, mib, bytes_per_second, skipped }
    };
    names.into_iter().map(row).collect()
}

/// What is promised, as shares of a peer's throughput: its seconds over ours.
fn promises(times: &Times, mib: usize) -> Vec<Promise> {
    // A small object is soon there, whoever sends it.
    let redis = if mib < 32 { 1.3 } else { 2.5 };
    let wanted = [
        ("get over Redis GET + blake3", "redis get + blake3", "get", redis),
        ("get over raw socket", "socket", "get", 0.6),
        ("durable put over fsynced write", "fsynced write", "put", 0.7),
        ("cold get over direct read", "direct read", "get, cold", 0.8),
    ];
    let promise = |(what, theirs, ours, least)| {
        Some(Promise::new(what, Some(mib), times.ratio(theirs, ours)?, Wanted::AtLeast(least)))
    };
    wanted.into_iter().filter_map(promise).collect()
}

fn stages(times: &Times, mib: usize, bytes: usize, used: &Used, moved: f64) -> Stages {
    let of = |name: &str| times.runs(name, |seconds| seconds * 1e9 / bytes as f64);
    Stages {
        mib,
        get: of("get"),
        socket: of("socket"),
        transport: of("receive"),
        verify: of("verify"),
        decode: of("decode"),
        client_cpu: used.client * 1e9 / moved,
        store_cpu: used.store * 1e9 / moved,
    }
}

impl Stages {
    /// One line for people.
    pub(crate) fn text(&self) -> String {
        let of = |runs: &Option<Runs>| runs.as_ref().map_or(f64::NAN, |runs| runs.median);
        let [get, socket, transport, verify, decode] =
            [&self.get, &self.socket, &self.transport, &self.verify, &self.decode].map(of);
        format!(
            "{} MiB, ns per byte: get {get:.3}; transport {transport:.3} (socket {socket:.3}), verify {verify:.3}, \
             decode {decode:.3}, side by side {:.3}; CPU of client {:.3}, of store {:.3}",
            self.mib,
            transport + verify + decode - get,
            self.client_cpu,
            self.store_cpu
        )
    }
}
