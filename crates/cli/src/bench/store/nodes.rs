//! Stores in processes of their own, and how they are read.

use super::super::process::{Store, free_port};
use super::objects::{LAYERS, LAYOUT};
use anyhow::Context as _;
use bytes::Bytes;
use cacheclip_chunk::ChunkKey;
use cacheclip_client::{Item, Outcome, StoreClient};
use cacheclip_rpc::stream;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::{GetLayersRequest, KvFrame, kv_frame};
use cacheclip_service::{ConnectOptions, connect};
use futures::StreamExt as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::transport::Channel;
use tonic::{Request, Streaming};

/// Longest wait for a start with many files, or for one transfer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);
/// Bytes of containers that a store keeps on disk: more than is put.
const DISK: u64 = 64 << 30;
/// Largest message of a store.
const MESSAGE: usize = 8 << 20;

/// A store with a client.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) process: Store,
    pub(crate) client: StoreClient,
    pub(crate) data: PathBuf,
}

impl Node {
    /// Starts a store on `data` that keeps so many bytes in RAM.
    pub(crate) async fn start(data: &Path, ram_bytes: u64) -> anyhow::Result<Self> {
        let port = free_port()?;
        let endpoint = format!("http://127.0.0.1:{port}");
        let settings = [format!("ram_bytes={ram_bytes}"), format!("disk_bytes={DISK}")];
        let process = Store::start_with(data, port, endpoint, &settings, PATIENCE).await?;
        let client = StoreClient::connect(&[&process.endpoint], &ConnectOptions::default())?;
        Ok(Self { process, client, data: data.to_owned() })
    }

    /// Seconds until a new container is durable and acknowledged.
    pub(crate) async fn put(&self, container: Bytes) -> anyhow::Result<f64> {
        let began = Instant::now();
        let outcome = self.client.put(container).await?;
        anyhow::ensure!(outcome == Outcome::Stored, "the store did not take it: {outcome:?}");
        Ok(began.elapsed().as_secs_f64())
    }

    pub(crate) async fn delete(&self, key: ChunkKey) -> anyhow::Result<()> {
        self.client.delete(LAYOUT, &[key]).await?;
        Ok(())
    }

    /// Seconds until all layers of all chunks have come, verified and decoded, and until the first layer of each has.
    pub(crate) async fn get(&self, keys: &[ChunkKey]) -> anyhow::Result<Got> {
        let (began, mut layers, mut first) = (Instant::now(), 0, 0);
        let mut got = Got::default();
        let mut items = self.client.get_layers(LAYOUT, keys, 0..LAYERS);
        while let Some(item) = items.next().await {
            match item {
                Item::Layer(layer) => {
                    layers += 1;
                    first += usize::from(layer.layer == 0);
                    if layer.layer == 0 && first == keys.len() {
                        got.first_seconds = began.elapsed().as_secs_f64();
                    }
                }
                Item::Missing { reason, .. } => anyhow::bail!("the store does not have it: {reason:?}"),
                _ => {}
            }
        }
        got.seconds = began.elapsed().as_secs_f64();
        anyhow::ensure!(layers == keys.len() * LAYERS as usize, "only {layers} layers came");
        Ok(got)
    }

    /// Seconds until the same frames have come and nobody has looked at them.
    pub(crate) async fn receive(&self, key: ChunkKey) -> anyhow::Result<f64> {
        let channel = connect(&self.process.endpoint, &ConnectOptions::default())?;
        let ask = |layers| stream::get_layers(channel.clone(), Request::new(request(key, layers)), MESSAGE);
        // The connection stands before the clock runs.
        ask(0..1).await?;
        let (began, mut bytes) = (Instant::now(), 0);
        let mut answer = ask(0..LAYERS).await?.into_inner();
        while let Some(frame) = answer.message().await? {
            bytes += kv_bytes(frame)?;
        }
        anyhow::ensure!(bytes > 0, "nothing came");
        Ok(began.elapsed().as_secs_f64())
    }

    /// The same by generated code, as any gRPC client would.
    pub(crate) async fn receive_generated(&self, key: ChunkKey) -> anyhow::Result<f64> {
        let mut client = dial(&self.process.endpoint)?;
        frames(&mut client, key, 0..1).await?;
        let (began, mut bytes) = (Instant::now(), 0);
        let mut answer = frames(&mut client, key, 0..LAYERS).await?;
        while let Some(frame) = answer.message().await? {
            bytes += kv_bytes(frame)?;
        }
        anyhow::ensure!(bytes > 0, "nothing came");
        Ok(began.elapsed().as_secs_f64())
    }
}

fn kv_bytes(frame: KvFrame) -> anyhow::Result<usize> {
    match frame.frame {
        Some(kv_frame::Frame::Segment(segment)) => Ok(segment.data.len()),
        Some(kv_frame::Frame::Missing(reason)) => anyhow::bail!("the store does not have it: {reason}"),
        _ => Ok(0),
    }
}

/// When what was asked for had come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Got {
    pub(crate) seconds: f64,
    /// The first layer of every chunk.
    pub(crate) first_seconds: f64,
}

/// A connection of its own to a store.
pub(crate) fn dial(endpoint: &str) -> anyhow::Result<CacheClient<Channel>> {
    let channel = connect(endpoint, &ConnectOptions::default())?;
    Ok(CacheClient::new(channel).max_decoding_message_size(MESSAGE))
}

/// Layers of one object as they come.
pub(crate) async fn frames(
    client: &mut CacheClient<Channel>,
    key: ChunkKey,
    layers: Range<u32>,
) -> anyhow::Result<Streaming<KvFrame>> {
    let answer = tokio::time::timeout(PATIENCE, client.get_layers(request(key, layers)));
    Ok(answer.await.context("the store does not answer")??.into_inner())
}

fn request(key: ChunkKey, layers: Range<u32>) -> GetLayersRequest {
    GetLayersRequest {
        layout: Bytes::copy_from_slice(LAYOUT.as_bytes()),
        keys: vec![Bytes::copy_from_slice(key.as_bytes())],
        first_layer: layers.start,
        end_layer: layers.end,
    }
}
