//! What a store holds in memory while many readers take large objects slowly.

use super::super::bar;
use super::super::measure::{Runs, peak_rss_bytes_of, reset_peak_rss_of, rss_bytes_of};
use super::nodes::{Node, dial, frames};
use super::objects::{self, LAYERS, Maker};
use super::times::{Promise, Wanted};
use cacheclip_rpc::v1::kv_frame;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinSet;

/// MiB of an object.
const MIB: usize = 32;
/// How long a reader leaves each message alone before it takes the next one.
const PAUSE: Duration = Duration::from_millis(100);

/// Readers of an object each, all at once, none of them in a hurry.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) readers: usize,
    pub(crate) object_mib: usize,
    /// Bytes that the store may keep in RAM.
    pub(crate) budget_bytes: u64,
    /// Resident before the readers came.
    pub(crate) before_bytes: u64,
    /// Most that was resident while they read.
    pub(crate) peak_bytes: u64,
    pub(crate) promise: Promise,
}

/// Reads `readers` objects from a store whose budget does not hold them all.
pub(crate) async fn measure(data: &Path, readers: usize, budget_bytes: u64) -> anyhow::Result<Memory> {
    let numbers = (4u64 << 48)..(4 << 48) + readers as u64;
    let bar = bar("memory", 2 * readers as u64)?;
    {
        let (node, maker) = (Node::start(data, budget_bytes).await?, Maker::new(MIB));
        for number in numbers.clone() {
            node.put(maker.container(number)?).await?;
            bar.inc(1);
        }
    }
    // Another process: what receiving left behind is not what reading takes.
    let node = Node::start(data, budget_bytes).await?;
    let process = node.process.process();
    let before_bytes = rss_bytes_of(&process);
    reset_peak_rss_of(&process);
    let mut reading = JoinSet::new();
    for number in numbers {
        let endpoint = node.process.endpoint.clone();
        reading.spawn(async move { read(&endpoint, number).await });
    }
    // A store gives up a reader that takes nothing; each message has a deadline of its own in `read`.
    while let Some(read) = reading.join_next().await {
        read??;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let peak_bytes = peak_rss_bytes_of(&process);
    let share = Runs::of(vec![peak_bytes as f64 / budget_bytes as f64]);
    Ok(Memory {
        readers,
        object_mib: MIB,
        budget_bytes,
        before_bytes,
        peak_bytes,
        promise: Promise::new("peak memory over budget, slow readers", None, share, Wanted::AtMost(1.1)),
    })
}

/// Reads one object over a connection of its own, message by message.
async fn read(endpoint: &str, number: u64) -> anyhow::Result<()> {
    let mut client = dial(endpoint)?;
    let mut answer = frames(&mut client, objects::key(number), 0..LAYERS).await?;
    let mut bytes = 0;
    while let Some(frame) = tokio::time::timeout(super::nodes::PATIENCE, answer.message()).await?? {
        if let Some(kv_frame::Frame::Segment(segment)) = frame.frame {
            bytes += segment.data.len();
            tokio::time::sleep(PAUSE).await;
        }
    }
    anyhow::ensure!(bytes == MIB << 20, "only {bytes} bytes came");
    Ok(())
}
