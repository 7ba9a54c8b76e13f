//! Several chunks at once: how soon the first layer of all of them is there, and what a lookup costs.

use super::super::measure::Runs;
use super::nodes::Node;
use super::objects::{self, LAYOUT, Maker};
use super::redis_peer::Redis;
use super::times::{Promise, Times, Wanted};
use cacheclip_chunk::ChunkKey;
use cacheclip_client::Located;
use indicatif::ProgressBar;
use serde::Serialize;
use std::time::Instant;

/// Chunks of a read of layers, of 4 MiB each.
const CHUNKS: u64 = 32;
/// Keys of a lookup.
const KEYS: u64 = 64;
/// Lookups of a turn: one is over too soon to be timed.
const LOOKUPS: usize = 200;
/// Bytes that an index keeps of a chunk: a digest and a length.
const RECORD: usize = 40;

/// Reads of several chunks' layers.
#[derive(Debug, Serialize)]
pub(crate) struct Layers {
    pub(crate) chunks: u64,
    pub(crate) bytes: u64,
    /// Until layer 0 of all chunks had come, verified and decoded.
    pub(crate) first_ms: Runs,
    /// Until all layers had.
    pub(crate) whole_ms: Runs,
    pub(crate) promise: Promise,
}

/// Lookups of several keys.
#[derive(Debug, Serialize)]
pub(crate) struct Lookups {
    pub(crate) keys: u64,
    pub(crate) lookup_us: Option<Runs>,
    /// As many values of an index record's size from Redis in one write.
    pub(crate) redis_us: Option<Runs>,
    /// Why there is no peer.
    pub(crate) skipped: Option<String>,
    pub(crate) promise: Option<Promise>,
}

/// How soon the first layers are there.
pub(crate) async fn layers(node: &Node, runs: usize, bar: &ProgressBar) -> anyhow::Result<Layers> {
    let maker = Maker::new(4);
    let numbers = (1 << 48)..(1 << 48) + CHUNKS;
    let keys: Vec<ChunkKey> = numbers.clone().map(objects::key).collect();
    let mut bytes = 0;
    for number in numbers {
        let container = maker.container(number)?;
        bytes += container.len() as u64;
        node.put(container).await?;
    }
    bar.set_message("layers");
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    for round in 0..=runs {
        let got = node.get(&keys).await?;
        bar.inc(1);
        if round > 0 {
            first.push(got.first_seconds);
            whole.push(got.seconds);
        }
    }
    node.client.delete(LAYOUT, &keys).await?;
    let share = Runs::of(first.iter().zip(&whole).map(|(first, whole)| first / whole).collect());
    let ms = |seconds: Vec<f64>| Runs::of(seconds.into_iter().map(|it| it * 1e3).collect());
    Ok(Layers {
        chunks: CHUNKS,
        bytes,
        first_ms: ms(first),
        whole_ms: ms(whole),
        promise: Promise::new("layer 0 of 32 chunks over all layers", None, share, Wanted::AtMost(0.05)),
    })
}

/// What a lookup costs beside a bare read of as many keys.
pub(crate) async fn lookups(
    node: &Node,
    redis: &mut Result<Redis, String>,
    runs: usize,
    bar: &ProgressBar,
) -> anyhow::Result<Lookups> {
    let numbers = (2 << 48)..(2 << 48) + KEYS;
    let keys: Vec<ChunkKey> = numbers.clone().map(objects::key).collect();
    let names: Vec<String> = keys.iter().map(ChunkKey::to_string).collect();
    for number in numbers {
        node.put(objects::smallest(number)?).await?;
    }
    if let Ok(redis) = redis {
        for name in &names {
            redis.set(name, &[7; RECORD]).await?;
        }
    }
    bar.set_message("lookup");
    let mut times = Times::default();
    for round in 0..=runs {
        if round == 1 {
            times.forget();
        }
        let began = Instant::now();
        for _ in 0..LOOKUPS {
            let located = node.client.lookup(LAYOUT, &keys).await;
            let found = located.iter().filter(|it| matches!(it, Located::Found { .. })).count();
            anyhow::ensure!(found == keys.len(), "only {found} keys were found");
        }
        times.add("lookup", began.elapsed().as_secs_f64() / LOOKUPS as f64);
        if let Ok(redis) = redis {
            let began = Instant::now();
            for _ in 0..LOOKUPS {
                let values = redis.many(&names).await?;
                anyhow::ensure!(values.iter().all(|value| value.len() == RECORD), "Redis has lost a key");
            }
            times.add("redis", began.elapsed().as_secs_f64() / LOOKUPS as f64);
        }
        bar.inc(1);
    }
    node.client.delete(LAYOUT, &keys).await?;
    let micros = |name: &str| times.runs(name, |seconds| seconds * 1e6);
    let promise = |value| Promise::new("lookup of 64 keys over Redis", None, value, Wanted::AtMost(2.5));
    Ok(Lookups {
        keys: KEYS,
        lookup_us: micros("lookup"),
        redis_us: micros("redis"),
        skipped: redis.as_ref().err().cloned(),
        promise: times.ratio("lookup", "redis").map(promise),
    })
}
