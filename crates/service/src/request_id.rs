//! The id that ties one request's log lines together across services, and its place in a trace.
//!
//! It comes in as `x-request-id` and `traceparent` metadata or is made here, is current while the request's handler and its
//! response stream are polled, is echoed to the caller, and travels on with [`outgoing`]. A task that a handler
//! spawns is outside of that: give it the id with [`scope`].

use crate::trace::{self, TraceContext};
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use tonic::codegen::http::{HeaderMap, HeaderValue};
use tonic::metadata::MetadataValue;

/// Name of the metadata entry.
pub const HEADER: &str = "x-request-id";

/// Longest id that is taken over from a caller.
const LONGEST: usize = 128;

tokio::task_local! {
    static CURRENT: RequestId;
}

/// Visible ASCII of bounded length, so that it may stand in a log line and in a header; with this process's span
/// of the caller's trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId {
    id: Arc<str>,
    trace: TraceContext,
}

impl RequestId {
    /// A new random id.
    pub fn random() -> Self {
        Self { id: uuid::Uuid::new_v4().simple().to_string().into(), trace: TraceContext::random() }
    }

    /// Takes over a caller's id; `None` where it is empty, too long or not visible ASCII.
    pub fn parse(text: &str) -> Option<Self> {
        let sound = (1..=LONGEST).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        sound.then(|| Self { id: text.into(), trace: TraceContext::random() })
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.id
    }

    /// This process's span of the request's trace.
    pub fn trace(&self) -> TraceContext {
        self.trace
    }

    /// The caller's id, or a new one; its trace is a new one until it is put [`RequestId::at`] its place.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let text = headers.get(HEADER).and_then(|value| value.to_str().ok());
        text.and_then(Self::parse).unwrap_or_else(Self::random)
    }

    pub(crate) fn at(self, trace: TraceContext) -> Self {
        Self { trace, ..self }
    }

    pub(crate) fn header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.id).ok()
    }

    pub(crate) fn enter<T>(&self, poll: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self.clone(), poll)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

/// The id of the request that is being handled, if there is one.
pub fn current() -> Option<RequestId> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Runs `future` as part of the request `id`; for tasks that a handler spawns.
pub fn scope<F: Future>(id: RequestId, future: F) -> impl Future<Output = F::Output> {
    CURRENT.scope(id, future)
}

/// Spawns `work` as part of the current request: with its id, its trace and its span in the logs.
pub fn spawn<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    use tracing::Instrument as _;
    match current() {
        Some(id) => tokio::spawn(scope(id, work).in_current_span()),
        None => tokio::spawn(work.in_current_span()),
    }
}

/// Adds the current id and trace to a call to another service.
pub fn outgoing<T>(mut request: tonic::Request<T>) -> tonic::Request<T> {
    let Some(current) = current() else { return request };
    let trace = trace::of_call(current.trace).to_string();
    for (name, value) in [(HEADER, current.as_str()), (trace::HEADER, &trace)] {
        if let Ok(value) = MetadataValue::try_from(value) {
            request.metadata_mut().insert(name, value);
        }
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_could_forge_a_log_line_is_not_taken_over() {
        assert!(RequestId::parse("ask-42").is_some());
        for bad in ["", "two words", "line\nbreak", "é", &"x".repeat(LONGEST + 1)] {
            assert_eq!(RequestId::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_request_continues_its_callers_trace() {
        let mut headers = HeaderMap::new();
        let caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        headers.insert(trace::HEADER, HeaderValue::from_static(caller));
        let place = trace::enter(&tracing::Span::none(), trace::caller(&headers), true);
        let id = RequestId::of(&headers).at(place);
        assert_eq!(id.trace().trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(id.trace().to_string(), caller, "the span is this process's own");
    }

    #[tokio::test]
    async fn a_call_made_inside_a_request_carries_its_id() {
        let id = RequestId::parse("r-1").expect("a sound id");
        let request = scope(id, async { outgoing(tonic::Request::new(())) }).await;
        assert_eq!(request.metadata().get(HEADER).expect("the id").to_str().expect("text"), "r-1");
        let trace = request.metadata().get(trace::HEADER).expect("a trace").to_str().expect("text");
        assert!(TraceContext::parse(trace).is_some(), "{trace}");
        assert!(outgoing(tonic::Request::new(())).metadata().get(HEADER).is_none());
    }
}
