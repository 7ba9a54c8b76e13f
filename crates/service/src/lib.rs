//! Bootstrap of a server: config, telemetry, health, admin port, drain.
//!
//! A service builds its tonic routes and hands them to [`Server::serve`]; what every server needs — health and
//! reflection on the gRPC port, request ids and spans, admission with hints, an admin port, a drain in the right
//! order — is the same everywhere. A thin `main` is one call of [`run()`].
//!
//! ```no_run
//! # async fn start() -> Result<(), cacheclip_service::Error> {
//! use cacheclip_service::{Options, Server};
//!
//! let routes = tonic::service::Routes::default();
//! let running = Server::new("cache-store", Options::default()).serve(routes, &["cacheclip.v1.Cache"]).await?;
//! running.readiness().set(true, "");
//! running.drain().await;
//! # Ok(())
//! # }
//! ```

mod admin;
pub mod config;
mod connect;
mod error;
mod front;
pub mod lifetime;
mod metrics;
mod options;
#[cfg(feature = "otlp")]
mod otlp;
// The same names in a build without the exporter, so that nobody who calls them needs to know which build it is.
#[cfg(not(feature = "otlp"))]
#[path = "otlp_absent.rs"]
mod otlp;
mod readiness;
pub mod request_id;
pub mod residency;
pub mod resolve;
mod run;
mod running;
mod server;
pub mod telemetry;
pub mod trace;

pub use connect::{ConnectOptions, connect, endpoint};
pub use error::Error;
pub use metrics::{code_name, describe as describe_metrics};
pub use options::{Options, seconds};
pub use readiness::{LIVENESS, Readiness};
pub use run::{BAD_CONFIG, FAILED_START, Failure, run, stop_signal};
pub use running::{Drain, Drained, Running};
pub use server::Server;
/// The allocator of every program that serves: buffers of KV come and go in many sizes, and the system's allocator keeps
/// what lies free between them. Its settings are in `.cargo/config.toml`.
pub use tikv_jemallocator::Jemalloc as Allocator;
