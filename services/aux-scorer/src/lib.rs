//! Auxiliary scorer: a small model on the CPU says which bytes of the chunks matter for a question.
//!
//! The auxiliary KV of every chunk is computed once, cached and stored; a question runs once, attending jointly to
//! all chunks' cached KV, so scoring costs the question's length and not the chunks'. Scores leave as byte
//! spans of the chunk's text, because the primary model has another tokenizer.
//!
//! ```text
//! grpc ── digests ── RAM │ stores │ text ── auxiliary: canonical KV of chunks, the question over all of it
//!                             ╰── written behind: identity (layout, keys, containers)
//! ```

pub mod auxiliary;
mod gather;
mod grpc;
mod identity;
pub mod metrics;
mod options;
mod ram;
mod stores;

pub use options::Options;

use anyhow::Context as _;
use auxiliary::Auxiliary;
use cacheclip_model::{Cpu, certificate, layout, load};
use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::scorer_server::ScorerServer;
use cacheclip_service::residency::Announcer;
use cacheclip_service::{Running, Server};
use grpc::Service;
use identity::Identity;
use stores::Stores;
use tonic::service::Routes;

/// Full gRPC name of the service.
pub const SERVICE: &str = "cacheclip.v1.Scorer";

/// Loads the auxiliary model, proves the instance, and serves. Ready when this returns.
///
/// # Errors
/// A model that cannot be loaded or proven, a store that cannot be dialled, an address in use.
pub async fn start(options: Options) -> anyhow::Result<Running> {
    cacheclip_service::telemetry::install_recorder();
    metrics::describe();
    cacheclip_client::metrics::describe();
    let settings = options.clone();
    let (auxiliary, identity) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let loaded =
            load::load(&load::Source::choose(&settings.model_dir, settings.random_shape.as_deref())?, Cpu)?;
        let certificate = certificate::certify(&loaded.decoder)?;
        tracing::info!(%certificate, "auxiliary instance certified");
        let composer = Composer::from_dir(&settings.model_dir)?;
        let config = loaded.decoder.config();
        let spec = layout::spec(config, loaded.weights_digest, composer.tokenizer().digest());
        let identity = Identity::new(spec, &composer.anchor()?, config.vocab);
        let concurrency = settings.concurrency.max(1);
        let auxiliary = Auxiliary::new(loaded.decoder, composer, settings.max_question_tokens, concurrency)?;
        Ok((auxiliary, identity))
    })
    .await?
    .with_context(|| format!("auxiliary model {}", options.model_dir.display()))?;
    tracing::info!(layout = %identity.layout(), stores = options.stores.len(), "scorer ready");
    let stores = Stores::start(&options, identity)?;
    let announcer = Announcer::new("aux-scorer");
    let message_bytes = options.service.max_message_bytes;
    let service = ScorerServer::new(Service::new(auxiliary, stores, &options, announcer.clone()))
        .max_decoding_message_size(message_bytes)
        .max_encoding_message_size(message_bytes);
    let running = Server::new("aux-scorer", options.service).serve(Routes::new(service), &[SERVICE]).await?;
    announcer.follow(&running);
    running.readiness().set(true, "");
    Ok(running)
}
