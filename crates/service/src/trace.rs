//! W3C trace context: which trace a request belongs to, and which span of it is the caller's.
//!
//! A request has one place in its trace, whoever asks: log lines, outgoing calls and exported spans carry the same ids.
//! Where spans are exported the exporter draws the span's id, because its library takes none from outside; else it is
//! drawn here.
//!
//! Source: <https://www.w3.org/TR/trace-context/>, version 00. A header that does not follow it starts a new trace,
//! as the specification asks.

use crate::otlp;
use std::fmt;
use tonic::codegen::http::HeaderMap;
use tracing::Span;

/// Name of the metadata entry.
pub const HEADER: &str = "traceparent";

/// A position in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    pub(crate) trace: u128,
    pub(crate) span: u64,
    pub(crate) flags: u8,
}

impl TraceContext {
    /// A new trace that nobody asked to record.
    pub fn random() -> Self {
        Self { trace: random(), span: random() as u64 | 1, flags: 0 }
    }

    /// Reads a `traceparent`; `None` where it is malformed or all zeros.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let later = u8::from_str_radix(hex(version, 2)?, 16).ok().filter(|version| *version != 0xff)?;
        // Later versions may append fields, version 00 may not.
        if later == 0 && parts.next().is_some() {
            return None;
        }
        let trace = u128::from_str_radix(hex(trace, 32)?, 16).ok().filter(|trace| *trace != 0)?;
        let span = u64::from_str_radix(hex(span, 16)?, 16).ok().filter(|span| *span != 0)?;
        let flags = u8::from_str_radix(hex(flags, 2)?, 16).ok()?;
        Some(Self { trace, span, flags })
    }

    /// A new span below this one; what this process does for the request.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span: random() as u64 | 1, ..self }
    }

    /// The trace's id as logs write it.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace)
    }
}

impl fmt::Display for TraceContext {
    /// The header's form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

/// The caller's place, if it sent a sound one.
pub(crate) fn caller(headers: &HeaderMap) -> Option<TraceContext> {
    headers.get(HEADER).and_then(|value| value.to_str().ok()).and_then(TraceContext::parse)
}

/// The place of a request that `span` stands for; noted in the span as `trace_id`. A request without a caller's place
/// begins a trace of its own, which an exporter records only where the request `may_begin` one.
pub(crate) fn enter(span: &Span, caller: Option<TraceContext>, may_begin: bool) -> TraceContext {
    // A parent that nobody sampled is how a sampler is told to leave a request alone.
    let parent = caller.or_else(|| (!may_begin).then(TraceContext::random));
    let made_here = || parent.map_or_else(TraceContext::random, TraceContext::child);
    let place = otlp::continued(span, parent).unwrap_or_else(made_here);
    span.record("trace_id", place.trace_id());
    place
}

/// The place of a call that is made now by a request at `request`: the innermost exported span's, if there is one.
pub(crate) fn of_call(request: TraceContext) -> TraceContext {
    otlp::current().filter(|inner| inner.trace == request.trace).unwrap_or(request)
}

/// Random and never zero: version 4 ids have bits that are always set.
fn random() -> u128 {
    uuid::Uuid::new_v4().as_u128()
}

fn hex(text: &str, length: usize) -> Option<&str> {
    // Upper case is not allowed by the specification.
    let sound = text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    sound.then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_child_stays_in_the_trace_and_keeps_the_sampling_decision() {
        let given = TraceContext::parse(GIVEN).expect("the specification's example");
        assert_eq!(given.to_string(), GIVEN);
        let child = given.child();
        assert_eq!(child.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(child.to_string().ends_with("-01"));
        assert_ne!(child.to_string(), GIVEN);
        assert_eq!(TraceContext::parse(&child.to_string()), Some(child));
    }

    #[test]
    fn without_an_exporter_a_request_gets_a_span_of_its_own_in_its_callers_trace() {
        let caller = TraceContext::parse(GIVEN);
        let place = enter(&Span::none(), caller, true);
        assert_eq!(place.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(Some(place), caller);
        assert_eq!(of_call(place), place);
        assert_ne!(enter(&Span::none(), None, true), enter(&Span::none(), None, true));
    }

    #[test]
    fn what_is_malformed_starts_a_new_trace() {
        let later = GIVEN.replacen("00", "cc", 1) + "-more";
        assert!(TraceContext::parse(&later).is_some(), "a later version may say more");
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            &(GIVEN.to_owned() + "-more"),
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad:?}");
        }
        assert_ne!(TraceContext::random(), TraceContext::random());
    }
}
