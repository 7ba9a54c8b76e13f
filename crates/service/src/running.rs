//! A server that is serving, and the order in which it goes away.

use crate::readiness::Readiness;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long connections may take to close once no request is in flight. hyper waits without limit for a
/// peer that dialled and never spoke.
const CLOSE: Duration = Duration::from_secs(1);

/// Something that [`crate::run()`] can stop gently.
pub trait Drain: Send {
    /// Stops taking work, finishes what was taken, returns within its own limit.
    fn drain(self) -> impl Future<Output = ()> + Send;
}

/// What a drain left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests that had not ended when the time was up.
    pub abandoned: usize,
}

/// A serving server. Dropping it stops it without waiting for anything.
#[derive(Debug)]
pub struct Running {
    name: &'static str,
    grpc: SocketAddr,
    admin: Option<SocketAddr>,
    tasks: Vec<JoinHandle<()>>,
    readiness: Readiness,
    in_flight: TaskTracker,
    shutdown: CancellationToken,
    closing: CancellationToken,
    limit: Duration,
}

impl Running {
    #[allow(clippy::too_many_arguments, reason = "one call site; the parts have no other common owner")]
    pub(crate) fn new(
        name: &'static str,
        grpc: SocketAddr,
        admin: Option<(SocketAddr, JoinHandle<()>)>,
        task: JoinHandle<()>,
        readiness: Readiness,
        in_flight: TaskTracker,
        closing: CancellationToken,
        limit: Duration,
    ) -> Self {
        let (admin, admin_task) = admin.unzip();
        let tasks = std::iter::once(task).chain(admin_task).collect();
        Self {
            name,
            grpc,
            admin,
            tasks,
            readiness,
            in_flight,
            shutdown: CancellationToken::new(),
            closing,
            limit,
        }
    }

    /// Address of the gRPC port.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Address of the admin port, if there is one.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// The gRPC port as clients dial it. A server that listens on all addresses is dialled on loopback.
    pub fn endpoint(&self) -> String {
        let mut address = self.grpc;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        format!("http://{address}")
    }

    /// The server's readiness, to set and to read.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Cancelled when a drain begins: background work and streams without an end of their own stop on it.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Goes away in order: readiness flips and new requests are refused, while those in flight finish and
    /// health can still be asked; then connections close; then the ports are gone. Bounded by
    /// `drain_seconds` and a second for closing.
    pub async fn drain(mut self) -> Drained {
        let started = Instant::now();
        self.readiness.drain();
        self.shutdown.cancel();
        self.in_flight.close();
        let finished = tokio::time::timeout(self.limit, self.in_flight.wait()).await.is_ok();
        let abandoned = if finished { 0 } else { self.in_flight.len() };
        self.closing.cancel();
        let close = Instant::now() + CLOSE;
        for task in &mut self.tasks {
            if tokio::time::timeout_at(close, &mut *task).await.is_err() {
                task.abort();
            }
        }
        tracing::info!(server = self.name, seconds = started.elapsed().as_secs_f64(), abandoned, "drained");
        Drained { abandoned }
    }
}

impl Drain for Running {
    async fn drain(self) {
        Running::drain(self).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.readiness.drain();
        self.shutdown.cancel();
        self.closing.cancel();
    }
}
