//! Whether a server should be sent requests, and what `grpc.health.v1` says about it.
//!
//! The health service reads the same state that [`Readiness::set`] writes, so a check that follows a change
//! always sees it; there is no task in between that could lag.

use futures::{Stream, StreamExt as _};
use std::pin::Pin;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// Health name under which liveness is asked; it stays SERVING through start-up and drain, so that a
/// process that is merely not ready is not restarted.
pub const LIVENESS: &str = "liveness";

/// Cheap to clone; a server starts not ready, with the reason "starting".
#[derive(Debug, Clone)]
pub struct Readiness {
    state: watch::Sender<State>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State {
    pub(crate) ready: bool,
    pub(crate) why: String,
    draining: bool,
}

impl Readiness {
    pub(crate) fn new() -> Self {
        let state = State { ready: false, why: "starting".into(), draining: false };
        Self { state: watch::Sender::new(state) }
    }

    /// Says whether requests are welcome, and why not or with what reservation. A draining server stays not
    /// ready whatever is set afterwards.
    pub fn set(&self, ready: bool, why: &str) {
        self.state.send_if_modified(|state| {
            let next = State { ready, why: why.into(), draining: false };
            let change = !state.draining && *state != next;
            if change {
                *state = next;
            }
            change
        });
    }

    /// Whether requests are welcome now.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().ready
    }

    /// Why they are not, or with what reservation they are; often empty.
    pub fn why(&self) -> String {
        self.state.borrow().why.clone()
    }

    /// Waits until the server is ready. The caller brings the deadline.
    pub async fn ready(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.state.subscribe().wait_for(|state| state.ready).await;
    }

    pub(crate) fn drain(&self) {
        self.state.send_replace(State { ready: false, why: "draining".into(), draining: true });
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.state.borrow().draining
    }
}

/// `grpc.health.v1.Health` over [`Readiness`].
#[derive(Debug)]
pub(crate) struct HealthService {
    pub(crate) readiness: Readiness,
    pub(crate) services: Vec<&'static str>,
    /// Ends watches, which would otherwise hold their connections open for ever.
    pub(crate) closing: CancellationToken,
}

fn status(ready: bool) -> HealthCheckResponse {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    HealthCheckResponse { status: status.into() }
}

impl HealthService {
    fn knows(&self, service: &str) -> Result<(), Status> {
        if service.is_empty() || service == LIVENESS || self.services.contains(&service) {
            return Ok(());
        }
        Err(Status::not_found(format!("service {service:?} is not served here")))
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        self.knows(&service)?;
        Ok(Response::new(status(service == LIVENESS || self.readiness.is_ready())))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let service = request.into_inner().service;
        self.knows(&service)?;
        let live = service == LIVENESS;
        let states = WatchStream::new(self.readiness.state.subscribe())
            .map(move |state| Ok(status(live || state.ready)))
            .take_until(self.closing.clone().cancelled_owned());
        Ok(Response::new(Box::pin(states)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draining_server_never_becomes_ready_again() {
        let readiness = Readiness::new();
        assert_eq!(readiness.why(), "starting");
        readiness.set(true, "");
        assert!(readiness.is_ready());
        readiness.drain();
        readiness.set(true, "a late start-up task");
        assert!(!readiness.is_ready());
        assert_eq!(readiness.why(), "draining");
    }
}
