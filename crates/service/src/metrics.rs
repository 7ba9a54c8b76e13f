//! Metrics of every server's RPC surface.
//!
//! Labels: `method` is the full gRPC path without its leading slash ("other" for paths that are not served,
//! so that a caller cannot make up label values); `code` is the gRPC code's name; `outcome` of spans is "sent" or
//! "lost".

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use tonic::Code;

const BUILD: &str = "cacheclip_build_info";
const REQUESTS: &str = "cacheclip_rpc_requests_total";
const SECONDS: &str = "cacheclip_rpc_seconds";
const IN_FLIGHT: &str = "cacheclip_rpc_in_flight_requests";
const SPANS: &str = "cacheclip_trace_spans_total";

/// Registers descriptions, and the gauge that says what this build is.
pub fn describe() {
    describe_gauge!(BUILD, "1, with what this build is: its version, its key specification, its protocol");
    let version = env!("CARGO_PKG_VERSION");
    let key_spec = cacheclip_chunk::KEY_SPEC.to_string();
    gauge!(BUILD, "version" => version, "key_spec" => key_spec, "proto" => "cacheclip.v1").set(1.0);
    describe_counter!(REQUESTS, "Requests that ended, by method and gRPC code");
    describe_histogram!(
        SECONDS,
        metrics::Unit::Seconds,
        "Time from a request's arrival to the end of its answer"
    );
    describe_gauge!(
        IN_FLIGHT,
        "Requests that have come and have not ended, without health checks and watches"
    );
    // Autoscalers read it before anybody has asked anything.
    gauge!(IN_FLIGHT).increment(0.0);
    describe_counter!(
        SPANS,
        "Spans handed to the exporter of traces, by outcome: sent, or lost because the collector did not take them in time"
    );
}

pub(crate) fn started() {
    gauge!(IN_FLIGHT).increment(1.0);
}

pub(crate) fn left() {
    gauge!(IN_FLIGHT).decrement(1.0);
}

pub(crate) fn ended(path: &str, code: Code, seconds: f64) {
    let method = if code == Code::Unimplemented { "other" } else { path.trim_start_matches('/') };
    counter!(REQUESTS, "method" => method.to_owned(), "code" => code_name(code)).increment(1);
    histogram!(SECONDS, "method" => method.to_owned()).record(seconds);
}

/// Spans that the collector took, or did not.
#[cfg(feature = "otlp")]
pub(crate) fn spans(sent: bool, number: usize) {
    let outcome = if sent { "sent" } else { "lost" };
    counter!(SPANS, "outcome" => outcome).increment(number as u64);
}

/// The gRPC code's name as the specification writes it, for labels and logs.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
