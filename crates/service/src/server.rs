//! Binding a server's ports and serving until it is drained.

use crate::front::Front;
use crate::readiness::{HealthService, Readiness};
use crate::running::Running;
use crate::{Error, Options, admin, connect, telemetry};
use cacheclip_rpc::DESCRIPTORS;
use futures::Stream;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::transport::server::{Connected, TcpIncoming};
use tonic_health::pb::health_server::HealthServer;

/// Notices a peer that vanished without closing its connection.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// A server that has not been started.
#[derive(Debug)]
pub struct Server {
    name: &'static str,
    options: Options,
    begins_traces: bool,
}

impl Server {
    /// `name` is how the server calls itself in logs and refusals.
    pub fn new(name: &'static str, options: Options) -> Self {
        Self { name, options, begins_traces: false }
    }

    /// Records requests that come without a trace, too, as traces of their own. For servers at the fleet's edge:
    /// further inside, such a request is housekeeping between services.
    #[must_use]
    pub fn begins_traces(self) -> Self {
        Self { begins_traces: true, ..self }
    }

    /// Binds the ports, then serves `routes` on tasks of its own, with health, reflection and what stands
    /// before every request. `services` are the full gRPC names that health answers for.
    ///
    /// The server starts *not ready*: call [`Readiness::set`] once it can do its work.
    ///
    /// # Errors
    /// An address that cannot be listened on; broken reflection descriptors.
    pub async fn serve(self, routes: Routes, services: &[&'static str]) -> Result<Running, Error> {
        let (listener, address) = bind(&self.options.listen).await?;
        // Nagle's delay would sit between every two tokens of an answer.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(KEEPALIVE));
        self.serve_incoming(incoming, address, routes, services).await
    }

    /// Like [`Server::serve`] on connections that the caller accepts; for tests that bring their own network.
    ///
    /// # Errors
    /// As [`Server::serve`].
    pub async fn serve_incoming<I, IO, E>(
        self,
        incoming: I,
        address: SocketAddr,
        routes: Routes,
        services: &[&'static str],
    ) -> Result<Running, Error>
    where
        I: Stream<Item = Result<IO, E>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        telemetry::install_recorder();
        let readiness = Readiness::new();
        let closing = CancellationToken::new();
        let in_flight = TaskTracker::new();
        let admin = self.serve_admin(&readiness, &closing).await?;
        let front = Front {
            server: self.name,
            permits: Arc::new(Semaphore::new(
                self.options.max_concurrent_requests.clamp(1, Semaphore::MAX_PERMITS),
            )),
            in_flight: in_flight.clone(),
            readiness: readiness.clone(),
            timeout: self.options.request_timeout(),
            begins_traces: self.begins_traces,
        };
        let health = HealthService {
            readiness: readiness.clone(),
            services: services.to_vec(),
            closing: closing.clone(),
        };
        let routes = add_reflection(routes.add_service(HealthServer::new(health)))?;
        let serving = tonic::transport::Server::builder()
            .max_frame_size(connect::FRAME_BYTES)
            .initial_stream_window_size(connect::STREAM_WINDOW_BYTES)
            .initial_connection_window_size(connect::CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .layer(front)
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, closing.clone().cancelled_owned());
        let grpc = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the gRPC port stopped");
            }
        });
        tracing::info!(server = self.name, %address, admin = ?admin.as_ref().map(|(at, _)| at), "listening");
        Ok(Running::new(self.name, address, admin, grpc, readiness, in_flight, closing, self.options.drain()))
    }

    async fn serve_admin(
        &self,
        readiness: &Readiness,
        closing: &CancellationToken,
    ) -> Result<Option<(SocketAddr, JoinHandle<()>)>, Error> {
        let Some(listen) = &self.options.admin_listen else { return Ok(None) };
        let (listener, address) = bind(listen).await?;
        let serving = axum::serve(listener, admin::router(readiness.clone()))
            .with_graceful_shutdown(closing.clone().cancelled_owned());
        let task = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the admin port stopped");
            }
        });
        Ok(Some((address, task)))
    }
}

async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |source| Error::Bind { address: address.into(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Both versions: tools differ in which one they ask for.
fn add_reflection(routes: Routes) -> Result<Routes, Error> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let broken = |error: tonic_reflection::server::Error| Error::Reflection(error.to_string());
    let v1 = builder().build_v1().map_err(broken)?;
    let v1alpha = builder().build_v1alpha().map_err(broken)?;
    Ok(routes.add_service(v1).add_service(v1alpha))
}
