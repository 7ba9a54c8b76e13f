//! Gateway: text to sections, scoring beside loading, one worker stream per request.
//!
//! ```text
//! caller ── request (checked) ── sections: scopes, tokens, keys ──► worker: sections
//!    ▲                                        ║ beside                ║ loads
//!    │                                        ╚══► scorer ──────────► worker: importance sets
//!    └── started, token*, done ◄──────────────────────────────────────┘
//! ```
//!
//! A gateway keeps no state that two replicas could disagree on: what it learned from the worker and how texts
//! tokenise can be found out again by either.

mod deletion;
mod error;
mod generate;
mod grpc;
mod ingest;
pub mod metrics;
mod options;
mod peers;
mod request;
mod scorer;
mod sections;
mod worker;

pub use error::Error;
pub use options::{DEVELOPMENT_SECRET, Options};

use cacheclip_prompt::Composer;
use cacheclip_rpc::v1::gateway_server::GatewayServer;
use cacheclip_service::{Running, Server, seconds, telemetry};
use deletion::Deletion;
use generate::Relay;
use grpc::{Service, Shared};
use ingest::Ingest;
use scorer::Scorers;
use sections::Sections;
use std::sync::Arc;
use tonic::Status;
use tonic::service::Routes;
use worker::Workers;

/// Full gRPC name of the service.
pub const SERVICE: &str = "cacheclip.v1.Gateway";

/// Binds and serves, then waits for a worker to describe itself; ready when this returns. Until then the ports
/// answer, as not ready.
///
/// # Errors
/// A model directory or address that cannot be used; a worker that is not there in time or has another model.
pub async fn start(options: Options) -> Result<Running, Error> {
    telemetry::install_recorder();
    metrics::describe();
    let composer = Composer::from_dir(&options.model_dir)?;
    let secret = options.secret()?;
    if options.scope_secret == DEVELOPMENT_SECRET {
        tracing::warn!("scope_secret is the development default: tenants are not kept apart");
    }
    let message_bytes = options.service.max_message_bytes;
    if options.workers.is_empty() {
        return Err(Error::Option { field: "workers", reason: "it must name at least one worker" });
    }
    let workers = Workers::start(&options.workers, &options.connect, composer.clone(), message_bytes)?;
    let patience = seconds(options.score_timeout_seconds);
    let scorers = Scorers::start(&options.scorers, &options.connect, patience, message_bytes)?;
    let sections = Sections::new(composer.clone(), secret, options.token_cache_bytes);
    let limit = seconds(options.worker_timeout_seconds);
    let shared = Shared {
        deletion: Deletion { workers: workers.clone(), scorers: scorers.clone(), sections: sections.clone() },
        relay: Relay { workers: workers.clone(), scorers: scorers.clone(), idle: limit },
        ingest: Ingest {
            workers: workers.clone(),
            scorers,
            sections: sections.clone(),
            batch: options.ingest_batch,
            limit,
            idle: seconds(options.ingest_idle_seconds),
        },
        sections,
        tenant_header: options.tenant_header,
        default_answer: options.default_answer_tokens.max(1),
        default_stop: composer.format().stop.clone(),
    };
    let service = GatewayServer::new(Service(Arc::new(shared)))
        .max_decoding_message_size(message_bytes)
        .max_encoding_message_size(message_bytes);
    let server = Server::new("gateway", options.service).begins_traces();
    let running = server.serve(Routes::new(service), &[SERVICE]).await?;
    running.readiness().set(false, "waiting for a worker to describe itself");
    let described = workers.learn(seconds(options.describe_timeout_seconds)).await?;
    tracing::info!(model = described.model, layout = %described.layout_id, "gateway ready");
    running.readiness().set(true, "");
    Ok(running)
}

/// Runs work that takes a processor's time off the threads that serve sockets.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    let span = tracing::Span::current();
    let task = tokio::task::spawn_blocking(move || span.in_scope(work));
    task.await.map_err(|error| Status::internal(format!("tokenising failed: {error}")))
}
