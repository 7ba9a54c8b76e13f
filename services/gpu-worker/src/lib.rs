//! Worker: assembles chunk KV, recomputes selected rows, decodes.
//!
//! ```text
//! grpc ── request (checked) ── loader ── ram │ stores │ engine.canonical ──► writer (behind)
//!   │                             ║ beside: importance sets
//!   └── engine thread, layer by layer as KV comes: place → recompute + question; then decode in one batch
//! ```

mod budget;
mod device;
mod engine;
mod grpc;
mod incoming;
mod layout;
mod link;
mod loader;
pub mod metrics;
mod options;
mod ram;
mod report;
mod request;
mod writer;

pub use options::{CudaOptions, Loading, Options, Processor};

use anyhow::Context as _;
use cacheclip_chunk::{Codec, LayoutSpec};
use cacheclip_client::StoreClient;
use cacheclip_kernels::page::PAGE_TOKENS;
use cacheclip_model::{layout::spec, load};
use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::worker_server::WorkerServer;
use cacheclip_service::lifetime::Lifetime;
use cacheclip_service::residency::Announcer;
use cacheclip_service::{Running, Server, seconds};
use device::Begun;
use grpc::{Service, Shared};
use layout::{Anchor, Layout};
use loader::Loader;
use ram::Ram;
use request::Limits;
use std::sync::Arc;
use tonic::service::Routes;
use writer::Writer;

/// Full gRPC name of the service.
pub const SERVICE: &str = "cacheclip.v1.Worker";

/// Loads the model, proves the instance, and serves. Ready when this returns.
///
/// # Errors
/// A model that cannot be loaded or proven, a budget too small for one prompt, an address in use; a
/// [`Failure`](cacheclip_service::Failure) for a CUDA device that is not there or not enough.
pub async fn start(options: Options) -> anyhow::Result<Running> {
    cacheclip_service::telemetry::install_recorder();
    metrics::describe();
    cacheclip_client::metrics::describe();
    let dir = options.model_dir.clone();
    let source = load::Source::choose(&dir, options.random_shape.as_deref())?;
    let told = options.clone();
    let (begun, composer) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let config = source.config()?;
        let composer = Composer::from_dir(&dir)?;
        let longest = Limits::new(config.vocab, config.max_positions, 0, &told).max_tokens;
        Ok((device::begin(&told, (&source, &config), composer.tokenizer().clone(), longest)?, composer))
    })
    .await?
    .with_context(|| format!("model {}", options.model))?;
    let Begun { engine, config, weights_digest, dtype, host, pages } = begun;
    let tokenizer_digest = composer.tokenizer().digest();
    let identity = LayoutSpec { dtype, ..spec(&config, weights_digest, tokenizer_digest) };
    let layout = Arc::new(Layout::new(identity));
    let anchor = Anchor::new(&layout, composer.anchor()?);
    let limits = Limits::new(config.vocab, config.max_positions, anchor.ids.len(), &options);
    metrics::cache_config(PAGE_TOKENS, pages);
    let stores = match &options.stores[..] {
        [] => None,
        seeds => Some(StoreClient::connect(seeds, &options.connect)?),
    };
    let codec = if options.compress { Codec::COMPRESSED } else { Codec::default() };
    let writer =
        stores.clone().map(|stores| Writer::start(stores, Arc::clone(&layout), options.write_queue, codec));
    let ram = Ram::new(options.ram_bytes, Lifetime::seconds(options.ram_seconds));
    let loader = Loader::new(
        (ram.clone(), host),
        stores,
        engine.clone(),
        writer,
        Arc::clone(&layout),
        Arc::clone(&anchor.ids),
        &options,
    );
    tracing::info!(model = options.model, layout = %layout.id, pages, "worker ready");
    let engine_watch = engine.clone();
    let announcer = Announcer::new(options.model.clone());
    let shared = Shared {
        engine,
        loader,
        ram,
        layout,
        anchor,
        limits,
        model: options.model,
        tokenizer_digest,
        eos: config.eos.clone(),
        importance_timeout: seconds(options.importance_timeout_seconds),
        fuse_rank: options.fuse_static_rank,
        probe: options.probe,
        pipeline: options.pipeline,
        announcer: announcer.clone(),
    };
    let message_bytes = options.service.max_message_bytes;
    let service = WorkerServer::new(Service(Arc::new(shared)))
        .max_decoding_message_size(message_bytes)
        .max_encoding_message_size(message_bytes);
    let running = Server::new("gpu-worker", options.service).serve(Routes::new(service), &[SERVICE]).await?;
    let (readiness, shutdown) = (running.readiness(), running.shutdown());
    readiness.set(true, "");
    announcer.follow(&running);
    tokio::spawn(async move {
        tokio::select! {
            () = engine_watch.stopped() => readiness.set(false, "the engine has stopped: restart the worker"),
            () = shutdown.cancelled() => {}
        }
    });
    Ok(running)
}
