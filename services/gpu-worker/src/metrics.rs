//! Metrics of the worker: every name, label and meaning in one place.

use cacheclip_rpc::v1::{MissReason, Tier};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const REQUESTS: &str = "cacheclip_worker_requests_total";
const TTFT: &str = "cacheclip_worker_ttft_seconds";
const STAGE: &str = "cacheclip_worker_stage_seconds";
const LOOKUPS: &str = "cacheclip_chunk_lookups_total";
const RECOMPUTED: &str = "cacheclip_recomputed_tokens_total";
const REALISED: &str = "cacheclip_worker_realised_ratio";
const PAGES_USED: &str = "cacheclip_worker_pages_used";
const PAGES_TOTAL: &str = "cacheclip_worker_pages_total";
const WRITES: &str = "cacheclip_worker_writes_total";
const RAM: &str = "cacheclip_worker_ram_used_bytes";

/// Registers descriptions and the zero values of series that may never move.
pub fn describe() {
    describe_counter!(REQUESTS, "Generations by policy and rung of the ladder");
    describe_histogram!(TTFT, Unit::Seconds, "From receipt of a request to its first token");
    describe_histogram!(STAGE, Unit::Seconds, "Time in each stage of a generation");
    describe_counter!(LOOKUPS, "Chunks looked up, by result (hit, miss) and tier or reason");
    describe_counter!(RECOMPUTED, "Reused tokens recomputed, by reason: selected, miss, fallback");
    describe_histogram!(REALISED, "Recomputed share of the reused chunk rows");
    describe_gauge!(PAGES_USED, "KV pages held by running sequences");
    describe_gauge!(PAGES_TOTAL, "KV pages there are");
    describe_counter!(
        WRITES,
        "Chunks offered to the store, by outcome: stored, existed, no_room, dropped, failed"
    );
    describe_gauge!(RAM, Unit::Bytes, "Decoded chunk KV in the worker's RAM");
    for reason in ["selected", "miss", "fallback"] {
        counter!(RECOMPUTED, "reason" => reason).increment(0);
    }
    for outcome in ["stored", "existed", "no_room", "dropped", "failed"] {
        counter!(WRITES, "outcome" => outcome).increment(0);
    }
}

pub(crate) fn request(policy: &'static str, rung: String) {
    counter!(REQUESTS, "policy" => policy, "rung" => rung).increment(1);
}

pub(crate) fn first_token(seconds: f64) {
    histogram!(TTFT).record(seconds);
}

pub(crate) fn stage(name: &'static str, seconds: f64) {
    histogram!(STAGE, "stage" => name).record(seconds);
}

pub(crate) fn lookup(tier: Tier, reason: Option<MissReason>) {
    match reason {
        None => counter!(LOOKUPS, "result" => "hit", "by" => tier.label()).increment(1),
        Some(reason) => counter!(LOOKUPS, "result" => "miss", "by" => reason.label()).increment(1),
    }
}

pub(crate) fn recomputed(reason: &'static str, tokens: usize) {
    counter!(RECOMPUTED, "reason" => reason).increment(tokens as u64);
}

pub(crate) fn realised(ratio: f32) {
    histogram!(REALISED).record(f64::from(ratio));
}

pub(crate) fn pages(used: usize, total: usize) {
    gauge!(PAGES_USED).set(used as f64);
    gauge!(PAGES_TOTAL).set(total as f64);
}

pub(crate) fn write(outcome: &'static str) {
    counter!(WRITES, "outcome" => outcome).increment(1);
}

pub(crate) fn ram(bytes: u64) {
    gauge!(RAM).set(bytes as f64);
}
