//! Metrics of the gateway: every name, label and meaning in one place.
//!
//! Labels: `policy` is one of the four policies or `unknown`; `code` is a gRPC code's name; `reason` is one of
//! [`FALLBACKS`]; `kind` is prompt, cached, recomputed or completion. The hit rate is hit tokens over requested
//! tokens: two counters, so that it can be summed over replicas and windows.

use cacheclip_rpc::v1;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const REQUESTS: &str = "cacheclip_gateway_requests_total";
const TTFT: &str = "cacheclip_gateway_ttft_seconds";
const STAGE: &str = "cacheclip_gateway_stage_seconds";
const TOKENS: &str = "cacheclip_gateway_tokens_total";
const REQUESTED: &str = "cacheclip_lookup_requested_tokens_total";
const HIT: &str = "cacheclip_lookup_hit_tokens_total";
const FALLBACK: &str = "cacheclip_scorer_fallback_total";
const TOKENISED: &str = "cacheclip_gateway_tokenised_chunks_total";
const RESTARTS: &str = "cacheclip_gateway_restarts_total";
const UNPREPARED: &str = "cacheclip_gateway_unprepared_chunks_total";
const PEERS: &str = "cacheclip_gateway_peers";
const INGESTED: &str = "cacheclip_gateway_ingested_chunks_total";
const DELETIONS: &str = "cacheclip_gateway_deletions_total";

/// Why importance sets were not there.
pub const FALLBACKS: [&str; 5] = ["not_configured", "timeout", "unavailable", "refused", "text"];

/// Registers descriptions, and the zero values of series that may never move.
pub fn describe() {
    describe_counter!(REQUESTS, "Generations that ended, by policy and gRPC code");
    describe_histogram!(TTFT, Unit::Seconds, "From a request's arrival to its first token");
    describe_histogram!(STAGE, Unit::Seconds, "Time in the gateway's own stages: tokenize, score");
    describe_counter!(TOKENS, "Tokens of answered requests, by kind");
    describe_counter!(REQUESTED, "Reusable prompt tokens that were looked up");
    describe_counter!(HIT, "Reusable prompt tokens whose KV came from a cache");
    describe_counter!(FALLBACK, "Requests whose importance sets were not there, by reason");
    describe_counter!(TOKENISED, "Chunks tokenised, by result: cached, computed");
    describe_counter!(RESTARTS, "Requests that another worker took over before their first token");
    describe_counter!(UNPREPARED, "Ingested chunks that no scorer prepared, by reason");
    describe_gauge!(
        PEERS,
        "Workers and scorers, by kind and state: known, live (heard of within their lease)"
    );
    counter!(RESTARTS).increment(0);
    for result in ["computed", "stored"] {
        counter!(INGESTED, "result" => result).increment(0);
    }
    for result in ["cached", "computed"] {
        counter!(TOKENISED, "result" => result).increment(0);
    }
    for kind in ["prompt", "cached", "recomputed", "completion"] {
        counter!(TOKENS, "kind" => kind).increment(0);
    }
    for kind in ["worker", "scorer"] {
        peers(kind, 0, 0);
    }
    counter!(REQUESTED).increment(0);
    describe_counter!(INGESTED, "Chunks ingested, by result: computed, stored (was there already)");
    FALLBACKS.iter().for_each(|&reason| counter!(FALLBACK, "reason" => reason).increment(0));
    counter!(HIT).increment(0);
    describe_counter!(
        DELETIONS,
        "Deletions of documents that were asked for, by result: complete, pending (somebody did not answer)"
    );
    for result in ["complete", "pending"] {
        counter!(DELETIONS, "result" => result).increment(0);
    }
}

pub(crate) fn request(policy: &'static str, code: tonic::Code) {
    counter!(REQUESTS, "policy" => policy, "code" => cacheclip_service::code_name(code)).increment(1);
}

pub(crate) fn first_token(seconds: f64) {
    histogram!(TTFT).record(seconds);
}

pub(crate) fn stage(name: &'static str, seconds: f64) {
    histogram!(STAGE, "stage" => name).record(seconds);
}

pub(crate) fn usage(usage: &v1::Usage, looked_up: u32) {
    let kinds = [
        ("prompt", usage.prompt_tokens),
        ("cached", usage.cached_tokens),
        ("recomputed", usage.recomputed_tokens),
        ("completion", usage.completion_tokens),
    ];
    for (kind, tokens) in kinds {
        counter!(TOKENS, "kind" => kind).increment(tokens.into());
    }
    counter!(REQUESTED).increment(looked_up.into());
    counter!(HIT).increment(usage.cached_tokens.min(looked_up).into());
}

pub(crate) fn fallback(reason: &'static str) {
    counter!(FALLBACK, "reason" => reason).increment(1);
}

pub(crate) fn tokenised(result: &'static str) {
    counter!(TOKENISED, "result" => result).increment(1);
}

pub(crate) fn ingested(computed: usize, stored: usize) {
    counter!(INGESTED, "result" => "computed").increment(computed as u64);
    counter!(INGESTED, "result" => "stored").increment(stored as u64);
}

pub(crate) fn deleted(complete: bool) {
    counter!(DELETIONS, "result" => if complete { "complete" } else { "pending" }).increment(1);
}

pub(crate) fn restarted() {
    counter!(RESTARTS).increment(1);
}

pub(crate) fn unprepared(reason: &'static str, chunks: usize) {
    counter!(UNPREPARED, "reason" => reason).increment(chunks as u64);
}

pub(crate) fn peers(kind: &'static str, known: usize, live: usize) {
    gauge!(PEERS, "kind" => kind, "state" => "known").set(known as f64);
    gauge!(PEERS, "kind" => kind, "state" => "live").set(live as f64);
}
