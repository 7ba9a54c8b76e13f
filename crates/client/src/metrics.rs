//! Metrics of the store client: every name, label and meaning in one place.

use cacheclip_rpc::v1::MissReason;
use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};

const LOAD_BYTES: &str = "cacheclip_client_load_bytes_total";
const LOAD_SECONDS: &str = "cacheclip_client_load_seconds";
const CALL_SECONDS: &str = "cacheclip_client_call_seconds";
const VERIFY_FAILURES: &str = "cacheclip_client_verify_failures_total";
const MISSING: &str = "cacheclip_client_missing_chunks_total";
const RETRIES: &str = "cacheclip_client_retries_total";

/// Registers descriptions and the zero values of series that may never move.
pub fn describe() {
    describe_counter!(LOAD_BYTES, Unit::Bytes, "Stored bytes of segments received from stores");
    describe_histogram!(LOAD_SECONDS, Unit::Seconds, "One read of layers from its start to its last frame");
    describe_histogram!(CALL_SECONDS, Unit::Seconds, "One lookup, put or delete, by method");
    describe_counter!(
        VERIFY_FAILURES,
        "Chunks whose bytes were not what they should be, by where that was seen"
    );
    describe_counter!(MISSING, "Chunks that a read did not bring, by reason");
    describe_counter!(RETRIES, "Reads that broke off and were tried again");
    counter!(VERIFY_FAILURES, "where" => "wire").increment(0);
    counter!(RETRIES).increment(0);
}

pub(crate) fn loaded(bytes: usize) {
    counter!(LOAD_BYTES).increment(bytes as u64);
}

pub(crate) fn load_ended(seconds: f64) {
    histogram!(LOAD_SECONDS).record(seconds);
}

pub(crate) fn call_ended(method: &'static str, seconds: f64) {
    histogram!(CALL_SECONDS, "method" => method).record(seconds);
}

pub(crate) fn verify_failed() {
    counter!(VERIFY_FAILURES, "where" => "wire").increment(1);
}

pub(crate) fn missing(reason: MissReason) {
    counter!(MISSING, "reason" => reason.label()).increment(1);
}

pub(crate) fn retried() {
    counter!(RETRIES).increment(1);
}
