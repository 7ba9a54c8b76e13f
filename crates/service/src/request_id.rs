//! The id that ties one request's log lines together across services.
//!
//! It comes in as `x-request-id` metadata or is made here, is current while the request's handler and its
//! response stream are polled, is echoed to the caller, and travels on with [`outgoing`]. A task that a handler
//! spawns is outside of that: give it the id with [`scope`].

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

/// Visible ASCII of bounded length, so that it may stand in a log line and in a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// A new random id.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string().into())
    }

    /// Takes over a caller's id; `None` where it is empty, too long or not visible ASCII.
    pub fn parse(text: &str) -> Option<Self> {
        let sound = (1..=LONGEST).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        sound.then(|| Self(text.into()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(HEADER).and_then(|value| value.to_str().ok());
        given.and_then(Self::parse).unwrap_or_else(Self::random)
    }

    pub(crate) fn header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.0).ok()
    }

    pub(crate) fn enter<T>(&self, poll: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self.clone(), poll)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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

/// Adds the current id to a call to another service.
pub fn outgoing<T>(mut request: tonic::Request<T>) -> tonic::Request<T> {
    if let Some(value) = current().and_then(|id| MetadataValue::try_from(id.as_str()).ok()) {
        request.metadata_mut().insert(HEADER, value);
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

    #[tokio::test]
    async fn a_call_made_inside_a_request_carries_its_id() {
        let id = RequestId::parse("r-1").expect("a sound id");
        let request = scope(id, async { outgoing(tonic::Request::new(())) }).await;
        assert_eq!(request.metadata().get(HEADER).expect("the id").to_str().expect("text"), "r-1");
        assert!(outgoing(tonic::Request::new(())).metadata().get(HEADER).is_none());
    }
}
