//! Metrics of the store client: every name, label and meaning in one place.
//!
//! Labels: `tier` is a tier's label, and `store_disk` for what is written; `direction` is `in` (from stores) or
//! `out`; `reason` of `SKIPPED` is one of [`SKIPS`]; `outcome` is one of [`Written`]'s labels.

use crate::Written;
use cacheclip_rpc::v1::{MissReason, Tier};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const LOAD_BYTES: &str = "cacheclip_load_bytes_total";
const LOAD_SECONDS: &str = "cacheclip_load_duration_seconds";
const SKIPPED: &str = "cacheclip_load_skipped_total";
const CALL_SECONDS: &str = "cacheclip_client_call_seconds";
const VERIFY_FAILURES: &str = "cacheclip_verify_failures_total";
const MISSING: &str = "cacheclip_client_missing_chunks_total";
const RETRIES: &str = "cacheclip_client_retries_total";
const LIVE: &str = "cacheclip_client_live_stores";
const KNOWN: &str = "cacheclip_client_known_stores";
const MOVES: &str = "cacheclip_client_moves_total";

/// Why a chunk was not loaded: no store is live, a deadline passed, computing it was expected to be
/// done sooner.
pub const SKIPS: [&str; 3] = ["breaker", "deadline", "cost"];

/// Registers descriptions and the zero values of series that may never move.
pub fn describe() {
    describe_counter!(LOAD_BYTES, Unit::Bytes, "Stored bytes of chunks, by tier and direction: in, out");
    describe_histogram!(LOAD_SECONDS, Unit::Seconds, "From a read's start to a chunk's last layer, by tier");
    describe_counter!(SKIPPED, "Chunks that were not loaded, by reason: breaker, deadline, cost");
    describe_histogram!(
        CALL_SECONDS,
        Unit::Seconds,
        "One call at one store, by method; of a get the time to its first word"
    );
    describe_counter!(
        VERIFY_FAILURES,
        "Chunks whose bytes were not what they should be, by where that was seen"
    );
    describe_counter!(MISSING, "Chunks that a read did not bring, by reason");
    describe_counter!(RETRIES, "Calls that broke off and were tried again");
    describe_gauge!(LIVE, "Stores that answer");
    describe_gauge!(KNOWN, "Stores that answer or did not long ago");
    describe_counter!(
        MOVES,
        "Chunks found at another store than the one that keeps them, by outcome of their copy: stored, existed, \
         no_room, deleted (meanwhile), dropped, failed"
    );
    counter!(VERIFY_FAILURES, "where" => "wire").increment(0);
    counter!(RETRIES).increment(0);
    SKIPS.iter().for_each(|&reason| counter!(SKIPPED, "reason" => reason).increment(0));
    Written::ALL.iter().for_each(|it| counter!(MOVES, "outcome" => it.label()).increment(0));
}

/// Counts chunks whose load was given up because it took too long.
pub fn overdue(chunks: usize) {
    counter!(SKIPPED, "reason" => "deadline").increment(chunks as u64);
}

/// Counts chunks that are computed because that is expected to be done sooner.
pub fn dear(chunks: usize) {
    counter!(SKIPPED, "reason" => "cost").increment(chunks as u64);
}

/// Counts a chunk whose bytes are not what they claim to be.
pub fn verify_failed() {
    counter!(VERIFY_FAILURES, "where" => "wire").increment(1);
}

pub(crate) fn nowhere(chunks: usize) {
    counter!(SKIPPED, "reason" => "breaker").increment(chunks as u64);
}

pub(crate) fn loaded(tier: Tier, bytes: usize) {
    counter!(LOAD_BYTES, "tier" => tier.label(), "direction" => "in").increment(bytes as u64);
}

pub(crate) fn written(bytes: usize) {
    counter!(LOAD_BYTES, "tier" => Tier::StoreDisk.label(), "direction" => "out").increment(bytes as u64);
}

pub(crate) fn load_ended(tier: Tier, seconds: f64) {
    histogram!(LOAD_SECONDS, "tier" => tier.label()).record(seconds);
}

pub(crate) fn call_ended(method: &'static str, seconds: f64) {
    histogram!(CALL_SECONDS, "method" => method).record(seconds);
}

pub(crate) fn missing(reason: MissReason) {
    counter!(MISSING, "reason" => reason.label()).increment(1);
}

pub(crate) fn retried() {
    counter!(RETRIES).increment(1);
}

pub(crate) fn stores(live: usize, known: usize) {
    gauge!(LIVE).set(live as f64);
    gauge!(KNOWN).set(known as f64);
}

pub(crate) fn moved(outcome: Written) {
    counter!(MOVES, "outcome" => outcome.label()).increment(1);
}
