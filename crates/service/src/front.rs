//! What stands before every service: request id and span, admission, deadline, the request's one log line.
//!
//! Written here rather than composed from tower's layers because each of those ends with the response *future*:
//! a streamed answer would give its permit back, leave its span and outlive its deadline at the first byte.
//! Infrastructure calls (`/grpc.health…`, `/grpc.reflection…`) are never refused and have no deadline: a server
//! that is busy or draining must still be able to say so.

use crate::readiness::Readiness;
use crate::request_id::{HEADER, RequestId};
use crate::{metrics, otlp, request_id, trace};
use cacheclip_rpc::status;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span};

/// Name of the span that a request is logged and exported in.
pub(crate) const SPAN: &str = "rpc";
/// When a shed request may come back: about one short request's time.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// The layer; clones share one limit, whatever the number of connections.
#[derive(Debug, Clone)]
pub(crate) struct Front {
    pub(crate) server: &'static str,
    pub(crate) permits: Arc<Semaphore>,
    /// Holds a token per admitted request, so that a drain can wait for the last of them.
    pub(crate) in_flight: TaskTracker,
    pub(crate) readiness: Readiness,
    pub(crate) timeout: Duration,
    /// Whether requests without a caller's trace are worth one of their own.
    pub(crate) begins_traces: bool,
}

impl<S> Layer<S> for Front {
    type Service = Fronted<S>;

    fn layer(&self, inner: S) -> Fronted<S> {
        Fronted { front: self.clone(), inner }
    }
}

/// A service behind a [`Front`].
#[derive(Debug, Clone)]
pub(crate) struct Fronted<S> {
    front: Front,
    inner: S,
}

/// What an admitted request holds until its answer has ended.
struct Admitted {
    _permit: Option<OwnedSemaphorePermit>,
    _token: TaskTrackerToken,
}

impl Front {
    fn admit(&self, infrastructure: bool) -> Result<Option<Admitted>, Status> {
        if infrastructure {
            return Ok(None);
        }
        // The token is taken before the look at `draining`: a drain that starts in between then waits for us.
        let token = self.in_flight.token();
        if self.readiness.is_draining() {
            return Err(status::unavailable(format_args!("{} is draining; retry elsewhere", self.server)));
        }
        match self.permits.clone().try_acquire_owned() {
            Ok(permit) => Ok(Some(Admitted { _permit: Some(permit), _token: token })),
            Err(_) => Err(status::exhausted(
                format_args!("{}: too many requests in flight", self.server),
                RETRY_AFTER,
            )),
        }
    }
}

impl<S> Service<Request<Body>> for Fronted<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Send,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let id = RequestId::of(request.headers());
        let path = request.uri().path().to_owned();
        let infrastructure = path.starts_with("/grpc.");
        let span = tracing::info_span!(
            SPAN,
            request_id = %id,
            trace_id = tracing::field::Empty,
            method = path.trim_start_matches('/')
        );
        let caller = trace::caller(request.headers());
        // Nobody wants a trace of every probe.
        let id = id.at(trace::enter(&span, caller, self.front.begins_traces && !infrastructure));
        let mut record = Record::start(path, span.clone(), infrastructure);
        let admitted = match self.front.admit(infrastructure) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                record.code = Some(refusal.code());
                return Box::pin(std::future::ready(Ok(echo(refusal.into_http(), &id))));
            }
        };
        // tonic ends a handler at the caller's deadline, but not the stream that it returned.
        let patience =
            timeout_in(request.headers()).map_or(self.front.timeout, |it| it.min(self.front.timeout));
        let deadline = (!infrastructure).then(|| Instant::now() + patience);
        let handler = request_id::scope(id.clone(), self.inner.call(request)).instrument(span);
        Box::pin(async move {
            let answered = match deadline {
                Some(at) => tokio::time::timeout_at(at, handler).await,
                None => Ok(handler.await),
            };
            let response = match answered {
                Ok(Ok(response)) => response,
                Err(_) => overdue().into_http(),
            };
            record.code = code_in(response.headers());
            let response = response.map(|inner| {
                let deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at)));
                let ended = record.code.is_some();
                Body::new(Guarded { inner, id: id.clone(), record, deadline, ended, _admitted: admitted })
            });
            Ok(echo(response, &id))
        })
    }
}

fn overdue() -> Status {
    Status::deadline_exceeded(
        "the deadline of the caller, or the server's own limit on a request's time, was reached",
    )
}

fn echo(mut response: Response<Body>, id: &RequestId) -> Response<Body> {
    if let Some(value) = id.header() {
        response.headers_mut().insert(HEADER, value);
    }
    response
}

/// The caller's `grpc-timeout`: up to eight digits and a unit.
fn timeout_in(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// The answer's body, which keeps the request's permit, span and deadline until it ends.
struct Guarded {
    inner: Body,
    id: RequestId,
    record: Record,
    deadline: Option<Pin<Box<Sleep>>>,
    ended: bool,
    _admitted: Option<Admitted>,
}

impl HttpBody for Guarded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            // The handler's stream is dropped now: nobody will read what it would still produce.
            this.inner = Body::empty();
            return Poll::Ready(Some(Ok(this.end(overdue()))));
        }
        let _entered = this.record.span.enter();
        let inner = Pin::new(&mut this.inner);
        let frame = ready!(this.id.enter(|| inner.poll_frame(cx)));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    this.record.code = code_in(trailers);
                    this.ended = true;
                }
            }
            Some(Err(status)) => this.record.code = Some(status.code()),
            None => this.ended = true,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Guarded {
    fn end(&mut self, status: Status) -> Frame<Bytes> {
        self.record.code = Some(status.code());
        self.ended = true;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            tracing::warn!("a status could not be written as trailers");
        }
        Frame::trailers(trailers)
    }
}

/// Counts and logs the request when it is dropped, however it ended.
struct Record {
    path: String,
    span: Span,
    started: Instant,
    infrastructure: bool,
    in_flight: bool,
    /// `None` when the answer never ended: the caller went away.
    code: Option<Code>,
}

impl Record {
    fn start(path: String, span: Span, infrastructure: bool) -> Self {
        // A watch stands as long as its caller lives: who scales by requests in flight would count callers.
        let in_flight = !infrastructure && !path.ends_with("/Watch");
        if in_flight {
            metrics::started();
        }
        Self { path, span, started: Instant::now(), infrastructure, in_flight, code: None }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let seconds = self.started.elapsed().as_secs_f64();
        metrics::ended(&self.path, code, seconds);
        if self.in_flight {
            metrics::left();
        }
        otlp::ended(&self.span, code);
        let code = metrics::code_name(code);
        let _entered = self.span.enter();
        // A probe every few seconds would bury the requests.
        if self.infrastructure {
            tracing::debug!(code, seconds, "answered");
        } else {
            tracing::info!(code, seconds, "answered");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::codegen::http::HeaderValue;

    #[test]
    fn a_callers_deadline_is_read_as_grpc_writes_it() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_static(text));
            timeout_in(&headers)
        };
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "S", "5", "123456789S", "-1S", "5X"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
